# SPDX-License-Identifier: Apache-2.0
"""Intersection over union from confusion counts, for voxels and for the raw points behind them. C classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from tasks.point_cloud.losses import IGNORE


def confusion(pred_N: Tensor, target_N: Tensor, num_classes: int) -> Tensor:
    """Count (target, prediction) pairs of labelled points.

    Args:
        pred_N: int64 class indices in [0, C).
        target_N: int64 class indices in [0, C); -1 is not counted.
        num_classes: C.

    Returns:
        int64 [C, C], rows are targets.
    """
    keep = target_N != IGNORE
    pairs = target_N[keep] * num_classes + pred_N[keep]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def scores(counts_CC: Tensor) -> dict[str, Tensor]:
    """The usual scores of a confusion matrix, in [0, 1].

    IoU_c = I_c / U_c with I the diagonal and U = targets + predictions - I. A class that is neither a target nor
    predicted has IoU 0 here, as in the public code.

    Args:
        counts_CC: counts, rows are targets.

    Returns:
        ``miou`` mean IoU over the classes present among the targets (the headline), ``miou_all`` mean over all classes
        of the label set (an absent class counts 0), ``macc`` mean recall over present classes, ``allacc`` share of
        points labelled right; float64 scalars, 0 when nothing is labelled.

    Source: Pointcept/Pointcept ``pointcept/utils/misc.py`` and ``engines/test.py`` (which print means over all
        classes).
    """
    counts = counts_CC.double()
    hit, target, pred = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    iou = hit / (target + pred - hit).clamp(min=1)
    recall = hit / target.clamp(min=1)
    present = (target > 0).double()
    num_present = present.sum().clamp(min=1)
    return {
        "miou": (iou * present).sum() / num_present,
        "miou_all": iou.mean(),
        "macc": (recall * present).sum() / num_present,
        "allacc": hit.sum() / target.sum().clamp(min=1),
    }


class PointScores(Metric):
    """Scores of one domain, summed over its scans: at the raw points (headline) and at the voxels (``voxel_...``).

    Args:
        num_classes: C, classes of the domain's label set.

    Shape:
        update(pred [N], target [N], raw_pred [R], raw_target [R]), all int64, targets -1 ignored; compute() -> the
        scores of `scores`, plain for raw points and with prefix ``voxel_`` for voxels.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    voxels: Tensor
    points: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: a label set has at least one class")
        self.num_classes = num_classes
        for name in ("voxels", "points"):
            self.add_state(name, torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred_N: Tensor, target_N: Tensor, raw_pred_R: Tensor, raw_target_R: Tensor) -> None:
        """Count one batch of scans of the domain."""
        self.voxels += confusion(pred_N, target_N, self.num_classes)
        self.points += confusion(raw_pred_R, raw_target_R, self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Scores over everything counted since the last reset."""
        voxel = {f"voxel_{name}": value for name, value in scores(self.voxels).items()}
        return {**scores(self.points), **voxel}

    def per_class(self) -> dict[str, Tensor]:
        """``iou`` and ``recall`` of each class at the raw points, NaN for classes without targets: float64 [C]."""
        counts = self.points.double()
        hit, target, pred = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        absent = target == 0
        return {
            "iou": (hit / (target + pred - hit)).masked_fill(absent, torch.nan),
            "recall": (hit / target).masked_fill(absent, torch.nan),
        }
