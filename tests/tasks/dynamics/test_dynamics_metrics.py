# SPDX-License-Identifier: Apache-2.0
"""Metrics of trajectories by hand, of partitions against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix

from tasks.dynamics.data.source import increment_scale
from tasks.dynamics.metrics import (
    ReconstructedShare,
    TrajectoryScore,
    adjusted_rand_index,
    environment_errors,
    merged,
    purity,
    trajectory_metrics,
)


def test_errors_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    truth, pred = rng.normal(size=(3, 4, 5, 2)), rng.normal(size=(3, 4, 5, 2))
    scored = rng.random((3, 4, 5)) < 0.6
    truth[0, 0, 0] = 0.0  # the floor of 1e-6 is reached

    found = environment_errors(torch.tensor(pred), torch.tensor(truth), torch.tensor(scored))

    for e in range(3):
        squares, relative = [], []
        for n in range(4):
            for t in range(5):
                if scored[e, n, t]:
                    difference = pred[e, n, t] - truth[e, n, t]
                    squares.append((difference**2).mean())
                    relative.append((difference**2).sum() / (np.maximum(np.abs(truth[e, n, t]), 1e-6) ** 2).sum())
        assert float(found["mse"][e]) == pytest.approx(np.mean(squares))
        assert float(found["relative_mse"][e]) == pytest.approx(np.mean(relative))


def test_scale_of_the_states_cancels_in_the_relative_error() -> None:
    truth, pred = torch.rand(2, 3, 4, 2) + 1, torch.rand(2, 3, 4, 2)
    one, ten = environment_errors(pred, truth), environment_errors(10 * pred, 10 * truth)

    torch.testing.assert_close(ten["relative_mse"], one["relative_mse"])
    torch.testing.assert_close(ten["mse"], 100 * one["mse"])


def test_every_environment_counts_once_however_many_samples_it_has() -> None:
    pred = torch.zeros(2, 1, 4, 1)
    truth = torch.stack([torch.full((1, 4, 1), 1.0), torch.full((1, 4, 1), 3.0)])
    scored = torch.tensor([[[True] * 4], [[True, False, False, False]]])
    metric = TrajectoryScore("mse")
    metric.update(pred, truth, scored)

    assert float(metric.compute()) == pytest.approx((1 + 9) / 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_trajectory_is_infinitely_wrong_and_counted(bad: float) -> None:
    truth = torch.ones(2, 4, 3, 1)
    pred = truth.clone()
    pred[1, 2, 2] = bad
    metrics = trajectory_metrics()
    metrics.update(pred, truth, None)
    found = metrics.compute()

    assert math.isinf(found["mse"])
    assert float(found["diverged"]) == pytest.approx(1 / 8)
    assert float(found["reconstructed"]) == 0.5


def test_a_value_that_is_not_scored_cannot_spoil_a_score() -> None:
    truth, scored = torch.ones(1, 1, 3, 1), torch.tensor([[[True, True, False]]])
    pred = truth.clone()
    pred[0, 0, 2] = math.nan
    errors = environment_errors(pred, truth, scored)

    assert [float(errors[name][0]) for name in ("mse", "relative_mse", "diverged")] == [0, 0, 0]


def test_median_and_share_over_batches() -> None:
    median, share = TrajectoryScore("relative_mse", "median"), ReconstructedShare(0.1)
    for offsets in ([0.0, 0.2], [1.0, 0.5]):
        truth = torch.ones(2, 1, 1, 1)
        for metric in (median, share):
            metric.update(truth + torch.tensor(offsets).view(2, 1, 1, 1), truth)

    assert float(median.compute()) == pytest.approx((0.04 + 0.25) / 2)
    assert float(share.compute()) == 0.5


def test_a_domain_without_a_scored_sample_has_no_score() -> None:
    metrics = trajectory_metrics()
    metrics.update(torch.ones(1, 1, 2, 1), torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, dtype=torch.bool))

    assert all(math.isnan(value) for value in metrics.compute().values())


def test_a_trajectory_without_a_scored_sample_is_none_of_those_that_may_diverge() -> None:
    pred, truth = torch.ones(1, 4, 3, 1), torch.ones(1, 4, 3, 1)
    scored = torch.ones(1, 4, 3, dtype=torch.bool)
    pred[0, 0], scored[0, 2:] = torch.inf, False

    assert environment_errors(pred, truth, scored)["diverged"].tolist() == [1 / 2]


def test_an_environment_with_nothing_to_learn_from_is_refused() -> None:
    x = np.zeros((2, 1, 4, 1))
    x[1, 0] = [[1.0], [np.nan], [3.0], [np.nan]]

    with pytest.raises(ValueError, match=r"environment 1 \(1 of 2\) has no two observed samples in a row"):
        increment_scale(x)
    x[1, 0, 3] = 5.0
    assert increment_scale(x)[1] == pytest.approx(2.0)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 1\)"):
        environment_errors(torch.zeros(2, 1, 3, 1), torch.zeros(2, 1, 4, 1))


@pytest.mark.parametrize("seed", range(20))
def test_partitions_are_scored_as_by_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    expert, family = rng.integers(0, 5, 30), rng.integers(0, 3, 30)
    table = contingency_matrix(family, expert)

    assert adjusted_rand_index(torch.tensor(expert), torch.tensor(family)) == pytest.approx(
        adjusted_rand_score(family, expert), abs=1e-6
    )
    assert purity(torch.tensor(expert), torch.tensor(family)) == pytest.approx(table.max(axis=0).sum() / 30)


def test_limits_of_partition_scores() -> None:
    family = torch.tensor([0, 0, 1, 1, 2, 2])

    assert adjusted_rand_index((family + 7) % 3, family) == 1  # names of experts do not matter
    assert purity(torch.arange(6), family) == 1
    assert adjusted_rand_index(torch.zeros(6, dtype=torch.int64), family) == pytest.approx(0, abs=1e-6)
    assert purity(torch.zeros(6, dtype=torch.int64), family) == pytest.approx(1 / 3)
    assert math.isnan(purity(family, torch.full((6,), -1)))
    assert math.isnan(adjusted_rand_index(family, torch.full((6,), -1)))


def test_a_random_gate_has_no_agreement_on_average() -> None:
    family = torch.arange(4).repeat_interleave(5)
    generator = torch.Generator().manual_seed(0)
    scores = [adjusted_rand_index(torch.randint(4, (20,), generator=generator), family) for _ in range(200)]

    assert abs(np.mean(scores)) < 0.02


def test_unknown_families_are_left_out() -> None:
    expert, family = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 0, 1, 1, -1])

    assert adjusted_rand_index(expert, family) == purity(expert, family) == 1


def test_families_that_cannot_be_told_apart_share_a_label() -> None:
    names = ["harmonic", "damped", "van_der_pol", "duffing"]
    labels = merged(torch.tensor([0, 1, 2, 3, -1]), names, [{"duffing", "van_der_pol", "absent"}])

    assert labels.tolist() == [0, 1, 2, 2, -1]
