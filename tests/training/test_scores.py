# SPDX-License-Identifier: Apache-2.0
"""Scores per domain and the means made of them."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics import MeanMetric, MetricCollection

from moeapps.training.scores import DomainScores, ScoreRow, ScoreTable


class Error(MeanMetric):
    higher_is_better = False


def metrics(domain: str) -> MetricCollection:
    return MetricCollection({"error": Error()})


def table() -> ScoreTable:
    scores = DomainScores({"a": "seen", "b": "seen", "v": "validation", "u": "unseen"}, metrics)
    for domain, values in (("a", [1.0, 3.0]), ("b", [4.0]), ("v", [5.0]), ("u", [8.0])):
        for value in values:
            x = torch.tensor(value)
            scores.update(domain, x, 2, (x,), {"error": torch.tensor([value, value + 1])})
    return scores.compute(["a", "b", "v", "u"])


def test_means_are_over_domains_not_over_items() -> None:
    summary = table().summary()

    assert summary["seen"]["error"] == pytest.approx((2.0 + 4.0) / 2)
    assert summary["unseen"]["error"] == 8.0


def test_gap_is_positive_where_unseen_domains_are_worse() -> None:
    assert table().summary()["gap"] == {"loss": pytest.approx(5.0), "error": pytest.approx(5.0)}
    up = [ScoreRow("a", "seen", "acc", 0.9, 1, "max"), ScoreRow("u", "unseen", "acc", 0.6, 1, "max")]
    assert ScoreTable(up, {}).summary()["gap"]["acc"] == pytest.approx(0.3)


def test_items_are_counted_and_units_kept() -> None:
    found = table()

    assert {score.domain: score.n for score in found.scores} == {"a": 4, "b": 2, "v": 2, "u": 2}
    assert found.units["a"]["error"] == [1.0, 2.0, 3.0, 4.0]


def test_keys_are_stage_domain_metric() -> None:
    keys = table().keys("test")

    assert {"test/a/error", "test/u/loss", "test/seen/error", "test/validation/error", "test/gap/error"} <= set(keys)


def test_a_metric_that_is_not_a_number_is_left_out_of_the_mean() -> None:
    scores = [ScoreRow("a", "seen", "acc", math.nan, 1, "max"), ScoreRow("b", "seen", "acc", 0.5, 1, "max")]

    assert ScoreTable(scores, {}).summary()["seen"]["acc"] == 0.5


def test_loss_is_weighed_by_batch_size() -> None:
    scores = DomainScores({"a": "seen"}, lambda domain: MetricCollection({}))
    scores.update("a", torch.tensor(1.0), 3, (), {})
    scores.update("a", torch.tensor(5.0), 1, (), {})

    assert scores.compute(["a"]).scores[0].value == pytest.approx(2.0)
    scores.reset()
    scores.update("a", torch.tensor(7.0), 1, (), {})
    assert scores.compute(["a"]).scores[0].value == 7.0


def test_an_evaluation_forgets_the_one_before() -> None:
    scores = DomainScores({"a": "seen"}, metrics)
    for value in (3.0, 8.0):
        scores.reset()
        scores.update("a", torch.tensor(value), 2, (torch.tensor(value),), {"error": torch.tensor([value])})
        found = scores.compute(["a"])
        assert {score.metric: (score.value, score.n) for score in found.scores} == {
            "loss": (value, 2),
            "error": (value, 2),
        }
        assert found.units == {"a": {"error": [value]}}


def test_items_without_a_label_do_not_weigh_in_the_loss() -> None:
    scores = DomainScores({"a": "seen", "b": "seen"}, lambda domain: MetricCollection({}))
    scores.update("a", torch.tensor(1.0), 4, (), {}, weight=3)
    scores.update("a", torch.tensor(math.nan), 6, (), {}, weight=0)
    scores.update("a", torch.tensor(5.0), 2, (), {}, weight=1)
    scores.update("b", torch.tensor(math.nan), 6, (), {}, weight=0)

    table = scores.compute(["a", "b"])

    assert table.scores[0].value == pytest.approx((3 * 1 + 5) / 4)
    assert table.scores[0].n == 12
    assert math.isnan(table.scores[1].value)
    assert table.summary()["seen"]["loss"] == pytest.approx(2.0)
    assert table.scorable == {"a": 4, "b": 0}


def test_parts_of_a_unit_are_summed_whatever_batch_they_come_in() -> None:
    scores = DomainScores({"a": "seen"}, lambda domain: MetricCollection({}))
    rows = torch.arange(24.0).reshape(4, 2, 3)
    for unit, part in (([2**32 - 1, 5], rows[:2]), ([5, 2**16], rows[2:])):
        scores.update("a", torch.tensor(0.0), 2, (), {}, parts={"x": (torch.tensor(unit), part)})

    found = scores.compute(["a"]).parts["a"]["x"]

    assert found == [(rows[1] + rows[2]).tolist(), rows[3].tolist(), rows[0].tolist()]


def test_a_metric_called_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="another name"):
        DomainScores({"a": "seen"}, lambda domain: MetricCollection({"loss": MeanMetric()}))
