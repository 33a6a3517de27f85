# SPDX-License-Identifier: Apache-2.0
"""Blocks on views are what a loop over blocks gives, in values and in gradients of first and second order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeapps.moe.view_linear import view_linear

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


def test_runs_in_the_precision_of_autocast() -> None:
    x, weight = torch.randn(2, 8, 4), torch.randn(4, 4, 5, requires_grad=True)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = view_linear(x, weight, (0, 0, 1, 1))

    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), naive(x, weight, (0, 0, 1, 1)), rtol=0.05, atol=0.1)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
