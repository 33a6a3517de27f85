# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tasks.point_cloud.losses import lovasz_softmax, mean_over_domains, segmentation_loss
from tasks.point_cloud.metrics import (
    SegmentationScore,
    confusion,
    per_class_iou,
    scan_iou,
    scores,
    segmentation_metrics,
)


def test_lovasz_of_hard_predictions_is_one_minus_iou_averaged_over_present_classes() -> None:
    target, pred = torch.randint(0, 4, (200,)), torch.randint(0, 5, (200,))

    loss = lovasz_softmax(F.one_hot(pred, 5).double(), target)

    iou = [((pred == c) & (target == c)).sum() / ((pred == c) | (target == c)).sum() for c in range(4)]
    torch.testing.assert_close(loss, 1 - torch.stack(iou).double().mean(), rtol=1e-6, atol=1e-7)


def test_lovasz_of_perfect_predictions_is_zero() -> None:
    target = torch.randint(0, 3, (50,))

    assert lovasz_softmax(F.one_hot(target, 3).double(), target) == 0


def test_lovasz_gradient_is_exact_and_ignored_rows_have_none() -> None:
    target = torch.tensor([0, 1, -1, 2, 1, 0])
    probs = torch.rand(6, 3, dtype=torch.float64).softmax(1).requires_grad_()

    assert torch.autograd.gradcheck(lambda p: lovasz_softmax(p, target), (probs,))
    (grad,) = torch.autograd.grad(lovasz_softmax(probs, target), probs)
    assert grad[2].eq(0).all()


def test_loss_of_unlabelled_points_is_zero_and_differentiable() -> None:
    logits = torch.randn(4, 3, requires_grad=True)

    losses = segmentation_loss(logits, torch.full((4,), -1))
    losses["loss"].backward()

    assert all(loss == 0 for loss in losses.values())
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


def test_segmentation_loss_is_cross_entropy_plus_lovasz_and_ignores_minus_one() -> None:
    logits, target = torch.randn(30, 4, dtype=torch.float64), torch.randint(-1, 4, (30,))
    keep = target >= 0

    losses = segmentation_loss(logits, target, lovasz_weight=0.5)

    torch.testing.assert_close(losses["ce"], F.cross_entropy(logits[keep], target[keep]))
    torch.testing.assert_close(losses["loss"], losses["ce"] + 0.5 * losses["lovasz"])
    torch.testing.assert_close(losses["loss"], segmentation_loss(logits[keep], target[keep], lovasz_weight=0.5)["loss"])


def test_each_domain_weighs_the_same() -> None:
    assert mean_over_domains({"many": torch.tensor(1.0), "few": torch.tensor(3.0)}) == 2
    with pytest.raises(ValueError, match="no domain"):
        mean_over_domains({})


def test_scores_of_a_hand_made_example_with_three_classes() -> None:
    target = torch.tensor([0, 0, 0, 1, 1, -1])
    pred = torch.tensor([0, 0, 1, 1, 2, 0])

    result = scores(confusion(pred, target, 3))

    # class 0: 2 of 3; class 1: 1 of (2 + 2 - 1); class 2: never a target, predicted once
    assert result["miou"].item() == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert result["miou_all"].item() == pytest.approx((2 / 3 + 1 / 3) / 3)
    assert result["macc"].item() == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result["allacc"].item() == pytest.approx(3 / 5)


def test_metrics_are_additive_over_scans_and_ignore_unlabelled_points() -> None:
    whole, parts = segmentation_metrics(4), segmentation_metrics(4)
    voxel, raw = torch.randint(-1, 4, (2, 60)), torch.randint(-1, 4, (2, 300))
    voxel[0], raw[0] = voxel[0].clamp(min=0), raw[0].clamp(min=0)

    whole.update(*voxel, *raw)
    for v, r in zip(voxel.split(20, dim=1), raw.split(100, dim=1), strict=True):
        parts.update(*v, *r)

    assert whole.compute() == parts.compute()
    assert int(whole["miou"].counts.sum()) == int((raw[1] >= 0).sum())
    assert int(whole["voxel_miou"].counts.sum()) == int((voxel[1] >= 0).sum())


def test_metrics_agree_with_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    pred, target, raw_pred, raw_target = torch.randint(0, 5, (4, 400))
    metrics = segmentation_metrics(5)

    metrics.update(pred, target, raw_pred, raw_target)

    result = metrics.compute()
    assert result["miou"].item() == pytest.approx(sklearn.jaccard_score(raw_target, raw_pred, average="macro"))
    assert result["macc"].item() == pytest.approx(sklearn.balanced_accuracy_score(raw_target, raw_pred))
    assert result["allacc"].item() == pytest.approx(sklearn.accuracy_score(raw_target, raw_pred))
    assert result["voxel_miou"].item() == pytest.approx(sklearn.jaccard_score(target, pred, average="macro"))


def test_iou_per_class_is_nan_for_absent_classes() -> None:
    iou = per_class_iou(confusion(torch.tensor([0, 1]), torch.tensor([0, 0]), 3))

    assert iou[0] == 0.5
    assert iou.isnan().tolist() == [False, True, True]


def test_iou_per_scan_is_the_score_of_the_scan_alone() -> None:
    pred, target, scan = torch.randint(0, 4, (90,)), torch.randint(-1, 4, (90,)), torch.arange(90) // 30

    values = scan_iou(pred, target, scan, 4, 4)

    for i in range(3):
        expected = scores(confusion(pred[scan == i], target[scan == i], 4))["miou"]
        torch.testing.assert_close(values[i], expected)
    assert values[3].isnan()


def test_perfect_prediction_scores_one_although_a_class_is_absent() -> None:
    metrics = segmentation_metrics(3)
    target = torch.tensor([0, 1, 1])
    metrics.update(target, target, target, target)

    result = metrics.compute()

    assert result["miou"] == 1
    assert result["miou_all"].item() == pytest.approx(2 / 3)


def test_wrong_metrics_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one class"):
        SegmentationScore(0)
    with pytest.raises(ValueError, match="choose from"):
        SegmentationScore(3, "f1")
