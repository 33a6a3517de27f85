# SPDX-License-Identifier: Apache-2.0
"""Routings and banks of every kind; every backend must equal the reference on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from moeapps.moe.backends import Backend, run, sort_assignments
from moeapps.moe.experts import Experts, GLUExperts, MLPExperts
from moeapps.moe.routing import Routing

N, D, F, E, K = 11, 8, 16, 5, 2
WeightAt = Literal["output", "input"]


def random_routing(
    num_rows: int = N, num_experts: int = E, top_k: int = K, dtype: torch.dtype = torch.float64, **kwargs: Any
) -> Routing:
    expert_M = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_rows)] or [torch.zeros(0).long()])
    row_M = torch.arange(num_rows).repeat_interleave(top_k)
    weight_M = torch.rand(num_rows * top_k, dtype=dtype, requires_grad=True)
    return Routing(row_M, expert_M.flatten(), weight_M, num_rows, num_experts, top_k=top_k, **kwargs)


def with_experts(expert_M: Tensor, dtype: torch.dtype, num_rows: int = N, **kwargs: Any) -> Routing:
    per_row = expert_M.numel() // max(num_rows, 1)
    row_M = torch.arange(num_rows).repeat_interleave(per_row)
    weight_M = torch.rand(expert_M.numel(), dtype=dtype, requires_grad=True)
    return Routing(row_M, expert_M, weight_M, num_rows, E, **kwargs)


def sentinels(dtype: torch.dtype) -> Routing:
    expert_M = torch.randint(0, E + 1, (N * 3,))
    return with_experts(expert_M, dtype, top_k=3)


def elsewhere(dtype: torch.dtype) -> Routing:
    """Targets that repeat, rows that are read several times or never, sentinels in between."""
    M = 20
    weight_M = torch.rand(M, dtype=dtype, requires_grad=True)
    return Routing(
        torch.randint(0, N, (M,)),
        torch.randint(0, E + 1, (M,)),
        weight_M,
        N,
        E,
        target_M=torch.randint(0, 7, (M,)),
        num_targets=7,
    )


ROUTINGS: dict[str, Callable[[torch.dtype], Routing]] = {
    "top_k": lambda dtype: random_routing(dtype=dtype),
    "sentinels": sentinels,
    "all_sentinels": lambda dtype: with_experts(torch.full((N,), E), dtype, top_k=1),
    "all_on_one": lambda dtype: with_experts(torch.full((N,), 3), dtype, top_k=1),
    "empty_experts": lambda dtype: with_experts(torch.randint(1, 3, (N * 2,)), dtype, top_k=2),
    "same_expert_twice": lambda dtype: with_experts(torch.ones(N * 2).long(), dtype, top_k=2),
    "elsewhere": elsewhere,
    "no_rows": lambda dtype: random_routing(0, dtype=dtype),
    "one_row": lambda dtype: random_routing(1, dtype=dtype),
    "every_expert": lambda dtype: random_routing(top_k=E, dtype=dtype),
}


BANKS: dict[str, Callable[[], Experts]] = {
    "mlp": lambda: MLPExperts(E, D, F, activation="silu", bias=False),
    "mlp_bias": lambda: MLPExperts(E, D, F, activation="gelu", out_dim=4),
    "reglu": lambda: GLUExperts(E, D, F, activation="relu"),
    "swiglu_bias": lambda: GLUExperts(E, D, F, activation="silu", bias=True, out_dim=12),
}


def value_and_gradients(
    compute: Callable[[Experts, Tensor, Routing], Tensor], experts: Experts, x_ND: Tensor, routing: Routing
) -> tuple[Tensor, ...]:
    y = compute(experts, x_ND, routing)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    inputs = [x_ND, routing.weight_M, *experts.parameters()]
    return y.detach(), *torch.autograd.grad(y, inputs, cotangent)


def by_backend(backend: Backend, weight_at: WeightAt) -> Callable[[Experts, Tensor, Routing], Tensor]:
    return lambda experts, x, routing: run(experts, x, sort_assignments(routing), backend=backend, weight_at=weight_at)


def case(bank: str, routing: str, dtype: torch.dtype) -> tuple[Any, Tensor, Routing]:
    experts = BANKS[bank]().to(dtype)
    made = ROUTINGS[routing](dtype)
    return experts, torch.randn(made.num_rows, D, dtype=dtype, requires_grad=True), made
