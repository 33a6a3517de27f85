# SPDX-License-Identifier: Apache-2.0
"""An exponential moving average of the weights that is what evaluation sees, also in the test after ``fit``."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn


class AveragedWeights(EMAWeightAveraging):
    r"""Average the weights, :math:`\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta` after every step.

    Validation, best.ckpt, the test after ``fit`` and all later commands use the average; training goes on from the
    weights themselves, also when it is resumed. Lightning's own callback loads the weights that are NOT averaged when a
    trainer that has fitted tests a checkpoint, so that ``fit`` and ``test`` would report different models.

    Args:
        decay: d, in [0, 1).
        use_buffers: average buffers of floating point too; others are copied.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.999, *, use_buffers: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} is not allowed; use 0 (no averaging) up to, and not, 1")
        super().__init__(decay=decay, use_buffers=use_buffers)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the state lies beside the weights, so that a later command need not name this callback."""
        return {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average where weights are looked for, and the weights themselves beside it."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["averaging_step"] = self._latest_update_step

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with weights and average where training is resumed; else keep the average, which is loaded already."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            self._latest_update_step = checkpoint.get("averaging_step", self._latest_update_step)
