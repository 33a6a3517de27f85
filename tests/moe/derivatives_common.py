# SPDX-License-Identifier: Apache-2.0
"""Layers of every kind, and what compares their derivatives to second order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeapps.moe import (
    Capacity,
    Chooser,
    Experts,
    GLUExperts,
    JoinedExperts,
    LinearScore,
    MLPExperts,
    ModuleExperts,
    MoELayer,
    Router,
)

D, F, COLUMNS = 8, 12, 6
Gradients = tuple[Tensor, ...]


def _modules(num_experts: int) -> Experts:
    return ModuleExperts([nn.Sequential(nn.Linear(D, F), nn.Tanh(), nn.Linear(F, D)) for _ in range(num_experts)])


def _joined(num_experts: int) -> Experts:
    if num_experts == 1:
        return JoinedExperts([MLPExperts(1, D, F)])
    return JoinedExperts([GLUExperts(1, D, F), MLPExperts(num_experts - 1, D, 4, activation="silu")])


BANKS: dict[str, Callable[[int], Experts]] = {
    "mlp": lambda e: MLPExperts(e, D, F, activation="tanh", bias=False),
    "mlp_bias": lambda e: MLPExperts(e, D, F, activation="gelu"),
    "swiglu": lambda e: GLUExperts(e, D, F),
    "geglu_bias": lambda e: GLUExperts(e, D, F, activation="gelu", bias=True),
    "own_activation": lambda e: MLPExperts(e, D, F, activation=nn.Softplus()),
    "joined": _joined,
    "modules": _modules,
}
STACKED = ("mlp", "mlp_bias", "swiglu", "geglu_bias", "own_activation", "joined")


def layer_of(
    choose: Chooser, bank: str, *, num_shared: int = 0, capacity: Capacity | None = None, **options: Any
) -> MoELayer:
    """A layer with a router that reads what the experts read."""
    router = Router(LinearScore(D, COLUMNS), choose, capacity=capacity)
    num_shared = max(num_shared, router.num_shared)
    return MoELayer(router, BANKS[bank](router.num_experts + num_shared), num_shared=num_shared, **options)


def loss_of(y: Tensor) -> Tensor:
    """Something of second order in y, the same at every call."""
    return (y * direction(y)).square().sum() + (y * direction(y)).sum()


def direction(t: Tensor) -> Tensor:
    """Numbers of the shape and dtype of ``t``, the same at every call."""
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(t)


def both_gradients(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Gradients, Gradients]:
    """Gradients of one graph as a plain backward gives them, and such as can be differentiated again."""
    plain = torch.autograd.grad(loss_of(y), inputs, retain_graph=True, materialize_grads=True)
    return plain, torch.autograd.grad(loss_of(y), inputs, create_graph=True, materialize_grads=True)


def derivatives(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Gradients, Gradients, Gradients]:
    """Both gradients, and the derivatives of the second in a fixed direction."""
    plain, graph = both_gradients(y, inputs)
    along = torch.stack([(g * direction(g)).sum() for g in graph]).sum()
    return plain, graph, torch.autograd.grad(along, inputs, materialize_grads=True)


def apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference over all tensors, in units of each tensor's largest entry."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(found, wanted, strict=True)]
    assert all(a.isfinite().all() and a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs if b.numel())
