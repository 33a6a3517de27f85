# SPDX-License-Identifier: Apache-2.0
"""Dispatch without a look at the routing: the operator of the compiler, and the path of bfloat16 on CUDA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from moeapps.moe import GLUExperts, LinearScore, MLPExperts, MoELayer, Router, TopK, TopP
from moeapps.moe.backends import run, sort_assignments
from moeapps.moe.backends.grouped_mm import grouped_mm_static
from moeapps.moe.experts import Experts
from moeapps.moe.fast.static import every_expert, segments_static
from moeapps.moe.routing import Routing

N, D, F, E = 11, 8, 16, 5
BANKS: dict[str, Any] = {
    "mlp": lambda: MLPExperts(E, D, F, activation="silu", bias=False),
    "mlp_bias": lambda: MLPExperts(E, D, F, out_dim=4),
    "swiglu_bias": lambda: GLUExperts(E, D, F, bias=True, out_dim=12),
}


def routing(kind: str) -> Routing:
    num = 0 if kind == "no_rows" else 3 * N
    num_experts = E if kind == "all_real" else E + 1
    ids = torch.randint(0, num_experts, (num,))
    if kind == "all_sentinels":
        ids = torch.full_like(ids, E)
    weight = torch.rand(num, requires_grad=True)
    if kind == "elsewhere":
        rows, targets = torch.randint(0, N, (num,)), torch.randint(0, 7, (num,))
        return Routing(rows, ids, weight, N, E, target_M=targets, num_targets=7)
    return Routing(torch.arange(num) // 3, ids, weight, num // 3, E, top_k=3)


ROUTINGS = ["all_real", "sentinels", "all_sentinels", "elsewhere", "no_rows"]


def gradients(y: Tensor, x_ND: Tensor, made: Routing, experts: Experts) -> list[Tensor]:
    inputs = [x_ND, made.weight_M, *experts.parameters()]
    return [y, *torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel()).view_as(y))]


@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("way", [segments_static, grouped_mm_static, every_expert])
def test_static_dispatch_equals_the_loop(way: Any, kind: str, bank: str, at_input: bool) -> None:
    experts, made = BANKS[bank](), routing(kind)
    x_ND = torch.randn(made.num_rows, D, requires_grad=True)
    poison = torch.full((1 << 16,), float("nan"))  # rows past the last offset are whatever the memory held
    del poison

    what = experts if way is every_expert else experts.feed_forward()
    y = way(what, x_ND, made, at_input=at_input)
    weight_at = "input" if at_input else "output"
    reference = run(experts, x_ND, sort_assignments(made), backend="loop", weight_at=weight_at)

    actual, expected = gradients(y, x_ND, made, experts), gradients(reference, x_ND, made, experts)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class Poisoned(torch.autograd.Function):
    """The first of two tensors, with nan below row ``tail``: in the output, or in the gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tail: int, backward: bool) -> Tensor:
        ctx.tail, ctx.backward = tail, backward
        rows = rows.clone()
        if not backward:
            rows[tail:] = torch.nan
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].clone()
        if ctx.backward:
            grad[ctx.tail :] = torch.nan
        return grad, None, None


