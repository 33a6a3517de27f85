# SPDX-License-Identifier: Apache-2.0
"""The MLP in chunks is timm's, with its derivatives, and keeps less."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Mlp

from benchmarks.core_cases import saved_bytes
from tasks.point_cloud.nets import mlp
from tasks.point_cloud.nets.mlp import GeluMlp


def pair(dim: int = 3, hidden: int = 5) -> tuple[GeluMlp, Mlp]:
    ours, theirs = GeluMlp(dim, hidden).double(), Mlp(dim, hidden).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("chunk", [5, 20, 1 << 18])  # one row at a time, four, all
@pytest.mark.parametrize("num", [0, 1, 11])
def test_it_is_the_mlp_of_timm_with_its_gradients(monkeypatch: pytest.MonkeyPatch, num: int, chunk: int) -> None:
    monkeypatch.setattr(mlp, "_CHUNK", chunk)
    ours, theirs = pair()
    x = torch.randn(num, 3, dtype=torch.float64, requires_grad=True)

    found, expected = ours(x), theirs(x)

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), [x, *ours.parameters()]),
        torch.autograd.grad(expected.sin().sum(), [x, *theirs.parameters()]),
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected)


def test_derivatives_are_exact_to_second_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "_CHUNK", 10)
    ours, _ = pair()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, *ours.parameters())

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return mlp._GeluMlp.apply(x, *parameters, True)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    tangent = torch.ones_like(x)
    torch.testing.assert_close(
        torch.func.jvp(ours, (x.detach(),), (tangent,))[1], torch.autograd.functional.jvp(ours, x, tangent)[1]
    )


def test_a_frozen_mlp_gives_the_gradient_of_its_input_alone() -> None:
    ours, theirs = pair()
    ours.requires_grad_(False)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    (found,) = torch.autograd.grad(ours(x).square().sum(), x)
    (expected,) = torch.autograd.grad(theirs(x).square().sum(), x)

    torch.testing.assert_close(found, expected)


def test_half_precision_keeps_the_answer() -> None:
    ours = GeluMlp(8, 16)
    x = torch.randn(20, 8)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(x)
    y.sum().backward()

    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), ours(x), rtol=0.05, atol=0.05)
    assert ours.fc1.weight.grad is not None
    assert ours.fc1.weight.grad.dtype == torch.float32


def test_only_what_the_gelu_reads_is_kept() -> None:
    ours, x = GeluMlp(8, 64), torch.randn(100, 8, requires_grad=True)

    assert saved_bytes(lambda: ours(x), [x, *ours.parameters()]) == 100 * 64 * 4
