# SPDX-License-Identifier: Apache-2.0
"""Counted parameters and FLOPs equal what arithmetic says."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from moeapps.moe import GLUExperts, LinearScore, MLPExperts, MoELayer, Router, TopK
from moeapps.moe.presets import dense, linear, point_moe
from moeapps.training.cost import measure_cost
from tests.toy import ToyData, ToyNet, ToyTask

WIDTH = 8


def task(moe: Any) -> ToyTask:
    return ToyTask(net=ToyNet(moe, width=WIDTH), facts=ToyData().facts)


def plain_flops(rows: int) -> int:
    return rows * 2 * (2 * WIDTH + WIDTH * 2)  # first and last linear layer


@pytest.mark.parametrize("backend", ["loop", "segments", "grouped_mm", "onehot"])
@pytest.mark.parametrize("bank", [partial(GLUExperts, 4, WIDTH, 16), partial(MLPExperts, 4, WIDTH, 16)])
def test_counted_flops_are_the_analytic_ones_whatever_the_backend(backend: str, bank: Any) -> None:
    def layer(dim: int) -> MoELayer:
        return MoELayer(Router(LinearScore(dim, 4), TopK(2)), bank(), backend=backend)

    batch = ToyData().example_batch(6)
    cost = measure_cost(task(layer), batch)

    runs = 4 if backend == "onehot" else 2  # the one-hot form sends all rows through all experts
    experts = 6 * runs * bank().flops_per_row
    router = 6 * 2 * WIDTH * 4
    if backend != "onehot":
        assert cost.flops == plain_flops(6) + router + experts
    else:
        assert cost.flops >= plain_flops(6) + router + experts // 2
    assert cost.flops_per_token == cost.flops / 6


def test_active_parameters_are_all_but_the_experts_not_chosen() -> None:
    cost = measure_cost(task(point_moe(num_experts=4, top_k=1)), ToyData().example_batch(5))

    bank = 4 * 3 * WIDTH * WIDTH
    assert cost.layers[0].params == bank
    assert cost.layers[0].mean_k == 1.0
    assert cost.active == cost.total - bank * 3 // 4
    assert cost.total == sum(p.numel() for p in task(point_moe(num_experts=4, top_k=1)).parameters())


def test_shared_experts_are_always_active() -> None:
    cost = measure_cost(task(point_moe(num_experts=4, top_k=2, num_shared=1)), ToyData().example_batch(5))

    assert cost.layers[0].num_experts == 5
    assert cost.layers[0].mean_k == 3.0
    assert cost.total - cost.active == cost.layers[0].params * 2 // 5


@pytest.mark.parametrize("moe", [dense(), linear()])
def test_without_a_choice_everything_is_active(moe: Any) -> None:
    cost = measure_cost(task(moe), ToyData().example_batch(5))

    assert cost.active == cost.total == cost.trainable


def test_dense_twin_of_the_chosen_width_costs_the_same_but_for_the_router() -> None:
    batch = ToyData().example_batch(5)
    sparse = measure_cost(task(point_moe(num_experts=4, top_k=2)), batch)
    twin = measure_cost(task(dense(expansion=2.0)), batch)

    assert sparse.flops - twin.flops == 5 * 2 * WIDTH * 4
    assert sparse.active - twin.active == WIDTH * 4


def test_measuring_leaves_random_state_modes_and_statistics_alone() -> None:
    measured = task(point_moe())
    measured.net.dropout.eval()
    modes = [module.training for module in measured.modules()]
    statistics = measured.net.norm.running_mean.clone()
    before = torch.get_rng_state()

    measure_cost(measured, ToyData().example_batch(4))

    assert torch.equal(before, torch.get_rng_state())
    assert modes == [module.training for module in measured.modules()]
    assert torch.equal(statistics, measured.net.norm.running_mean)
    assert measured.last_records == []
