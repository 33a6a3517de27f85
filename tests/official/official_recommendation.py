# SPDX-License-Identifier: Apache-2.0
"""Multi-task networks as facebookresearch/AdaTT ``mtl_lib.py`` defines them, written from its equations as loops.

A level is a list of experts, each reading the state of its unit, and of gates, each a softmax over some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from official_common import furthest, part, scatter
from torch import Tensor

from tasks.recommendation.nets.levels import NetFactory, RankingNet
from tasks.recommendation.rivals import adatt, cross_stitch, ml_mmoe, mmoe, ple

FACTS: dict[str, Any] = {"tasks": ["a", "b", "c"], "categories": ["x", "x", "y"]}
DIM, T = 6, 3
SIZES: dict[str, Any] = {"width": 5, "hidden": 4, "tower_dim": 4}
NO_HIDDEN: dict[str, Any] = {"width": 5, "tower_dim": 4}


def network(factory: NetFactory) -> RankingNet:
    net = factory(DIM, FACTS).double()
    assert isinstance(net, RankingNet)
    scatter(net.parameters())
    return net


def expert(net: RankingNet, level: int, e: int, x: Tensor) -> Tensor:
    """A perceptron that ends in ReLU, of one layer or two."""
    bank = net.levels[level].moe.experts
    if bank.hidden_dim is not None:
        x = torch.relu(x @ bank.w_hidden[e] + bank.b_hidden[e])
    return torch.relu(x @ bank.weight[e] + bank.beta[e])


def gate(net: RankingNet, level: int, g: int, x: Tensor, experts: Sequence[int]) -> dict[int, Tensor]:
    """Linear and softmax over the experts that gate g sees."""
    router = net.levels[level].moe.router
    place = router.place_mixing.view(-1, router.num_gates, router.num_experts)
    logits = []
    for e in experts:
        (slot,) = place[:, g, e].nonzero()[:, 0].tolist()
        (row,) = {int(i) for i in router.index[:, slot] if i < len(router.weight)}
        logits.append(x @ router.weight[row] + router.bias[router.bias_index[slot]])
    share = torch.softmax(torch.stack(logits, -1), -1)
    return {e: share[:, i] for i, e in enumerate(experts)}


def towers(net: RankingNet, states: Sequence[Tensor]) -> Tensor:
    tower, logits = net.towers, []
    for t in range(T):
        hidden = torch.relu(states[t] @ tower.w_in[t] + tower.b_in[t])
        logits.append((hidden @ tower.w_out[t])[:, 0] + tower.b_out[t])
    return torch.stack(logits, -1)


def error(net: RankingNet, expected: Any) -> float:
    x = torch.randn(8, DIM, dtype=torch.float64, requires_grad=True)
    return furthest(net(x.unsqueeze(0)), towers(net, expected(net, x)), [x, *net.parameters()])


def adatt_states(net: RankingNet, x: Tensor, owner: Sequence[int], levels: int) -> list[Tensor]:
    """Each unit's gate over all experts; to the weights of its own ones 1 is added, or a learned number each."""
    num_units = 1 + max(owner)
    one_each = len(owner) == num_units
    states = [x] * num_units
    for level in range(levels):
        h = [expert(net, level, e, states[owner[e]]) for e in range(len(owner))]
        constant = iter(() if one_each else net.levels[level].moe.router.constant)
        made = []
        for unit in range(T if level == levels - 1 else num_units):
            weight = gate(net, level, unit, states[unit], range(len(owner)))
            for e in range(len(owner)):
                if owner[e] == unit:
                    weight[e] = weight[e] + (1.0 if one_each else next(constant))
            made.append(sum(weight[e][:, None] * h[e] for e in range(len(owner))))
        assert next(constant, None) is None, "a learned number that no unit owns"
        states = made  # type: ignore[assignment]
    return states


@part("AdaTT-sp, one expert a task")
def adatt_sp() -> float:
    net = network(adatt(task_experts=1, **SIZES))
    return error(net, lambda net, x: adatt_states(net, x, [0, 1, 2], 2))


@part("AdaTT-sp, two experts a task")
def adatt_sp_two() -> float:
    net = network(adatt(task_experts=2, **SIZES))
    return error(net, lambda net, x: adatt_states(net, x, [0, 0, 1, 1, 2, 2], 2))


@part("AdaTT, one expert in every unit")
def adatt_equal() -> float:
    net = network(adatt(task_experts=1, shared_experts=1, **SIZES))
    return error(net, lambda net, x: adatt_states(net, x, [0, 1, 2, 3], 2))


@part("AdaTT, one expert a task and two shared")
def adatt_unequal() -> float:
    net = network(adatt(task_experts=1, shared_experts=2, **SIZES))
    return error(net, lambda net, x: adatt_states(net, x, [0, 1, 2, 3, 3], 2))


@part("multi-level MMoE")
def multi_level_mmoe() -> float:
    num, levels = 4, 3

    def states(net: RankingNet, x: Tensor) -> list[Tensor]:
        found = [x] * num
        for level in range(levels):
            h = [expert(net, level, e, found[e]) for e in range(num)]
            mixed = []
            for g in range(T if level == levels - 1 else num):
                weight = gate(net, level, g, x, range(num))  # of the network's input at every level
                mixed.append(sum(weight[e][:, None] * h[e] for e in range(num)))
            found = mixed  # type: ignore[assignment]
        return found

    return error(network(ml_mmoe(levels=levels, num_experts=num, **NO_HIDDEN)), states)


@part("MMoE")
def one_level_mmoe() -> float:
    def states(net: RankingNet, x: Tensor) -> list[Tensor]:
        h = [expert(net, 0, e, x) for e in range(4)]
        weights = [gate(net, 0, g, x, range(4)) for g in range(T)]
        return [sum(weight[e][:, None] * h[e] for e in range(4)) for weight in weights]  # type: ignore[misc]

    return error(network(mmoe(num_experts=4, **SIZES)), states)


@part("PLE")
def progressive() -> float:
    owner = [0, 0, 1, 1, 2, 2, 3, 3, 3]

    def states(net: RankingNet, x: Tensor) -> list[Tensor]:
        found = [x] * (T + 1)
        for level in range(2):
            h = [expert(net, level, e, found[owner[e]]) for e in range(len(owner))]
            made = []
            for unit in range(T if level == 1 else T + 1):
                seen = [e for e in range(len(owner)) if unit == T or owner[e] in (unit, T)]
                weight = gate(net, level, unit, found[unit], seen)
                made.append(sum(weight[e][:, None] * h[e] for e in seen))
            found = made  # type: ignore[assignment]
        return found

    return error(network(ple(task_experts=2, shared_experts=3, **SIZES)), states)


@part("cross-stitch")
def stitched() -> float:
    def states(net: RankingNet, x: Tensor) -> list[Tensor]:
        found = [x] * T
        for level in range(2):
            h = [expert(net, level, t, found[t]) for t in range(T)]
            unit = net.levels[level].moe.router.constant.view(T, T)
            found = [sum(unit[t, s] * h[s] for s in range(T)) for t in range(T)]  # type: ignore[misc]
        return found

    return error(network(cross_stitch(**NO_HIDDEN)), states)
