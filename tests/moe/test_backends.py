# SPDX-License-Identifier: Apache-2.0
"""Every backend computes the same function: outputs and all gradients against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from moeapps.moe.activation import ActivationName
from moeapps.moe.backends import Backend, run, sort_assignments
from moeapps.moe.experts import Experts, GLUExperts, MLPExperts
from moeapps.moe.fast.segments import segments
from moeapps.moe.module_experts import ModuleExperts
from moeapps.moe.reference import reference_sum
from moeapps.moe.routing import Routing
from tests.moe.backends_common import (
    BANKS,
    ROUTINGS,
    D,
    E,
    F,
    K,
    N,
    WeightAt,
    by_backend,
    case,
    random_routing,
    value_and_gradients,
)


@pytest.mark.parametrize("weight_at", ["output", "input"])
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("backend", ["loop", "segments", "grouped_mm", "onehot"])
def test_backend_equals_the_reference(backend: Backend, routing: str, bank: str, weight_at: WeightAt) -> None:
    dtype = torch.float32 if backend == "grouped_mm" else torch.float64
    experts, x_ND, made = case(bank, routing, dtype)

    expected = value_and_gradients(partial(reference_sum, at_input=weight_at == "input"), experts, x_ND, made)
    actual = value_and_gradients(by_backend(backend, weight_at), experts, x_ND, made)

    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weight_at", ["output", "input"])
@pytest.mark.parametrize("bank", BANKS)
def test_segments_derivatives_are_right_to_second_order(bank: str, weight_at: WeightAt) -> None:
    torch.manual_seed(1)
    x_ND = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    small: dict[str, Callable[[], Experts]] = {
        "mlp": lambda: MLPExperts(3, 2, 3, activation="silu", bias=False),
        "mlp_bias": lambda: MLPExperts(3, 2, 3, activation="gelu", out_dim=1),
        "reglu": lambda: GLUExperts(3, 2, 3, activation="tanh"),
        "swiglu_bias": lambda: GLUExperts(3, 2, 3, bias=True, out_dim=1),
    }
    experts: Any = small[bank]().double()
    routing = random_routing(3, 3, 2)
    names, parameters = zip(*experts.named_parameters(), strict=True)

    def compute(x: Tensor, weight: Tensor, *values: Tensor) -> Tensor:
        plan = sort_assignments(replace(routing, weight_M=weight))
        ffn = replace(experts.feed_forward(), **dict(zip(names, values, strict=True)))
        return segments(ffn, x, plan, at_input=weight_at == "input")

    inputs = (x_ND, routing.weight_M, *parameters)
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs)


@pytest.mark.parametrize("backend", ["loop", "segments", "grouped_mm"])
def test_gradient_of_an_unchosen_expert_is_exactly_zero(backend: Backend) -> None:
    experts, x_ND, routing = case("mlp_bias", "empty_experts", torch.float32)

    run(experts, x_ND, sort_assignments(routing), backend=backend).square().sum().backward()

    for parameter in experts.parameters():
        assert not parameter.grad[[0, 3, 4]].any()
        assert parameter.grad[[1, 2]].any()


@pytest.mark.parametrize("backend", ["loop", "segments", "grouped_mm"])
def test_permuting_the_rows_permutes_the_output(backend: Backend) -> None:
    experts, x_ND, routing = case("swiglu_bias", "top_k", torch.float32)
    order_N = torch.randperm(N)
    permuted = Routing(
        routing.row_M,
        routing.expert_M.view(N, K)[order_N].flatten(),
        routing.weight_M.view(N, K)[order_N].flatten(),
        N,
        E,
        top_k=K,
    )

    y = run(experts, x_ND, sort_assignments(routing), backend=backend)
    y_permuted = run(experts, x_ND[order_N], sort_assignments(permuted), backend=backend)

    torch.testing.assert_close(y_permuted, y[order_N], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", [*get_args(ActivationName), nn.Softplus()])
@pytest.mark.parametrize("bank", [MLPExperts, GLUExperts])
@pytest.mark.parametrize("weight_at", ["output", "input"])
def test_segments_gives_the_same_when_it_overwrites_what_nobody_keeps(
    bank: type[Any], activation: Any, weight_at: WeightAt
) -> None:
    experts, x_ND = bank(E, D, F, activation=activation).double(), torch.randn(N, D, dtype=torch.float64)
    routing = random_routing(dtype=torch.float64)

    with torch.no_grad():
        found = run(experts, x_ND, sort_assignments(routing), backend="segments", weight_at=weight_at)

    torch.testing.assert_close(found, reference_sum(experts, x_ND, routing, at_input=weight_at == "input"))


@pytest.mark.parametrize("activation", [*get_args(ActivationName), nn.Softplus()])
@pytest.mark.parametrize("bank", [MLPExperts, GLUExperts])
def test_every_activation_has_the_right_derivative(bank: type[Any], activation: Any) -> None:
    experts = bank(E, D, F, activation=activation).double()
    x_ND = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    routing = random_routing()

    fast = value_and_gradients(by_backend("segments", "output"), experts, x_ND, routing)
    reference = value_and_gradients(by_backend("loop", "output"), experts, x_ND, routing)

    torch.testing.assert_close(fast, reference, rtol=1e-10, atol=1e-12)


def test_segments_in_many_chunks_equals_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeapps.moe.fast.chunks.MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr("moeapps.moe.fast.chunks.CHUNK_ELEMENTS", 4)
    for bank in BANKS:
        experts, x_ND, routing = case(bank, "sentinels", torch.float64)
        fast = value_and_gradients(by_backend("segments", "output"), experts, x_ND, routing)
        reference = value_and_gradients(by_backend("loop", "output"), experts, x_ND, routing)
        torch.testing.assert_close(fast, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "loop", "segments", "grouped_mm"])
@pytest.mark.parametrize("bank", BANKS)
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters_dtype(
    bank: str, backend: Backend
) -> None:
    experts, x_ND, routing = case(bank, "top_k", torch.float32)
    if backend == "grouped_mm" and experts.out_dim % 8:  # bfloat16 needs multiples of 8
        experts = GLUExperts(E, D, F, bias=True, out_dim=16)

    with torch.autocast("cpu", torch.bfloat16):
        y = run(experts, x_ND, sort_assignments(routing), backend=backend)
    y.float().square().sum().backward()

    reference = run(experts, x_ND, sort_assignments(routing), backend="loop")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference, rtol=0.05, atol=0.05)
    assert {p.grad.dtype for p in [x_ND, *experts.parameters()] if p.grad is not None} == {torch.float32}


def test_double_backward_through_auto_equals_the_loop() -> None:
    experts = MLPExperts(E, D, F).requires_grad_()
    x_ND = torch.randn(N, D, requires_grad=True)
    routing = random_routing(dtype=torch.float32)

    def penalty(backend: Backend) -> tuple[Tensor, ...]:
        y = run(experts, x_ND, sort_assignments(routing), backend=backend)
        (slope,) = torch.autograd.grad(y.square().sum(), x_ND, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x_ND, routing.weight_M, *experts.parameters()][:-1])

    reference = penalty("loop")
    for backend in ("auto", "segments", "grouped_mm"):
        torch.testing.assert_close(penalty(backend), reference, rtol=1e-4, atol=1e-5)


def test_auto_runs_under_torch_func_and_forward_mode() -> None:
    experts = MLPExperts(E, D, F)
    routing = random_routing(dtype=torch.float32)
    x_ND, t_ND = torch.randn(N, D), torch.randn(N, D)

    def compute(x: Tensor) -> Tensor:
        return run(experts, x, sort_assignments(routing))

    y, jvp = torch.func.jvp(compute, (x_ND,), (t_ND,))[:2]
    gradient = torch.func.grad(lambda x: compute(x).square().sum())(x_ND)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x_ND, t_ND)
        tangent = torch.autograd.forward_ad.unpack_dual(compute(dual)).tangent

    torch.testing.assert_close(tangent, jvp)
    (expected,) = torch.autograd.grad(compute(x_ND.requires_grad_()).square().sum(), x_ND)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, compute(x_ND), rtol=1e-4, atol=1e-5)


def test_side_inputs_reach_the_modules_with_their_rows() -> None:
    class Shift(nn.Module):
        def __init__(self, sign: float) -> None:
            super().__init__()
            self.sign = nn.Parameter(torch.tensor(sign))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return x + self.sign * time

    experts = ModuleExperts([Shift(1.0), Shift(-1.0)], in_dim=3, out_dim=3)
    x_ND, time_N1 = torch.randn(4, 3), torch.randn(4, 1)
    expert_N = torch.tensor([1, 0, 1, 1])
    plan = sort_assignments(Routing(torch.arange(4), expert_N, torch.ones(4), 4, 2, top_k=1))

    for backend in ("auto", "loop", "onehot"):
        y = run(experts, x_ND, plan, side=(time_N1,), backend=backend)
        torch.testing.assert_close(y, x_ND + (1 - 2 * expert_N[:, None]) * time_N1)


def test_errors_say_what_to_do() -> None:
    experts, x_ND, routing = case("mlp", "top_k", torch.float32)
    plan = sort_assignments(routing)

    with pytest.raises(ValueError, match="rows, but the routing was made for 11"):
        run(experts, x_ND[:-1], plan)
    with pytest.raises(ValueError, match="the bank has 3 experts, but the routing names 5"):
        run(experts.select([0, 1, 2]), x_ND, plan)
    with pytest.raises(ValueError, match="use one of auto, loop"):
        run(experts, x_ND, plan, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use 'output' or 'input'"):
        run(experts, x_ND, plan, weight_at="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, not torch\.float64"):
        run(experts.double(), x_ND.double(), plan, backend="grouped_mm")
    with pytest.raises(ValueError, match="multiples of 4"):
        run(MLPExperts(E, D, 7), x_ND, plan, backend="grouped_mm")
    with pytest.raises(ValueError, match="not a stacked two-layer network"):
        run(ModuleExperts([nn.Linear(D, D) for _ in range(E)]), x_ND, plan, backend="segments")
    with pytest.raises(ValueError, match="computes it twice"):
        run(MLPExperts(E, D, F, activation=nn.PReLU()), x_ND, plan, backend="segments")
    with pytest.raises(ValueError, match=r"convert one of them, or use torch\.autocast"):
        run(MLPExperts(E, D, F), x_ND.bfloat16(), plan)
    with pytest.raises(ValueError, match="names expert 9, but there are 5 experts"):
        sort_assignments(replace(routing, expert_M=torch.full_like(routing.expert_M, 9)))
