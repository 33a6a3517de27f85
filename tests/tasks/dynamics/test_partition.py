# SPDX-License-Identifier: Apache-2.0
"""Partitions and the fitted router: known clusters are found, the gate is the closed form, quirks are as published."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moeapps.moe import FittedRouter, LowestLoss, Partition
from tasks.dynamics.nets.partition import (
    PublishedKMeans,
    RobustKMeans,
    cluster_costs,
    greedy_assignment,
    kmeans,
    kmeans_plus_plus,
    optimal_assignment,
    published_kmeans,
)

E, D, PER = 4, 8, 10


def blobs(spread: float = 0.05) -> tuple[Tensor, Tensor]:
    """E separated blobs along E axes, more rows than D + 1, in shuffled order."""
    truth = torch.arange(E).repeat_interleave(PER)[torch.randperm(E * PER)]
    return torch.eye(E).repeat(1, D // E)[truth] * 3 + spread * torch.randn(E * PER, D), truth


def losses_of(truth: Tensor, experts: Tensor) -> Tensor:
    """Low where the expert is the one that serves the blob."""
    return torch.rand(len(truth), E) + 5 * (torch.arange(E) != experts[truth][:, None])


@pytest.mark.parametrize("kind", [RobustKMeans, PublishedKMeans])
def test_separated_blobs_are_found_and_each_gets_the_expert_that_serves_it(kind: type[Partition]) -> None:
    features, truth = blobs()
    wanted = torch.tensor([2, 0, 3, 1])
    partition = kind()
    if isinstance(partition, PublishedKMeans):  # a random start within 1e-3 of 0 finds no blob; a warm one does
        partition.centroids, partition.has_centroids = torch.eye(E).repeat(1, D // E), torch.tensor(True)
    router = FittedRouter(D, E, partition)

    assert router.fit(features, losses_of(truth, wanted))
    assert torch.equal(partition.labels, wanted[truth])
    assert torch.equal(router(features).expert_M, wanted[truth])


def test_an_empty_cluster_abandons_the_published_update_and_forgets_the_centroids() -> None:
    router = FittedRouter(D, E, PublishedKMeans())
    before = router.score.weight.clone()
    partition = router.partition
    partition.centroids, partition.has_centroids = torch.eye(E).repeat(1, D // E) + 9, torch.tensor(True)

    assert not router.fit(blobs()[0][:6] * 0 + 1, torch.rand(6, E))
    assert torch.equal(router.score.weight, before)
    assert (int(partition.calls), int(partition.abandoned), bool(partition.has_centroids)) == (1, 1, False)


def test_converging_in_the_last_allowed_round_is_abandoned_as_published() -> None:
    points, start = torch.tensor([[0.0], [1.0], [4.0], [6.0]]), torch.tensor([[0.0], [3.0]])

    assert published_kmeans(points, start, max_rounds=3) is not None  # moves in round 1, converges in round 2
    assert published_kmeans(points, start, max_rounds=2) is None


def test_published_distance_is_absolute_and_the_update_the_mean() -> None:
    # By squared distance the first row belongs to the second centroid, by absolute distance to the first.
    points = torch.tensor([[3.0, 0.0], [0.0, 0.0], [2.0, 2.0]])
    centroids = torch.tensor([[0.0, 0.0], [2.0, 2.1]])
    absolute = published_kmeans(points, centroids)
    assert absolute is not None

    assert absolute[1].tolist() == [0, 0, 1]
    assert absolute[0].tolist() == [[1.5, 0.0], [2.0, 2.0]]
    assert kmeans(points, centroids[None])[0].tolist() == [[1, 0, 1]]


@pytest.mark.parametrize("features", [torch.zeros(6, 2), torch.tensor([[0.0, 0.0]] * 5 + [[1.0, 1.0]])])
def test_the_robust_partition_never_has_an_empty_cluster(features: Tensor) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        labels = RobustKMeans()(features, torch.rand(6, 3))
        assert labels is not None
        assert labels.unique().tolist() == [0, 1, 2]


def test_greedy_pays_101_where_the_optimum_is_3() -> None:
    costs = torch.tensor([[1.0, 2.0], [1.0, 100.0]])
    rows = torch.arange(2)

    assert costs[rows, greedy_assignment(costs)].sum() == 101
    assert costs[rows, optimal_assignment(costs)].sum() == 3


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_the_optimal_assignment_is_the_best_of_all_permutations(num: int) -> None:
    for _ in range(20):
        costs = torch.rand(num, num).double()
        found = optimal_assignment(costs)

        best = min(float(costs[range(num), list(p)].sum()) for p in itertools.permutations(range(num)))
        assert sorted(found.tolist()) == list(range(num))
        assert float(costs[torch.arange(num), found].sum()) == pytest.approx(best)


@pytest.mark.parametrize("assign", [greedy_assignment, optimal_assignment])
def test_a_dominant_diagonal_and_equal_costs_give_the_identity(assign: object) -> None:
    assert callable(assign)
    assert assign(torch.rand(5, 5) + 3 * (1 - torch.eye(5))).tolist() == list(range(5))
    assert assign(torch.ones(4, 4)).tolist() == list(range(4))


def test_cluster_costs_are_medians() -> None:
    losses = torch.tensor([[1.0, 0.0], [2.0, 0.0], [90.0, 0.0], [5.0, 1.0], [7.0, 2.0]])

    assert cluster_costs(losses, torch.tensor([0, 0, 0, 1, 1])).tolist() == [[2.0, 0.0], [6.0, 1.5]]


def test_permuting_rows_permutes_the_partition() -> None:
    features, truth = blobs()
    losses, order = losses_of(truth, torch.arange(E)), torch.randperm(len(truth))
    for kind in (RobustKMeans, LowestLoss):
        assert torch.equal(kind()(features, losses)[order], kind()(features[order], losses[order]))


def test_hysteresis_keeps_a_partition_that_a_restart_beats_by_little() -> None:
    # Four corners of a square of sides 1 and 1.02: both cuts are local optima, of nearly equal inertia.
    features = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.02, 0.0], [1.02, 1.0]])
    losses = torch.zeros(4, 2)
    for hysteresis, kept in ((0.1, True), (0.0, False)):
        partition = RobustKMeans(restarts=20, hysteresis=hysteresis)
        partition.labels = torch.tensor([0, 1, 0, 1])  # the slightly worse cut
        labels = partition(features, losses)
        assert labels is not None
        assert (labels.tolist() == [0, 1, 0, 1]) is kept


def test_a_frozen_partition_stays_and_needs_no_losses() -> None:
    features, truth = blobs()
    losses = losses_of(truth, torch.arange(E))
    partition = RobustKMeans(freeze_after=2)
    for _ in range(3):
        assert partition.needs_losses
        partition(features, losses)
    assert partition.frozen
    assert not partition.needs_losses

    assert torch.equal(partition(features.flip(0), None), truth)


def test_kmeans_plus_plus_starts_in_every_blob() -> None:
    features, _ = blobs(0.01)
    starts = kmeans_plus_plus(features, E, 16)

    assert (torch.cdist(starts, starts) + 9 * torch.eye(E) > 1).all()


def test_state_survives_a_round_trip_and_the_next_fit_is_the_same() -> None:
    features, truth = blobs()
    losses = losses_of(truth, torch.arange(E))
    published = PublishedKMeans()
    published.centroids, published.has_centroids = torch.eye(E).repeat(1, D // E), torch.tensor(True)
    for partition in (RobustKMeans(), published):
        first, second = FittedRouter(D, E, partition), FittedRouter(D, E, type(partition)())
        first.fit(features, losses)
        second.load_state_dict(first.state_dict())
        states = []
        for router in (first, second):
            torch.manual_seed(1)
            router.fit(features, losses)
            states.append(router.state_dict())
        for key, value in states[0].items():
            assert torch.equal(value, states[1][key]), key


def test_until_the_warm_up_ends_rows_in_training_go_anywhere_and_no_gate_is_fitted() -> None:
    features, truth = blobs()
    losses = losses_of(truth, torch.arange(E))
    router = FittedRouter(D, E, RobustKMeans(), warmup=3)
    unfitted = router.score.weight.clone()

    for early in (True, True, False):
        drawn = torch.stack([router(features).expert_M for _ in range(50)])
        share = torch.stack([(drawn == e).float().mean(0) for e in range(E)])
        assert share.sub(1 / E).abs().max() < 0.3  # each row meets each expert; a gate would give shares of 0 and 1
        assert torch.equal(router.eval()(features).expert_M, router(features).expert_M)  # no chance in evaluation
        router.train()
        assert router.needs_losses is not early
        assert router.fit(features, None if early else losses) is not early
        assert torch.equal(router.score.weight, unfitted) is early
    assert torch.equal(router(features).expert_M, truth)


def test_after_a_warm_up_the_gate_is_what_it_would_be_without() -> None:
    features, truth = blobs()
    gates = []
    for warmup in (0, 2):
        router = FittedRouter(D, E, RobustKMeans(), warmup=warmup)
        if warmup:
            router.fit(features)
        torch.manual_seed(1)
        router.fit(features, losses_of(truth, torch.arange(E)))
        gates.append(router.score.weight)
    assert torch.equal(*gates)


def test_a_warm_up_gives_masked_rows_no_work() -> None:
    router = FittedRouter(D, E, RobustKMeans(), warmup=9)

    routing = router(torch.randn(5, D), token_mask=torch.tensor([True, False, True, False, True]))
    assert (routing.expert_M == E).tolist() == [False, True, False, True, False]


def test_wrong_use_is_told() -> None:
    with pytest.raises(ValueError, match="3 rows cannot be divided among 4 experts"):
        RobustKMeans()(torch.zeros(3, 2), torch.zeros(3, 4))
    for kind, numbers in ((PublishedKMeans, {"max_rounds": 1}), (RobustKMeans, {"restarts": 0})):
        with pytest.raises(ValueError, match="use"):
            kind(**numbers)
