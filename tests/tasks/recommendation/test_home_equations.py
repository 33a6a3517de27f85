# SPDX-License-Identifier: Apache-2.0
"""HoME's network and its gates, stacked or one by one, equal a loop written from the equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tasks.recommendation.nets.fast_gates import StackedGates
from tasks.recommendation.nets.gates import HomeGates
from tests.tasks.recommendation.home_oracle import CATEGORY, TASKS, GateReader, inputs, naive_home, network, routings


@pytest.mark.parametrize("own", [1, 2])
@pytest.mark.parametrize("categories", [CATEGORY, [0, 1, 2, 0, 1], [0] * 5], ids=["two", "three", "one"])
def test_network_is_the_equations_of_the_card_in_values_and_all_gradients(own: int, categories: list[int]) -> None:
    facts = {"tasks": TASKS, "categories": [f"c{c}" for c in categories]}
    net, x = network(facts, task_own=own), inputs()

    fast = net(x)
    slow = naive_home(net, x[0], categories, len(set(categories)), own=own)

    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-11)
    probe = torch.randn_like(fast)
    leaves = [x, *net.parameters()]
    found, wanted = (torch.autograd.grad((y * probe).sum(), leaves) for y in (fast, slow))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert b.any()


def weights_one_by_one(stacked: StackedGates, plain: HomeGates) -> dict[str, Tensor]:
    """Parameters of the equation, made of those of the stacked gates; 0 for pairs that a gate does not see."""
    parts, read, found = {"gates": plain.gates}, GateReader(stacked), {}
    if plain.both is not plain.gates:
        parts = dict(zip(("both.routers.0", "both.routers.1"), plain.both.routers, strict=True))
    for name, part in parts.items():
        for g, score in enumerate(part.scores):
            weight, bias = list(torch.zeros_like(score.weight)), list(torch.zeros_like(score.bias))
            for e in part.allowed[g].nonzero()[:, 0].tolist():
                b = next(read.bias)
                weight[e] = torch.cat([stacked.weight[read.row_of[s, b]] for s in stacked.reads[g]])
                bias[e] = stacked.bias[b]
            found |= {f"{name}.scores.{g}.weight": torch.stack(weight), f"{name}.scores.{g}.bias": torch.stack(bias)}
    return found


@pytest.mark.parametrize("self_gates", [True, False])
@pytest.mark.parametrize("own", [1, 2])
def test_stacked_gates_are_the_equation_in_weights_and_all_gradients(own: int, self_gates: bool) -> None:
    for level in network(task_own=own, self_gates=self_gates).levels:
        stacked, plan = level.moe.router, level.plan
        plain = HomeGates(stacked.width, plan.sees, stacked.reads, owns=plan.owns if self_gates else None).double()
        states = torch.randn(4, 7, stacked.width, dtype=torch.float64, requires_grad=True)

        fast = stacked(states)
        slow = functional_call(plain, weights_one_by_one(stacked, plain), states)

        torch.testing.assert_close(fast.weight, slow.weight, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(fast.probs_NE, slow.probs_NE, rtol=1e-12, atol=1e-14)
        probe, leaves = torch.randn_like(fast.weight), [states, stacked.weight, stacked.bias]
        found, wanted = (torch.autograd.grad((r.weight * probe).sum(), leaves) for r in (fast, slow))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
            assert b.any()


def test_the_network_runs_on_gates_one_by_one_and_refuses_what_these_do_not_know() -> None:
    x = inputs()
    assert network(fast_gates=False)(x).shape == (9, len(TASKS))
    with pytest.raises(ValueError, match="fast_gates=True"):
        network(fast_gates=False, mixing="uniform")


@pytest.mark.parametrize("fast_gates", [True, False])
def test_biases_of_own_pairs_close_the_gates_to_their_own_experts_alone(fast_gates: bool) -> None:
    net, x = network(fast_gates=fast_gates), inputs()
    with torch.no_grad():
        for level in net.levels:
            for bias, own in level.moe.router.biases_of(torch.as_tensor(level.plan.owns)):
                bias[own] -= 200.0

    for routing, level in zip(routings(net, x), net.levels, strict=True):
        owns, sees = torch.as_tensor(level.plan.owns), torch.as_tensor(level.plan.sees)
        closed = (sees & ~owns).any(1)  # a gate that sees its own experts alone has nothing else to mix
        probs = routing.probs_NE.detach().transpose(0, 1)[:, closed]
        assert float(probs[:, owns[closed]].max()) < 1e-30
        assert float(probs[:, (sees & ~owns)[closed]].max()) > 0.1
