# SPDX-License-Identifier: Apache-2.0
"""How a training begins: whether its loss rises when everything starts to move."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.training.task import BaseTask


class FirstLosses(L.Callback):
    """Keep the training losses of a run's first steps, for results.

    Into the summary of metrics/test.json, as group ``start``: ``first`` is the mean loss of the first ``window`` steps,
    ``peak`` the highest mean of so many consecutive ones, ``rise`` their difference and ``end`` the last such mean. A
    resumed run has none.

    Args:
        steps: how many are kept.
        window: how many are averaged.

    Raises:
        ValueError: a window of no step, or of more than are kept.
    """

    def __init__(self, steps: int = 64, window: int = 8) -> None:
        if not 1 <= window <= steps:
            raise ValueError(f"steps={steps}, window={window}: average 1 step or more, and no more than are kept")
        self.steps, self.window = steps, window
        self.losses: list[Tensor] = []
        self._whole = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin only where the run begins."""
        self._whole = trainer.global_step == 0

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._whole and len(self.losses) < self.steps:
            loss = cast(BaseTask, pl_module).last_loss
            self.losses += [] if loss is None else [loss.clone()]

    def describe_results(self) -> dict[str, dict[str, float]]:
        """Return the numbers for the summary of the results file."""
        if len(self.losses) < self.window:
            return {}
        means = torch.stack(self.losses).double().cpu().unfold(0, self.window, 1).mean(1)
        first, peak = float(means[0]), float(means.max())
        return {"start": {"first": first, "peak": peak, "rise": peak - first, "end": float(means[-1])}}
