# SPDX-License-Identifier: Apache-2.0
"""The callback that fits gates: when it does, on which process, and how the others get the gate."""

from __future__ import annotations

import copy
from typing import Any, cast

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from moeapps.moe import FittedRouter, LowestLoss, MLPExperts, MoELayer, Router, TableScore, TopK
from moeapps.training.callbacks import RouterFit
from tasks.dynamics.nets.partition import RobustKMeans

N, D, E = 12, 4, 3


class Task(L.LightningModule):
    """One layer and what its router is fitted to."""

    def __init__(self, router: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = MoELayer(cast(Any, router or FittedRouter(D, E, LowestLoss())), MLPExperts(E, D, 2))
        self.asked: list[bool] = []

    def routing_losses(self, layer: str, *, needed: bool) -> tuple[Tensor, Tensor | None]:
        assert layer == "layer"
        self.asked.append(needed)
        torch.manual_seed(len(self.asked))
        return torch.randn(N, D), torch.rand(N, E) if needed else None


class Strategy:
    """Hands on what process 0 gave last."""

    def __init__(self) -> None:
        self.sent: Any = None

    def broadcast(self, state: Any) -> Any:
        if self.sent is None:
            self.sent = copy.deepcopy(state)
        return self.sent


class Machine:
    """One process of a run."""

    def __init__(self, strategy: Strategy, rank: int = 0, world_size: int = 1) -> None:
        self.strategy, self.is_global_zero, self.world_size = strategy, rank == 0, world_size


def steps(callback: RouterFit, machine: Machine, task: Task, count: int) -> None:
    callback.on_train_start(cast(Any, machine), task)
    for i in range(count):
        callback.on_train_batch_end(cast(Any, machine), task, None, None, i)


def test_it_fits_every_few_steps_and_goes_on_counting_after_a_checkpoint() -> None:
    task, callback = Task(), RouterFit(every=3)
    steps(callback, Machine(Strategy()), task, 5)
    assert len(task.asked) == 1
    resumed = RouterFit(every=3)
    resumed.load_state_dict(callback.state_dict())
    steps(resumed, Machine(Strategy()), task, 1)
    assert len(task.asked) == 2


def test_process_0_fits_and_the_others_receive_its_gate_and_partition() -> None:
    strategy, first, second = Strategy(), Task(), Task()
    steps(RouterFit(), Machine(strategy, 0, 2), first, 1)
    steps(RouterFit(), Machine(strategy, 1, 2), second, 1)

    assert (len(first.asked), len(second.asked)) == (1, 0)
    ours, theirs = first.layer.router.state_dict(), second.layer.router.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(theirs["partition.labels"]) == N


def test_a_frozen_partition_asks_for_no_losses_but_the_gate_follows_the_features() -> None:
    task = Task(FittedRouter(D, E, RobustKMeans(freeze_after=1)))
    partition = cast(RobustKMeans, task.layer.router.partition)
    partition.labels, partition.same_calls = torch.arange(N) % E, torch.tensor(1)
    before = task.layer.router.score.weight.clone()
    steps(RouterFit(), Machine(Strategy()), task, 1)

    assert task.asked == [False]
    assert torch.equal(partition.labels, torch.arange(N) % E)
    assert not torch.equal(task.layer.router.score.weight, before)


def test_wrong_use_is_told() -> None:
    with pytest.raises(ValueError, match="every=0"):
        RouterFit(every=0)
    other = Task(Router(TableScore(torch.eye(E)), TopK(1, weighing="ones")))
    with pytest.raises(ValueError, match="finds no layer like"):
        RouterFit().on_train_start(cast(Any, Machine(Strategy())), other)
    bare = L.LightningModule()
    bare.layer = Task().layer
    with pytest.raises(ValueError, match=r"needs LightningModule\.routing_losses"):
        RouterFit().on_train_start(cast(Any, Machine(Strategy())), bare)
