# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the weights, on top of Lightning's callback for averages."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class Ema(WeightAveraging):
    r"""Average the weights while training, :math:`m \leftarrow d\,m + (1 - d)\,w`; evaluate and keep the average.

    Validation runs on the average, best.ckpt and last.ckpt hold it as their weights (the live ones are kept under
    ``current_model_state``), and the test after a fit loads it. Lightning's own ``EMAWeightAveraging`` would load the
    LIVE weights there, and has no warm-up.

    Args:
        decay: d, in [0, 1).
        warmup: start with a short memory, :math:`d_n = \min(d, (1 + n) / (10 + n))` at the n-th average.
        every: optimizer steps from one average to the next, at least 1.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(self, decay: float = 0.999, *, warmup: bool = True, every: int = 1) -> None:
        if not 0 <= decay < 1 or every < 1:
            raise ValueError(f"decay={decay}, every={every}: use a decay in [0, 1) and every >= 1")
        self.decay, self.warmup, self.every = decay, warmup, every
        super().__init__(multi_avg_fn=self._average)

    def _average(self, mean: list[Tensor], now: list[Tensor], count: Tensor | int) -> None:
        if not torch.is_floating_point(mean[0]):  # counters and flags
            for old, new in zip(mean, now, strict=True):
                old.copy_(new)
            return
        n = int(count)
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        torch._foreach_lerp_(mean, now, 1 - decay)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether this optimizer step is one of those that are averaged."""
        return step_idx is not None and (step_idx + 1) % self.every == 0

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a state here would make Lightning warn whoever tests without this callback."""
        return {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average in the place of the weights, and the last averaged step beside it."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["averaged_at_step"] = self._latest_update_step

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up average and live weights when training goes on; otherwise leave the loaded average in place."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            self._latest_update_step = checkpoint.get("averaged_at_step", 0)
