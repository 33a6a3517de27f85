# SPDX-License-Identifier: Apache-2.0
"""One routing applied again and again: sorted once, and always with the weights it has by then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeapps.moe.backends import Backend, apply
from moeapps.moe.experts import MLPExperts
from moeapps.moe.reference import reference_sum
from moeapps.moe.routing import Routing
from tests.moe.test_backends_work import Calls

N, D, E, K = 12, 5, 3, 2


def made(weight_M: Tensor) -> tuple[MLPExperts, Tensor, Routing]:
    expert_M = torch.randint(E + 1, (N * K,))
    routing = Routing(torch.arange(N * K) // K, expert_M, weight_M, N, E, top_k=K)
    return MLPExperts(E, D, 7, bias=True).double(), torch.randn(N, D, dtype=torch.float64), routing


@pytest.mark.parametrize("backend", ["auto", "loop", "segments", "onehot"])
def test_learned_weights_of_one_routing_train_over_steps(backend: Backend) -> None:
    weight_M = torch.rand(N * K, dtype=torch.float64, requires_grad=True)
    experts, x, routing = made(weight_M)
    optimizer = torch.optim.SGD([weight_M], lr=0.3)
    for _ in range(3):
        y, wanted = apply(experts, x, routing, backend=backend), reference_sum(experts, x, routing)
        torch.testing.assert_close(y, wanted)
        (expected,) = torch.autograd.grad(wanted.square().sum(), weight_M)
        optimizer.zero_grad()
        y.square().sum().backward()
        torch.testing.assert_close(weight_M.grad, expected)
        optimizer.step()


def test_gradients_of_several_backward_passes_add_up_without_a_step_between() -> None:
    weight_M = torch.rand(N * K, dtype=torch.float64, requires_grad=True)
    experts, x, routing = made(weight_M)
    (once,) = torch.autograd.grad(reference_sum(experts, x, routing).square().sum(), weight_M)
    for _ in range(3):
        apply(experts, x, routing).square().sum().backward()

    torch.testing.assert_close(weight_M.grad, 3 * once)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_weights_that_change_in_place_count_without_gradients(off: Callable[[], AbstractContextManager[None]]) -> None:
    experts, x, routing = made(torch.rand(N * K, dtype=torch.float64))
    with off():
        routing = replace(routing, weight_M=torch.rand(N * K, dtype=torch.float64))
        before = apply(experts, x, routing)
        routing.weight_M.mul_(2)
        after = apply(experts, x, routing)

    torch.testing.assert_close(after, 2 * before)  # the output is linear in the weights


def test_a_routing_serves_with_and_without_gradients_in_any_order() -> None:
    weight_M = torch.rand(N * K, dtype=torch.float64)
    experts, x, routing = made(weight_M)
    for off in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.enable_grad):
        weight_M.mul_(0.5)
        with off():
            y = apply(experts, x, routing)
        torch.testing.assert_close(y.clone(), reference_sum(experts, x, routing))
    y.sum().backward()
    assert all(p.grad is not None for p in experts.parameters())


@pytest.mark.parametrize("learned", [False, True])
def test_it_is_sorted_once_however_its_weights_change(learned: bool) -> None:
    weight_M = torch.rand(N * K, dtype=torch.float64, requires_grad=learned)
    experts, x, routing = made(weight_M)
    with Calls() as calls:
        for _ in range(4):
            apply(experts, x, routing, backend="loop")
            with torch.no_grad():
                weight_M.mul_(0.5)
    assert calls.count("sort") == 1


def test_weights_that_stay_are_gathered_once() -> None:
    experts, x, routing = made(torch.rand(N * K, dtype=torch.float64))
    with Calls() as calls:
        for _ in range(4):
            apply(experts, x, routing, backend="segments")
    place = routing.weight_M.data_ptr()
    assert sum(name == "index_select" and args[0].data_ptr() == place for name, args, _ in calls.calls) == 1
