# SPDX-License-Identifier: Apache-2.0
"""An exponential moving average of the weights, which evaluation uses, also in the test after ``fit``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from moeapps.training.placement import is_placed, local


class AveragedWeights(WeightAveraging):
    r"""Average the weights, :math:`\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta` after every step.

    Validation, best.ckpt, the test after ``fit`` and all later commands use the average; training goes on from the
    weights themselves, also when it is resumed. Lightning's own ``EMAWeightAveraging`` loads the weights that are NOT
    averaged when a trainer that has fitted tests a checkpoint, so that ``fit`` and ``test`` would report different
    models, and has no warm-up. Buffers of floating point are averaged too; others are copied.

    Args:
        decay: d, in [0, 1).
        warmup: start with a short memory, :math:`d_n = \min(d, (1 + n) / (10 + n))` at the n-th average.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.999, *, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} is not allowed; use 0 (no averaging) to below 1")
        self.decay, self.warmup = decay, warmup
        self._swapped = False  # the network holds the average, and the average's place the weights
        super().__init__(multi_avg_fn=self.average)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.precision_plugin.convert_module(pl_module)  # what is copied here: the average has the weights' type
        if stage == "fit":
            self._swapped = False
            # As Lightning does it, but that places the network here: ours are placed after all callbacks are set up.
            self._average_model = AveragedModel(
                pl_module, pl_module.device, use_buffers=True, multi_avg_fn=self.average
            )

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Place the average as the network is placed, where it is spread over processes."""
        if self._average_model is not None and is_placed(pl_module):
            cast(Any, trainer.strategy).spread(self._average_model.module)

    def average(self, mean: Sequence[Tensor], now: Sequence[Tensor], count: Tensor | int) -> None:
        """Move the averages towards the weights in place; ``count`` averages were taken before."""
        if not torch.is_floating_point(mean[0]):  # counters and flags
            for old, new in zip(mean, now, strict=True):
                old.copy_(new)
            return
        mean, now = [local(value) for value in mean], [local(value) for value in now]
        n = int(count)
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        torch._foreach_lerp_(mean, now, 1 - decay)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._grow(pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _grow(self, task: L.LightningModule) -> None:
        """Let the average have the network's buffer where that has another size: a gate learns the number of its rows.

        There is no mean of two sizes; the average of such a buffer begins anew.
        """
        assert self._average_model is not None
        own = dict(task.named_modules())
        for name, module in cast(L.LightningModule, self._average_model.module).named_modules():
            for key, mean in module._buffers.items():
                now = own[name]._buffers[key] if name in own else None
                if mean is not None and now is not None and mean.shape != now.shape:
                    module._buffers[key] = now.detach().clone()

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether this is the end of an optimizer step; every one is averaged."""
        return step_idx is not None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have the average evaluated while it is trained; any later command says itself what it evaluates."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._evaluate_average(pl_module, True)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._evaluate_average(pl_module, False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the network, for the test; the weights stay, for a checkpoint that is written yet."""
        self._evaluate_average(pl_module, True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the weights back where a training was cut: whoever uses the network from here on means them."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._evaluate_average(pl_module, False)

    def _evaluate_average(self, task: L.LightningModule, wanted: bool) -> None:
        """Exchange network and average, unless they are where they are wanted."""
        if self._average_model is not None and self._swapped != wanted:
            self._grow(task)  # what grew after the last average
            self._swap_models(task)
            self._swapped = wanted

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the state lies beside the weights, so that a later command need not name this callback."""
        return {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average where weights are looked for, and the weights themselves beside it."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["averaging_step"] = self._latest_update_step
        if self._swapped:  # within a validation, by a signal of the queue or before our `on_exception`; after training
            weights, average = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, weights

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with weights and average where training is resumed; else keep the average, which is loaded already."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            self._latest_update_step = checkpoint.get("averaging_step", self._latest_update_step)
