# SPDX-License-Identifier: Apache-2.0
"""Intersection over union from confusion counts, for voxels and for the raw points behind them. C classes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from tasks.point_cloud.labels import IGNORE

SCORES = ("miou", "miou_all", "macc", "allacc")


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


class SegmentationScore(Metric):
    """One score of one domain from counts summed over its scans.

    Args:
        num_classes: C, classes of the domain's label set.
        score: one of the keys of `scores`.
        at: score the raw ``points`` (each takes the answer of its voxel) or the ``voxels``.

    Shape:
        update(pred [N], target [N], raw_pred [R], raw_target [R]), all int64, targets -1 ignored; compute() -> scalar
        in [0, 1].

    Raises:
        ValueError: ``num_classes`` < 1 or an unknown ``score``.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(
        self, num_classes: int, score: str = "miou", at: Literal["points", "voxels"] = "points", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: a label set has at least one class")
        if score not in SCORES:
            raise ValueError(f"score={score!r}: choose from {', '.join(SCORES)}")
        self.num_classes = num_classes
        self.score = score
        self.at = at
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred_N: Tensor, target_N: Tensor, raw_pred_R: Tensor, raw_target_R: Tensor) -> None:
        """Count one batch of scans of the domain."""
        pair = (raw_pred_R, raw_target_R) if self.at == "points" else (pred_N, target_N)
        self.counts += confusion(*pair, self.num_classes)

    def compute(self) -> Tensor:
        """The score over everything counted since the last reset."""
        return scores(self.counts)[self.score]


def segmentation_metrics(num_classes: int) -> MetricCollection:
    """All scores of one domain: plain names at the raw points, ``voxel_miou`` at the voxels; two counts are kept.

    Args:
        num_classes: C, classes of the domain's label set.
    """
    points = {name: SegmentationScore(num_classes, name) for name in SCORES}
    metrics: dict[str, Metric | MetricCollection] = {
        **points,
        "voxel_miou": SegmentationScore(num_classes, at="voxels"),
    }
    return MetricCollection(metrics, compute_groups=[list(points), ["voxel_miou"]])


def per_class_iou(counts_CC: Tensor) -> Tensor:
    """IoU of each class, NaN for classes without targets: float64 [C]."""
    counts = counts_CC.double()
    hit, target, pred = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    return (hit / (target + pred - hit)).masked_fill(target == 0, torch.nan)


def scan_iou(pred_N: Tensor, target_N: Tensor, scan_N: Tensor, num_scans: int, num_classes: int) -> Tensor:
    """``miou`` over present classes of each scan alone: float64 [num_scans], NaN where a scan has no label.

    Args:
        pred_N: int64 class indices.
        target_N: int64 class indices, -1 ignored.
        scan_N: int64 scan of each point.
        num_scans: B.
        num_classes: C.
    """
    values = []
    for scan in range(num_scans):
        own = scan_N == scan
        values.append(per_class_iou(confusion(pred_N[own], target_N[own], num_classes)).nanmean())
    return torch.stack(values)
