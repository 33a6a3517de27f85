# SPDX-License-Identifier: Apache-2.0
"""Columns forbidden by a logit of minus infinity: no weight, no gradient, and what is left shares as if alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moeapps.moe import (
    Capped,
    Chooser,
    Dense,
    DenseToSparse,
    GatedShared,
    GroupLimitedTopK,
    Routing,
    SparseMixer,
    TopK,
    TopP,
)
from tests.moe.chooser_common import E, bound, logits

NEVER = -math.inf
Case = tuple[Callable[[], Chooser], Callable[[Tensor], Tensor]]


def part(a: Tensor) -> Tensor:
    return a.softmax(-1)


def chances(a: Tensor) -> Tensor:
    return 1 / (1 + (-a).exp())


def sharing_chances(a: Tensor) -> Tensor:
    return chances(a) / chances(a).sum()


def evenly(a: Tensor) -> Tensor:
    return torch.full_like(a, 1 / (len(a) + 1e-6))


CASES: dict[str, Case] = {
    "softmax": (lambda: TopK(3), part),
    "softmax_plain": (lambda: TopK(3, renormalise=False), part),
    "topk_softmax": (lambda: TopK(3, weighing="topk_softmax"), part),
    "sigmoid": (lambda: TopK(3, weighing="sigmoid"), sharing_chances),
    "identity": (lambda: TopK(3, weighing="identity", scale=2.0), lambda a: 2 * a),
    "ones": (lambda: TopK(3, weighing="ones"), torch.ones_like),
    "bias": (lambda: TopK(3, balance_bias=True), part),
    "bias_plain": (lambda: TopK(3, renormalise=False, balance_bias=True), part),
    "bias_sigmoid": (lambda: TopK(3, weighing="sigmoid", balance_bias=True), sharing_chances),
    "bias_identity": (lambda: TopK(3, weighing="identity", balance_bias=True), lambda a: a),
    "bias_topk_softmax": (lambda: TopK(3, weighing="topk_softmax", balance_bias=True), part),
    "all_groups": (lambda: GroupLimitedTopK(3, num_groups=3, keep_groups=3), part),
    "top_p": (lambda: TopP(1.0), part),
    "sparse_mixer": (lambda: SparseMixer(3, eps=0.0), evenly),
    "sparse_mixer_p": (lambda: SparseMixer(p=1.0, eps=0.0), evenly),
    "dense": (lambda: Dense(), part),
    "dense_identity": (lambda: Dense("identity"), lambda a: a),
    "dense_ones": (lambda: Dense("ones"), torch.ones_like),
    "dense_to_sparse": (lambda: DenseToSparse(0.0), part),
}


def with_bias(choose: Chooser) -> Chooser:
    if isinstance(choose, TopK) and choose.bias is not None:
        choose.bias.copy_(torch.linspace(7.0, -7.0, len(choose.bias)))  # outweighs every probability
    return choose


def allowing(num_rows: int, allowed: int) -> Tensor:
    """Logits of which every row forbids all but so many, at places of its own."""
    place = torch.rand(num_rows, E).argsort(-1).argsort(-1)
    return logits(num_rows).detach().masked_fill(place >= allowed, NEVER).requires_grad_()


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("allowed", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_row_that_allows_fewer_than_k_uses_those_alone(name: str, allowed: int, num_rows: int) -> None:
    make, wanted = CASES[name]
    s = allowing(num_rows, allowed)
    routing = with_bias(bound(make()))(s)
    expected = torch.zeros(num_rows, E, dtype=s.dtype)
    for n, row in enumerate(s.detach()):
        expected[n, row > NEVER] = wanted(row[row > NEVER])

    torch.testing.assert_close(routing.assignment(), expected)
    if isinstance(routing, Routing):
        assert routing.weight_M.isfinite().all()
        used = routing.expert_M[routing.weight_M != 0]
        assert len(used) == num_rows * allowed
    if routing.assignment().requires_grad:
        probe = torch.randn_like(expected)
        (grad,) = torch.autograd.grad((routing.assignment() * probe).sum(), s)
        assert grad.isfinite().all()
        assert not grad[s == NEVER].any()


@pytest.mark.parametrize("name", ["identity", "ones", "sparse_mixer", "bias_identity"])
def test_places_that_nothing_allowed_fills_are_no_work(name: str) -> None:
    s = allowing(20, 2)
    routing = with_bias(bound(CASES[name][0]()))(s)

    assert routing.counts().tolist() == (s > NEVER).sum(0).tolist()
    assert (routing.expert_M == E).sum() == 20
    assert all(len(set(row.tolist()) - {E}) == 2 for row in routing.expert_M.view(20, -1))


@pytest.mark.parametrize("choose", [SparseMixer(2), SparseMixer(p=0.7), SparseMixer(p=1.0), SparseMixer(3, eps=2.0)])
@pytest.mark.parametrize("num_rows", [1, 300])
def test_draws_in_training_stay_among_what_is_allowed(choose: SparseMixer, num_rows: int) -> None:
    s = allowing(num_rows, 1)
    routing = bound(choose).train()(s)
    (grad,) = torch.autograd.grad(routing.weight_M.square().sum(), s)

    only = s.detach().argmax(-1)
    assert torch.equal(routing.counts(), torch.bincount(only, minlength=E))
    torch.testing.assert_close(
        routing.assignment().sum(1), torch.full((num_rows,), 1 / (1 + 1e-6), dtype=s.dtype), atol=1e-9, rtol=0
    )
    assert grad.isfinite().all()


def test_by_hand_one_allowed_of_three() -> None:
    s = torch.tensor([[3.0, NEVER, NEVER]])
    mixed = bound(SparseMixer(2), 3).eval()(s)
    ones = bound(TopK(2, weighing="ones"), 3)(s)

    assert mixed.expert_M.tolist() == ones.expert_M.tolist() == [0, 3]
    torch.testing.assert_close(mixed.weight_M, torch.tensor([1.0, 0.0]), atol=2e-6, rtol=0)
    assert ones.weight_M.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("s", "bias", "expected"),
    [
        ([0.0, 0.0, 5.0, NEVER], None, [0.0, 0.0, 1.0, 0.0]),  # e^5 > 2; no expert of the group that was dropped
        ([NEVER, NEVER, 0.0, 0.0], [0.9, 0.9, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]),  # the bias opens no group
        ([NEVER, 1.0, 0.0, 0.0], [0.0] * 4, [0.0, 0.0, 0.5, 0.5]),  # 0.73 alone against 0.5 + 0.5
        ([NEVER, 5.0, -9.0, -9.0], [0.0] * 4, [0.0, 1.0, 0.0, 0.0]),  # 0.99 alone against nearly nothing
    ],
)
@pytest.mark.parametrize("times", [1, 20])
def test_groups_are_ranked_by_what_they_allow(
    s: list[float], bias: list[float] | None, expected: list[float], times: int
) -> None:
    choose = bound(
        GroupLimitedTopK(2, num_groups=2, keep_groups=1, weighing="sigmoid", balance_bias=True)
        if bias is not None
        else GroupLimitedTopK(2, num_groups=2, keep_groups=1),
        4,
    )
    if bias is not None:
        choose.bias.copy_(torch.tensor(bias))
    routing = choose(torch.tensor([s] * times))

    torch.testing.assert_close(routing.assignment(), torch.tensor([expected] * times))
    assert routing.counts().tolist() == [times * (w > 0) for w in expected]


def test_a_bias_that_chooses_nothing_but_vanished_probabilities_gives_weight_0() -> None:
    choose = bound(TopK(2, balance_bias=True), 3)
    choose.bias.copy_(torch.tensor([-2.0, 0.0, 0.0]))
    s = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)  # exp(-200) is 0 in float32
    routing = choose(s)

    assert routing.weight_M.tolist() == [0.0, 0.0]
    assert torch.autograd.grad(routing.weight_M.sum(), s)[0].isfinite().all()


def test_a_row_that_allows_null_experts_alone_stays_finite() -> None:
    for weighing in ("softmax", "topk_softmax", "sigmoid", "identity", "ones"):
        choose = bound(TopK(2, weighing=weighing, num_null=1, null_mass="redistributed"), 3)
        routing = choose(torch.tensor([[NEVER, NEVER, 0.5]]))
        assert routing.weight_M.tolist() == [0.0, 0.0], weighing
        assert routing.null_M.tolist() == [True, False], weighing


def test_around_other_choosers_what_is_forbidden_keeps_weight_0() -> None:
    """Raw scores times the mass of the routed: 2 e^2 / (e^2 + e), and e / (e^2 + e) for the shared expert."""
    s = torch.tensor([[2.0, NEVER, 1.0]], requires_grad=True)
    routing = bound(GatedShared(TopK(2, weighing="identity"), 1), 3)(s)
    mass = math.e / (math.e + 1)

    torch.testing.assert_close(routing.weight_M, torch.tensor([2 * mass, 0.0]))
    torch.testing.assert_close(routing.shared_weight_NS, torch.tensor([[1 - mass]]))
    (grad,) = torch.autograd.grad(routing.weight_M.sum(), s)
    torch.testing.assert_close(grad, torch.tensor([[mass + 2 * mass * (1 - mass), 0.0, -2 * mass * (1 - mass)]]))
    capped = bound(Capped(TopK(2, weighing="ones"), 5.0), 2)(s[:, :2])
    assert capped.expert_M.tolist() == [0, 2]
    assert capped.weight_M[1] == 0
