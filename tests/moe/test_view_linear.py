# SPDX-License-Identifier: Apache-2.0
"""Blocks on views are what a loop over blocks gives, in values and in gradients of first and second order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moeapps.moe import NormalisedExperts
from moeapps.moe.view_linear import view_linear
from tests.moe.derivatives_common import D, apart, derivatives

READS = {
    "one view": (0, 0, 0),
    "each its own": (0, 1, 2),
    "even runs": (0, 0, 1, 1, 2, 2),
    "even runs inside": (1, 1, 2, 2),
    "uneven runs": (0, 0, 0, 1, 2),
    "a view not read": (0, 2, 2),
    "back again": (0, 1, 0, 1),
}


def naive(x: Tensor, weight: Tensor, reads: tuple[int, ...]) -> Tensor:
    return torch.stack([x[v] @ weight[b] for b, v in enumerate(reads)], dim=1)


@pytest.mark.parametrize("reads", READS.values(), ids=READS)
@pytest.mark.parametrize("layout", ["views first", "rows first", "expanded"])
def test_equals_a_loop_over_blocks(reads: tuple[int, ...], layout: str) -> None:
    leaf = torch.randn(*{"views first": (3, 7, 4), "rows first": (7, 3, 4), "expanded": (7, 4)}[layout]).double()
    leaf.requires_grad_()
    x = {
        "views first": lambda: leaf,
        "rows first": lambda: leaf.transpose(0, 1),
        "expanded": lambda: leaf.expand(3, 7, 4),
    }
    weight = torch.randn(len(reads), 4, 5, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(7, len(reads), 5, dtype=torch.float64)

    fast, slow = view_linear(x[layout](), weight, reads), naive(x[layout](), weight, reads)

    torch.testing.assert_close(fast, slow)
    found, wanted = (torch.autograd.grad((y * probe).sum(), [leaf, weight]) for y in (fast, slow))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(view_linear(x[layout](), weight, reads), slow)


@pytest.mark.parametrize("reads", READS.values(), ids=READS)
def test_has_second_derivatives(reads: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(reads), 2, 3, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradgradcheck(lambda a, b: view_linear(a, b, reads), (x, weight))


@pytest.mark.parametrize("reads", READS.values(), ids=READS)
def test_derivatives_where_the_matrices_depend_on_the_rows_and_are_used_twice(reads: tuple[int, ...]) -> None:
    x = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    base = torch.randn(len(reads), 4, 4, dtype=torch.float64, requires_grad=True)

    def twice(apply: Any) -> Tensor:
        weight = base * x.mean(1).tanh()[list(reads)].unsqueeze(1)
        return apply(apply(x, weight, reads).transpose(0, 1), weight, tuple(range(len(reads))))

    for found, wanted in zip(
        derivatives(twice(view_linear), [x, base]), derivatives(twice(naive), [x, base]), strict=True
    ):
        assert apart(found, wanted) < 1e-10


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("hidden", [None, 5])
def test_derivatives_of_normalised_experts_that_read_their_own_output(norm: Any, hidden: int | None) -> None:
    bank = NormalisedExperts(4, D, D, hidden_dim=hidden, norm=norm, reads=(0, 0, 2, 1)).double()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    x = torch.randn(3, 9, D, dtype=torch.float64, requires_grad=True)
    inputs = [x, *bank.parameters()]

    def expert(v: Tensor, e: int) -> Tensor:
        if bank.w_hidden is not None:
            h = v @ bank.w_hidden[e] + bank.b_hidden[e]
            v = h * h.sigmoid()
        z = v @ bank.weight[e]
        if norm != "none":
            over = 0 if norm == "batch" else 1
            centred = z - z.mean(over, keepdim=True)
            z = bank.gamma[e] * centred / (centred.square().mean(over, keepdim=True) + bank.eps).sqrt()
        z = z + bank.beta[e]
        return z * z.sigmoid()

    def every(x: Tensor) -> Tensor:
        return torch.stack([expert(x[v], e) for e, v in enumerate(bank.reads)], 1)

    found = derivatives(bank.every(bank.every(x).transpose(0, 1)), inputs)
    wanted = derivatives(every(every(x).transpose(0, 1)), inputs)

    assert apart(found[1], found[0]) < 1e-12
    for some, expected in zip(found, wanted, strict=True):
        assert apart(some, expected) < 1e-8


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("activation", ["silu", "relu", "identity"])
def test_normalised_experts_answer_without_gradients_what_they_answer_with(norm: Any, activation: Any) -> None:
    bank = NormalisedExperts(4, D, D, norm=norm, activation=activation, reads=(0, 0, 2, 1)).double()
    x = torch.randn(3, 9, D, dtype=torch.float64)
    bank.every(x)  # running statistics that are not those of the start
    kept = x.clone()

    with torch.no_grad():
        found = bank.eval().every(x)

    torch.testing.assert_close(found, bank.every(x))
    assert torch.equal(x, kept)


def test_runs_in_the_precision_of_autocast() -> None:
    x, weight = torch.randn(2, 8, 4), torch.randn(4, 4, 5, requires_grad=True)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = view_linear(x, weight, (0, 0, 1, 1))

    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), naive(x, weight, (0, 0, 1, 1)), rtol=0.05, atol=0.1)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
