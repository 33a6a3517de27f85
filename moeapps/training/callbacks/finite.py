# SPDX-License-Identifier: Apache-2.0
"""A training whose numbers are no longer finite: stopped with advice, or its bad steps left out and counted."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from moeapps.training.folders import RunError

log = logging.getLogger("moeapps")

# On a GPU a look at the loss waits for the step; weights that are not finite make all later losses so, too.
EVERY = 50
_ADVICE = (
    "lower model.init_args.optimizer.lr, clip gradients (--trainer.gradient_clip_val 1), or see where it begins with "
    "--config configs/debug/anomaly.yaml"
)


class DivergedError(RunError):
    """A training with a loss or weights that are not finite."""


class StopDiverged(L.Callback):
    """Stop a training whose loss or weights are not finite, before such weights can become a checkpoint.

    A loss that is not finite is met before its backward pass, so that weights and checkpoints stay as they were (on a
    GPU, one step in 50 is looked at); weights and buffers that were finite at the start are looked at before every
    validation and at every end of an epoch. Tasks that step by hand look after their own steps.

    Args:
        skip: how many steps with a loss or gradient that is not finite may be left out, counted as ``train/skipped``,
            before training stops. With any, every step's gradient is looked at.

    Raises:
        ValueError: ``skip`` below 0.
    """

    def __init__(self, skip: int = 0) -> None:
        if skip < 0:
            raise ValueError(f"skip={skip}, but a training leaves out 0 steps or more; 0 stops at the first")
        self.skip = skip
        self.skipped = 0
        self._watched: list[str] = []
        self._held: dict[str, Tensor] = {}
        self._held_at = -1  # the step that they are from
        self._bad_loss = False

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps were left out."""
        return {"skipped": self.skipped}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watched = [name for name, value in _state(pl_module).items() if _is_finite(value)]
        self._hold(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not when the step before is found to be good: what moves at its end (a balance bias, a count) would be lost.
        if trainer.global_step != self._held_at:
            self._hold(trainer, pl_module)

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        looked_at = self.skip or loss.device.type == "cpu" or trainer.global_step % EVERY == 0
        self._bad_loss = bool(looked_at) and not _is_finite(loss)
        if self._bad_loss and not self.skip:
            value = float(loss.detach())
            raise DivergedError(f"the loss of step {trainer.global_step} is not finite ({value}); {_ADVICE}")

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if not self.skip or not pl_module.automatic_optimization:
            return
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not self._bad_loss and all(_is_finite(p.grad) for p in held):
            return
        self.skipped += 1
        if self.skipped > self.skip:
            raise DivergedError(
                f"{self.skipped} steps had a loss or gradient that is not finite, and skip={self.skip} may be left "
                f"out; {_ADVICE}"
            )
        for parameter in held:  # an optimizer leaves out what has no gradient
            parameter.grad = None
        buffers = dict(pl_module.named_buffers())
        for name, value in self._held.items():  # running statistics have met the bad batch
            buffers[name].copy_(value)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Log how many steps were left out so far."""
        if self.skip and pl_module.automatic_optimization and not trainer.barebones:
            pl_module.log("train/skipped", float(self.skipped), batch_size=1)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how many steps were left out."""
        if self.skipped and trainer.is_global_zero:
            log.warning("%d steps were left out: their loss or gradient was not finite", self.skipped)

    def _hold(self, trainer: L.Trainer, module: nn.Module) -> None:
        """Keep the buffers as they are before a step of the optimizer."""
        self._held_at = trainer.global_step
        if self.skip:
            self._held = {name: value.clone() for name, value in module.named_buffers()}

    def _look(self, trainer: L.Trainer, module: nn.Module) -> None:
        state = _state(module)
        bad = [name for name in self._watched if name in state and not _is_finite(state[name])]
        if bad:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise DivergedError(
                f"the model has diverged: {bad[0]}{more} is not finite after step {trainer.global_step}; {_ADVICE}"
            )


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers of floating point; metrics keep no buffers."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value for name, value in named.items() if value.is_floating_point()}


def _is_finite(value: Tensor | None) -> bool:
    if value is None:
        return True
    value = value.detach()
    value = value._values() if value.is_sparse else value
    # The sum of a tensor with anything that is not finite is not finite; large finite ones may overflow.
    return bool(value.sum().isfinite()) or bool(torch.isfinite(value).all())
