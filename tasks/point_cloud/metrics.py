# SPDX-License-Identifier: Apache-2.0
"""Intersection over union from confusion counts, for voxels and for the raw points behind them. C classes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from tasks.point_cloud.data.labels import IGNORE

SCORES = ("miou", "miou_all", "macc", "allacc")


def confusion(pred_N: Tensor, target_N: Tensor, num_classes: int) -> Tensor:
    """Count (target, prediction) pairs of labelled points.

    Args:
        pred_N: int64 class indices in [0, C).
        target_N: int64 class indices in [0, C); -1 is not counted.
        num_classes: C.

    Returns:
        int64 [C, C], rows are targets.

    Raises:
        ValueError: a target or a prediction (of a labelled point) is no class: as one number the pair would be counted
            for another class.
    """
    keep = target_N != IGNORE
    target, pred = target_N[keep], pred_N[keep]
    for what, found in (("target", target), ("prediction", pred)):
        wrong = (found < 0) | (found >= num_classes)
        if wrong.any():
            raise ValueError(
                f"{int(wrong.sum())} of {len(found)} points have a {what} outside the {num_classes} classes, such as "
                f"{int(found[wrong][0])}; allowed are 0 to {num_classes - 1}"
                + (f", and {IGNORE} for no label" if what == "target" else "")
            )
    pairs = target * num_classes + pred
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def scores(counts_CC: Tensor) -> dict[str, Tensor]:
    """The usual scores of a confusion matrix, in [0, 1].

    IoU_c = I_c / U_c with I the diagonal and U = targets + predictions - I. In ``miou_all`` a class that is neither a
    target nor predicted has IoU 0, as in the public code.

    Args:
        counts_CC: counts, rows are targets.

    Returns:
        ``miou`` mean IoU over the classes present among the targets (the headline), ``miou_all`` mean over all classes
        of the label set (an absent class counts 0), ``macc`` mean recall over present classes, ``allacc`` share of
        points labelled right; float64 scalars, all NaN when nothing is labelled.

    Source: Pointcept/Pointcept ``pointcept/utils/misc.py`` and ``engines/test.py`` (which print means over all
        classes).
    """
    counts = counts_CC.double()
    hit, target, pred = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    iou = hit / (target + pred - hit).clamp(min=1)
    recall = hit / target.clamp(min=1)
    present = (target > 0).double()
    num_present = present.sum()  # without a label 0 / 0, which is NaN
    return {
        "miou": (iou * present).sum() / num_present,
        "miou_all": iou.mean().where(num_present > 0, torch.nan),
        "macc": (recall * present).sum() / num_present,
        "allacc": hit.sum() / target.sum(),
    }


class SegmentationScore(Metric):
    """One score of one domain from counts summed over its scans.

    Args:
        num_classes: C, classes of the domain's label set.
        score: one of the keys of `scores`.
        at: score the raw ``points`` (each takes the answer of its voxel) or the ``voxels``.

    Shape:
        update(pred [N], target [N], raw_pred [R], raw_target [R]), all int64, targets -1 ignored; compute() -> scalar
        in [0, 1], NaN where nothing is labelled.

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

    @override
    def update(self, pred_N: Tensor, target_N: Tensor, raw_pred_R: Tensor, raw_target_R: Tensor) -> None:
        pair = (raw_pred_R, raw_target_R) if self.at == "points" else (pred_N, target_N)
        self.counts += confusion(*pair, self.num_classes)

    @override
    def compute(self) -> Tensor:
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


def scan_parts(pred_N: Tensor, target_N: Tensor, scan_N: Tensor, num_scans: int, num_classes: int) -> Tensor:
    """What each scan adds to ``miou``: int64 [num_scans, C, 3] of intersection, union and targets of every class.

    Args:
        pred_N: int64 class indices.
        target_N: int64 class indices, -1 ignored.
        scan_N: int64 scan of each point.
        num_scans: B.
        num_classes: C.
    """
    parts = []
    for scan in range(num_scans):
        own = scan_N == scan
        counts = confusion(pred_N[own], target_N[own], num_classes)
        hit, target, pred = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        parts.append(torch.stack([hit, target + pred - hit, target], dim=1))
    return torch.stack(parts)