def test_rows_past_the_last_offset_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped products leave those rows of outputs and of input gradients uninitialised: here they are nan."""
    grouped = torch.nn.functional.grouped_mm

    def poisoned(x: Tensor, w: Tensor, *, offs: Tensor) -> Any:
        tail = int(offs[-1])
        return Poisoned.apply(grouped(Poisoned.apply(x, tail, True), w, offs=offs), tail, False)

    monkeypatch.setattr("moeapps.moe.backends.grouped_mm.functional.grouped_mm", poisoned)
    for bank in BANKS.values():
        experts, made = bank(), routing("sentinels")
        x_ND = torch.randn(N, D, requires_grad=True)
        for at_input in (False, True):
            y = grouped_mm_static(experts.feed_forward(), x_ND, made, at_input=at_input)
            assert all(t.isfinite().all() for t in gradients(y, x_ND, made, experts))


@pytest.mark.parametrize(
    ("bank", "kind"), [("mlp", "all_real"), ("swiglu_bias", "sentinels"), ("mlp_bias", "elsewhere")]
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_the_operators_keep_the_contract_of_the_compiler(bank: str, kind: str) -> None:
    made, ffn = routing(kind), BANKS[bank]().feed_forward()
    ids = (made.row_M, made.expert_M, made.target_M, made.top_k, made.num_outputs)
    stacks = (ffn.w_in, ffn.b_in, ffn.w_out, ffn.b_out, ffn.activation.name, ffn.gated, False)
    x_ND = torch.randn(N, D, requires_grad=True)

    torch.library.opcheck(torch.ops.moeapps.segments.default, (x_ND, made.weight_M, *ids, *stacks, True))
    y_TO, h_MH = torch.ops.moeapps.segments(x_ND, made.weight_M, *ids, *stacks, True)
    needs = [True, True, True, ffn.b_in is not None, False, False]
    arguments = (torch.ones_like(y_TO), h_MH, x_ND, made.weight_M, *ids, *stacks, needs)
    plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(torch.ops.moeapps.segments_backward.default, plain)


def test_the_operator_keeps_nothing_without_gradients_and_skips_what_is_frozen() -> None:
    made, experts = routing("all_real"), MLPExperts(E, D, F)
    x_ND = torch.randn(N, D)
    experts.w_in.requires_grad_(False)

    segments_static(experts.feed_forward(), x_ND, made).sum().backward()

    assert experts.w_in.grad is None
    assert experts.w_out.grad is not None
    ids = (made.row_M, made.expert_M, made.target_M, made.top_k, made.num_outputs)
    stacks = (experts.w_in, experts.b_in, experts.w_out, experts.b_out, "gelu", False, False)
    with torch.no_grad():
        assert torch.ops.moeapps.segments(x_ND, made.weight_M, *ids, *stacks, False)[1].numel() == 0


def fake_layer(experts: Experts, choose: Any) -> MoELayer:
    return MoELayer(Router(LinearScore(D, E), choose), experts)


@pytest.mark.parametrize("bank", ["mlp", "swiglu_bias"])
@pytest.mark.parametrize("choose", [lambda: TopK(2), lambda: TopP(0.6, num_null=0)], ids=["top_k", "top_p"])
def test_bfloat16_on_cuda_runs_forward_without_the_host(bank: str, choose: Any) -> None:
    """Fake tensors hold no values: a step that needs one on the host (``item``, ``tolist``, ``nonzero``) raises."""
    experts = MLPExperts(E, D, F, bias=False) if bank == "mlp" else GLUExperts(E, D, F, bias=True, out_dim=16)
    with FakeTensorMode():
        layer = fake_layer(experts, choose())
        for name, parameter in list(layer.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
            setattr(layer.get_submodule(owner), leaf, torch.nn.Parameter(fake))
        x_ND = torch.empty(N, D, dtype=torch.bfloat16, device="cuda")
        y = layer(x_ND)

    assert y.shape == (N, experts.out_dim)
    assert y.dtype == torch.bfloat16
    assert y.device.type == "cuda"


def test_the_fake_check_can_fail() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DynamicOutputShapeException):
        sort_assignments(routing("all_real"))


@pytest.mark.parametrize("bank", ["mlp", "swiglu_bias"])
def test_bfloat16_differentiates_without_values(bank: str) -> None:
    experts = MLPExperts(E, D, F, bias=False) if bank == "mlp" else GLUExperts(E, D, F, bias=True, out_dim=16)
    experts = experts.to("meta", torch.bfloat16)
    ids = torch.zeros(3 * N, dtype=torch.int64, device="meta")
    weight = torch.zeros(3 * N, device="meta", requires_grad=True)
    made = Routing(ids, ids, weight, N, E, top_k=3)
    x_ND = torch.empty(N, D, dtype=torch.bfloat16, device="meta", requires_grad=True)

    for at_input in (False, True):
        for spread in (made, replace(made, top_k=None, target_M=ids, num_targets=7)):
            y = grouped_mm_static(experts.feed_forward(), x_ND, spread, at_input=at_input)
            inputs = [x_ND, weight, *experts.parameters()]
            found = torch.autograd.grad(y, inputs, torch.empty_like(y))
            assert [(g.shape, g.dtype) for g in found] == [(t.shape, t.dtype) for t in inputs]
