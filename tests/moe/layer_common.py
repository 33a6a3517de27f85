# SPDX-License-Identifier: Apache-2.0
"""Small layers of every kind, and what one of their experts gives, for the tests of the layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeapps.moe import Dense, ExpertChoice, GatedShared, LinearScore, MLPExperts, MoELayer, Router, Slots, TopK, TopP

D, E = 6, 4


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def layer_of(choose: nn.Module, *, columns: int = E, num_shared: int = 0, **options: object) -> MoELayer:
    router = Router(LinearScore(D, columns), choose)
    bank = MLPExperts(router.num_experts + num_shared, D, 8, activation="tanh")
    return MoELayer(router, bank, num_shared=num_shared, **options).double()


def expert(layer: MoELayer, e: int, x: Tensor) -> Tensor:
    bank = layer.experts
    return torch.tanh(x @ bank.w_in[e] + bank.b_in[e]) @ bank.w_out[e] + bank.b_out[e]


def grads(y: Tensor, leaves: list[Tensor], probe: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * probe).sum(), leaves)


LAYERS: dict[str, Callable[[], MoELayer]] = {
    "top_k": lambda: layer_of(TopK(2)),
    "top_k_shared": lambda: layer_of(TopK(2), num_shared=2),
    "top_k_null": lambda: layer_of(TopK(2, num_null=1), columns=E + 1),
    "top_p": lambda: layer_of(TopP(0.7)),
    "top_p_gated": lambda: layer_of(GatedShared(TopP(0.7, num_null=1), 2), columns=E + 3, num_shared=2),
    "weight_at_input": lambda: layer_of(TopK(2), weight_at="input"),
    "expert_choice": lambda: layer_of(ExpertChoice(1.5)),
    "expert_choice_shared": lambda: layer_of(ExpertChoice(1.5), num_shared=1),
    "dense": lambda: layer_of(Dense()),
    "dense_shared": lambda: layer_of(Dense("sigmoid"), num_shared=1),
    "slots": lambda: layer_of(Slots(2), columns=2 * E),
    "slots_shared": lambda: layer_of(Slots(2), columns=2 * E, num_shared=1),
}
