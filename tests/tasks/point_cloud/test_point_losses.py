# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moeapps.evaluation.units import pooled_score
from tasks.point_cloud.losses import lovasz_softmax, mean_over_domains, segmentation_loss
from tasks.point_cloud.metrics import (
    SegmentationScore,
    confusion,
    per_class_iou,
    scan_parts,
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


def test_loss_of_unlabelled_points_is_not_defined_and_left_out_of_the_mean_over_domains() -> None:
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 1])
    none, known = segmentation_loss(logits, torch.full((4,), -1)), segmentation_loss(logits, target)

    loss = mean_over_domains({"a": none["loss"], "b": known["loss"]})
    loss.backward()

    assert all(value.isnan() for value in none.values())
    alone = F.cross_entropy(logits, target) + lovasz_softmax(logits.softmax(1), target)
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(logits.grad, torch.autograd.grad(alone, logits)[0])
    assert mean_over_domains({"a": none["loss"]}).isnan()


def test_a_network_that_diverged_is_infinitely_wrong_and_not_left_out() -> None:
    losses = segmentation_loss(torch.full((4, 3), torch.nan), torch.tensor([0, 1, -1, 1]))

    assert all(value.isinf() for value in losses.values())
    assert mean_over_domains({"a": losses["loss"], "b": torch.tensor(1.0)}).isinf()


@pytest.mark.parametrize("name", ["miou", "miou_all", "macc", "allacc"])
def test_without_a_label_no_score_is_defined(name: str) -> None:
    metric = SegmentationScore(3, name)
    pred, none = torch.tensor([0, 1, 2]), torch.full((3,), -1)

    metric.update(pred, none, pred, none)

    assert metric.compute().isnan()


@pytest.mark.parametrize(
    ("pred", "target", "what"),
    [
        ([0, 3], [0, 1], "prediction"),
        ([0, -1], [0, 1], "prediction"),
        ([0, 1], [0, 3], "target"),
        ([0], [-2], "target"),
    ],
)
def test_what_is_no_class_is_refused_and_not_counted_for_another(pred: list[int], target: list[int], what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} outside the 3 classes"):
        confusion(torch.tensor(pred), torch.tensor(target), 3)


def test_predictions_of_unlabelled_points_may_be_anything() -> None:
    assert confusion(torch.tensor([7, 1]), torch.tensor([-1, 0]), 3).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


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


def test_parts_of_scans_give_the_score_of_each_scan_and_of_all_together() -> None:
    pred, target, scan = torch.randint(0, 4, (90,)), torch.randint(-1, 3, (90,)), torch.arange(90) // 30

    parts = scan_parts(pred, target, scan, 4, 4)

    alone = pooled_score(parts.numpy())
    for i in range(3):
        expected = scores(confusion(pred[scan == i], target[scan == i], 4))["miou"]
        assert alone[i] == pytest.approx(float(expected))
    assert np.isnan(alone[3])
    together = scores(confusion(pred, target, 4))["miou"]
    assert float(pooled_score(parts.sum(0).numpy())) == pytest.approx(float(together))


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
