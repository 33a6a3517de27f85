# SPDX-License-Identifier: Apache-2.0
"""Scores of a domain against scikit-learn, numpy and counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from moeapps.training.scores import ScoreRow, ScoreTable
from tasks.adaptation.metrics import ClassScores, ValueScores
from tasks.adaptation.report.domains import worst


def logits(num: int, classes: int, seed: int) -> torch.Tensor:
    return torch.randn(num, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("present", [[0, 1, 2, 3, 4], [1, 3]])
def test_scores_of_classes_are_those_of_scikit_learn(present: list[int]) -> None:
    after, before = logits(40, 5, 0), logits(40, 5, 1)
    label = torch.tensor(present)[torch.arange(40) % len(present)]
    scores = ClassScores(5)
    for rows in (slice(0, 13), slice(13, 40)):
        scores.update(after[rows], before[rows], label[rows])
    scores.update(after[:3], before[:3], torch.full((3,), -1))  # unknown labels count nowhere

    found = {name: float(value) for name, value in scores.compute().items()}

    accuracy, plain = (accuracy_score(label, said.argmax(1)) for said in (after, before))
    macro = f1_score(label, after.argmax(1), labels=present, average="macro", zero_division=0)
    expected = {"accuracy": accuracy, "accuracy_before": plain, "gain": accuracy - plain, "macro_f1": macro}
    assert found == pytest.approx(expected, abs=1e-9)


def test_no_label_has_no_score() -> None:
    scores = ClassScores(3)
    scores.update(logits(2, 3, 0), logits(2, 3, 1), torch.tensor([-1, -1]))
    assert math.isnan(float(scores.compute()["accuracy"]))


def test_r_of_measured_values_is_numpys() -> None:
    after, before, value = logits(30, 1, 0), logits(30, 1, 1), logits(30, 1, 2)[:, 0]
    value[4] = torch.nan
    scores = ValueScores()
    for rows in (slice(0, 11), slice(11, 30)):
        scores.update(after[rows], before[rows], value[rows])

    known = ~value.isnan()
    r = [np.corrcoef(said[known, 0], value[known])[0, 1] for said in (after, before)]
    found = {name: float(score) for name, score in scores.compute().items()}
    assert found == pytest.approx({"pearson": r[0], "pearson_before": r[1], "gain": r[0] - r[1]}, abs=1e-5)
    scores.reset()
    scores.update(after, before, after[:, 0])
    assert float(scores.compute()["pearson"]) == pytest.approx(1.0, abs=1e-6)


def r_by_hand(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    both = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    squares = [math.fsum((v - m) ** 2 for v in values) for values, m in ((x, mean_x), (y, mean_y))]
    return both / math.sqrt(squares[0] * squares[1])


@pytest.mark.parametrize("size", [1, 7, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_r_beside_a_large_mean_and_in_half_precision_is_a_sum_by_hand(dtype: torch.dtype, size: int) -> None:
    value = logits(200, 1, 0)[:, 0]
    told = (0.3 * value + logits(200, 1, 1)[:, 0]).unsqueeze(1)
    told = told * 0.05 + 4000 if dtype == torch.float32 else told.to(dtype)
    scores = ValueScores()
    for rows in torch.arange(200).split(size):
        scores.update(told[rows], -told[rows], value[rows])

    r = r_by_hand(told[:, 0].double().tolist(), value.double().tolist())
    found = scores.compute()
    assert float(found["pearson"]) == pytest.approx(r, rel=1e-9)
    assert float(found["gain"]) == pytest.approx(2 * r, rel=1e-9)


@pytest.mark.parametrize("told", [-0.09216339, -1.8883489, -7.5567093, 1e-3, 0.1])
def test_a_prediction_that_is_always_the_same_has_no_r(told: float) -> None:
    """A float32 mean that is updated batch by batch wanders, and its spread would be one of the predictions."""
    scores = ValueScores()
    for part in range(15):
        value = logits(16, 1, part)[:, 0]
        scores.update(torch.full((16, 1), told), value.unsqueeze(1), value)

    found = {name: float(score) for name, score in scores.compute().items()}
    assert math.isnan(found["pearson"])
    assert math.isnan(found["gain"])
    assert found["pearson_before"] == pytest.approx(1.0, abs=1e-12)


def test_the_worst_domain_is_the_least_of_its_role() -> None:
    numbers = {"a": ("unseen", 0.7), "b": ("unseen", 0.4), "c": ("seen", 0.9), "d": ("seen", 0.95)}
    rows = [ScoreRow(name, role, "accuracy", value, 10, "max") for name, (role, value) in numbers.items()]
    rows += [ScoreRow(name, role, "loss", value, 10, "min") for name, (role, value) in numbers.items()]

    assert worst(ScoreTable(rows, {})) == {"worst_unseen": {"accuracy": 0.4}, "worst_seen": {"accuracy": 0.9}}


def test_adapters_beside_have_an_accuracy_of_their_own() -> None:
    after, before, other = logits(20, 3, 0), logits(20, 3, 1), logits(20, 3, 2)
    label = torch.arange(20) % 3
    label[5] = -1
    scores = ClassScores(3, ["tent"])
    for rows in (slice(0, 7), slice(7, 20)):
        scores.update(after[rows], before[rows], label[rows], {"tent": other[rows]})

    known = label >= 0
    expected = accuracy_score(label[known], other.argmax(1)[known])
    assert float(scores.compute()["accuracy_tent"]) == pytest.approx(expected)
    assert scores.larger_is_better["accuracy_tent"]
