# SPDX-License-Identifier: Apache-2.0
"""Ranking and calibration against double loops, an independent library and limiting cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeapps.evaluation.statistics import bootstrap_interval
from moeapps.training.scores import DomainScores
from tasks.recommendation.metrics import (
    KINDS,
    RankingScores,
    auc,
    calibration,
    expected_calibration_error,
    gauc,
    gauc_interval,
    group_auc,
    log_loss,
    ranking_metrics,
)


def naive_gauc(score: Tensor, label: Tensor, group: Tensor, weight: str = "rows") -> float:
    """Pair by pair, from the definition."""
    total = hits = 0.0
    for g in sorted(set(group.tolist())):
        rows = [i for i in range(len(score)) if group[i] == g]
        won = pairs = 0.0
        for i, j in itertools.permutations(rows, 2):
            share = float(label[i]) * (1 - float(label[j]))
            pairs += share
            won += share * (1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0)
        if pairs > 0:
            w = {"rows": len(rows), "positives": float(label[rows].sum()), "users": 1.0}[weight]
            hits, total = hits + w * won / pairs, total + w
    return hits / total if total else math.nan


def random_rows(n: int, users: int, levels: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    score = torch.randint(0, levels, (n,), generator=g).double() / 7  # few levels: many ties
    return score, (torch.rand(n, generator=g) < 0.4).float(), torch.randint(-3, users, (n,), generator=g)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 12), st.integers(0, 999))
def test_gauc_is_the_double_loop(n: int, users: int, levels: int, seed: int) -> None:
    score, label, group = random_rows(n, users, levels, seed)

    for weight in ("rows", "positives", "users"):
        ours, naive = float(gauc(score, label, group, weight=weight)), naive_gauc(score, label, group, weight)
        assert (math.isnan(ours) and math.isnan(naive)) or abs(ours - naive) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_gauc_of_probabilities_is_the_expected_double_loop(seed: int) -> None:
    score, _, group = random_rows(40, 4, 9, seed)
    label = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    assert float(gauc(score, label, group)) == pytest.approx(naive_gauc(score, label, group), abs=1e-12)


def test_true_probabilities_give_what_many_drawn_labels_give_on_average() -> None:
    g = torch.Generator().manual_seed(0)
    p, group = torch.rand(3000, dtype=torch.float64, generator=g), torch.randint(0, 3, (3000,), generator=g)
    drawn = [float(gauc(p, torch.bernoulli(p, generator=g), group)) for _ in range(40)]

    assert float(gauc(p, p, group)) == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / math.sqrt(40))


def test_auc_is_sklearns() -> None:
    from sklearn.metrics import roc_auc_score

    score, label, _ = random_rows(500, 1, 30, 0)

    assert float(auc(score, label)) == pytest.approx(roc_auc_score(label, score), abs=1e-12)


def test_one_user_makes_gauc_auc_and_a_monotone_change_none() -> None:
    score, label, group = random_rows(200, 5, 50, 1)

    assert float(gauc(score, label, torch.zeros(200, dtype=torch.int64))) == float(auc(score, label))
    assert float(gauc(score.exp() * 3, label, group)) == float(gauc(score, label, group))
    assert float(gauc(-score, label, group)) == pytest.approx(1 - float(gauc(score, label, group)), abs=1e-12)
    assert float(gauc(score, 1 - label, group)) == pytest.approx(1 - float(gauc(score, label, group)), abs=1e-12)


def test_a_constant_per_user_changes_auc_but_not_gauc() -> None:
    score, label, group = random_rows(300, 5, 50, 2)
    shifted = score + 10 * group

    assert float(gauc(shifted, label, group)) == float(gauc(score, label, group))
    assert float(auc(shifted, label)) != float(auc(score, label))


def test_order_of_rows_does_not_matter() -> None:
    score, label, group = random_rows(300, 5, 6, 3)
    order = torch.randperm(300)

    assert float(gauc(score[order], label[order], group[order])) == pytest.approx(
        float(gauc(score, label, group)), abs=1e-14
    )


def test_masked_rows_and_users_with_one_class_do_not_count() -> None:
    score, label, group = random_rows(60, 4, 9, 4)
    mask = torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.7
    one_class = torch.full((5,), 99)

    wanted = naive_gauc(score[mask], label[mask], group[mask])
    assert float(gauc(score, label, group, mask)) == pytest.approx(wanted, abs=1e-12)
    found = group_auc(
        torch.cat([score, torch.rand(5)]), torch.cat([label, torch.ones(5)]), torch.cat([group, one_class])
    )
    assert 99 not in found.group
    torch.testing.assert_close(found.auc, group_auc(score, label, group).auc)


@pytest.mark.parametrize("label", [torch.zeros(4), torch.ones(4), torch.zeros(0)])
def test_no_user_with_both_classes_is_not_a_number(label: Tensor) -> None:
    rows = len(label)

    assert math.isnan(float(gauc(torch.rand(rows), label, torch.zeros(rows, dtype=torch.int64))))
    assert math.isnan(float(gauc(torch.rand(4), torch.tensor([0.0, 1, 0, 1]), torch.arange(4))))


def test_wrong_input_is_told() -> None:
    group = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="1 of 3 scores are not numbers"):
        gauc(torch.tensor([0.0, math.nan, 1.0]), torch.ones(3), group)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\]"):
        gauc(torch.rand(3), torch.tensor([0.0, 2.0, 1.0]), group)
    with pytest.raises(ValueError, match="all are"):
        gauc(torch.rand(3), torch.ones(2), group)
    with pytest.raises(ValueError, match="kind='mrr'"):
        RankingScores(["a"], ["mrr"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"tasks=\[\]"):
        RankingScores([])


def test_log_loss_and_calibration_from_their_formulas() -> None:
    logit, label = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 1.0, 0.0])
    p = 1 / (1 + np.exp(-logit.double().numpy()))

    assert float(log_loss(logit, label)) == pytest.approx(-(np.log(p[0]) + np.log(p[1]) + np.log(1 - p[2])) / 3)
    assert float(calibration(logit, label)) == pytest.approx(p.mean() / (2 / 3))
    assert float(log_loss(torch.tensor([200.0]), torch.zeros(1))) == pytest.approx(200.0)
    assert math.isnan(float(calibration(logit, torch.zeros(3))))
    assert math.isnan(float(log_loss(logit, label, torch.zeros(3, dtype=torch.bool))))


def test_probabilities_that_are_true_have_small_calibration_error_and_shifted_ones_a_large() -> None:
    g = torch.Generator().manual_seed(0)
    logit = torch.randn(50_000, generator=g) - 3
    label = torch.bernoulli(logit.sigmoid(), generator=g)

    assert float(expected_calibration_error(logit, label)) < 0.005
    assert float(expected_calibration_error(logit + 1, label)) > 0.05
    assert float(expected_calibration_error(torch.full((10,), 20.0), torch.zeros(10))) == pytest.approx(1.0, abs=1e-6)


def test_calibration_error_of_ties_does_not_depend_on_the_order_of_rows() -> None:
    even = torch.tensor([1.0, 0.0] * 10)
    assert float(expected_calibration_error(torch.zeros(20), even)) == pytest.approx(0.0)  # half are positive
    assert float(expected_calibration_error(torch.zeros(20), even.sort().values)) == pytest.approx(0.0)
    g = torch.Generator().manual_seed(0)
    logit, label = torch.randint(-3, 3, (500,), generator=g).float(), (torch.rand(500, generator=g) < 0.4).float()
    first = float(expected_calibration_error(logit, label))
    for order in (label.argsort(), label.argsort(descending=True), torch.randperm(500, generator=g)):
        assert float(expected_calibration_error(logit[order], label[order])) == pytest.approx(first)
    # Two scores, each a bin of its own: by hand 0.5 |p(1) - 0.7| + 0.5 |p(-1) - 0.2|.
    scores = torch.tensor([1.0, -1.0]).repeat_interleave(10)
    labels = torch.tensor([1.0] * 7 + [0.0] * 3 + [1.0] * 2 + [0.0] * 8)
    p = 1 / (1 + math.exp(-1))
    wanted = 0.5 * abs(p - 0.7) + 0.5 * abs(1 - p - 0.2)
    assert float(expected_calibration_error(scores, labels, bins=2)) == pytest.approx(wanted)


def batches() -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    made = []
    for n in (30, 1, 47):
        oracle = torch.rand(n, 3, generator=g)
        label = torch.bernoulli(oracle, generator=g)
        label[:, 2] = 0  # a task without positives
        mask = torch.rand(n, 3, generator=g) < 0.8
        made.append(
            (torch.randn(n, 3, generator=g), label * mask, mask, torch.randint(0, 4, (n,), generator=g), oracle)
        )
    return made


def test_collection_scores_the_whole_epoch_per_task_and_as_the_mean_over_defined_tasks() -> None:
    metrics = ranking_metrics(["a", "b", "never"], KINDS)
    for batch in batches():
        metrics.update(*batch)
    values = {name: float(value) for name, value in metrics.compute().items()}

    logit, label, mask, user, oracle = (torch.cat(column) for column in zip(*batches(), strict=True))
    for t, name in enumerate(["a", "b"]):
        assert values[f"gauc_{name}"] == pytest.approx(float(gauc(logit[:, t], label[:, t], user, mask[:, t])))
        assert values[f"gauc_expected_{name}"] == pytest.approx(
            float(gauc(logit[:, t], oracle[:, t], user, mask[:, t]))
        )
        assert values[f"calibration_{name}"] == pytest.approx(
            abs(float(calibration(logit[:, t], label[:, t], mask[:, t])) - 1)
        )
    assert math.isnan(values["gauc_never"])
    assert values["gauc"] == pytest.approx((values["gauc_a"] + values["gauc_b"]) / 2)
    assert values["logloss"] == pytest.approx(sum(values[f"logloss_{name}"] for name in ("a", "b", "never")) / 3)
    better = next(iter(metrics.values())).larger_is_better
    assert set(better) == set(values)
    assert {name for name, larger in better.items() if larger} == {n for n in values if n[:2] == "ga" or n[:3] == "auc"}


def test_table_of_a_run_knows_which_way_each_score_is_better() -> None:
    scores = DomainScores({"d": "seen"}, lambda domain: ranking_metrics(["a", "b", "never"]))
    for batch in batches():
        scores.update("d", torch.tensor(1.0), len(batch[0]), batch, {})

    directions = {score.metric: score.direction for score in scores.compute(["d"]).scores}
    assert directions["gauc"] == directions["auc_a"] == "max"
    assert directions["logloss"] == directions["calibration_b"] == "min"


def test_scores_against_true_probabilities_are_left_out_where_nobody_knows_them() -> None:
    metrics = ranking_metrics(["a", "b", "c"])
    metrics.update(*batches()[0][:4])

    assert not [name for name in metrics.compute() if name.startswith("gauc_expected")]


def test_reset_forgets_and_nothing_seen_is_not_a_number() -> None:
    metrics = ranking_metrics(["a", "b", "c"])
    metrics.update(*batches()[0])
    metrics.reset()

    with pytest.warns(UserWarning, match="compute"):
        assert all(math.isnan(value) for value in metrics.compute().values())


def test_interval_is_the_bootstrap_over_users() -> None:
    g = torch.Generator().manual_seed(1)
    user = torch.randint(0, 40, (4000,), generator=g)
    score, label = torch.randn(4000, generator=g), (torch.rand(4000, generator=g) < 0.3).float()

    ours = gauc_interval(score, label, user, resamples=300, seed=5)

    found = group_auc(score, label, user)
    units = np.stack([found.rows.numpy(), (found.rows * found.auc).numpy()], 1)
    direct = bootstrap_interval(units, lambda u: float(u[:, 1].sum() / u[:, 0].sum()), resamples=300, seed=5)
    assert ours.mean == pytest.approx(float(gauc(score, label, user)), abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx((direct.low, direct.high), abs=1e-12)


def test_interval_of_many_tasks_is_of_their_mean_and_needs_two_users() -> None:
    logit, label, mask, user, _ = (torch.cat(column) for column in zip(*batches(), strict=True))
    interval = gauc_interval(logit, label, user, mask, resamples=200)

    values = [float(gauc(logit[:, t], label[:, t], user, mask[:, t])) for t in range(2)]
    assert interval.mean == pytest.approx(np.mean(values))
    assert interval.low < interval.mean < interval.high
    with pytest.raises(ValueError, match="at least two units"):
        gauc_interval(logit, label, torch.zeros_like(user), mask)
