# SPDX-License-Identifier: Apache-2.0
"""Parts of the paired validation loss: with and without the label, and by noise level."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

TIME_BINS = 10
"""Equal slices of t in [0, 1]."""


PARTS = ("conditional", "null", *(f"t{i}" for i in range(TIME_BINS)))


class PairedLoss(Metric):
    """Means of the loss per image: ``conditional``, ``null`` and, with the label, ``t0`` (data) to ``t9`` (noise)."""

    full_state_update = False
    higher_is_better = False
    sums: Tensor
    counts: Tensor
    larger_is_better: ClassVar[dict[str, bool]] = dict.fromkeys(PARTS, False)

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2, TIME_BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(TIME_BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, conditional_B: Tensor, null_B: Tensor, t_B: Tensor) -> None:
        """Add images: their two losses and their times."""
        slice_B = (t_B * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        both = torch.stack([conditional_B, null_B]).detach().to(self.sums.dtype)
        self.sums.index_add_(1, slice_B, both)
        self.counts += torch.bincount(slice_B, minlength=TIME_BINS)

    def compute(self) -> dict[str, Tensor]:
        """Return the means; a slice without images is not a number."""
        total = self.counts.sum()
        means = torch.cat([self.sums.sum(1) / total, self.sums[0] / self.counts])
        return dict(zip(PARTS, means.unbind(), strict=True))


def paired_metrics() -> MetricCollection:
    """Metrics of one domain."""
    return MetricCollection({"paired": PairedLoss()})
