# SPDX-License-Identifier: Apache-2.0
"""The whole layer on one page: route every row, run the experts one after the other, add up what they give.

Read this file first. ``MoELayer`` computes the same numbers and gradients faster, and the tests compare it and every
backend with this page. Nothing here calls a backend, sorts rows or saves work.

Shape legend: N rows, R rows of one expert, M assignments, G gates, E experts, S slots of an expert, D and O widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeapps.moe.experts import Experts
from moeapps.moe.layer import MoELayer
from moeapps.moe.routing import DenseRouting, Routing, SlotRouting


def reference_layer(layer: MoELayer, x_ND: Tensor, group_N: Tensor | None = None) -> Tensor:
    """The weighted sum of a layer's experts, (N, O), or (G, N, O) for a router with gates."""
    routing = layer.route(x_ND, group=group_N)  # 1. route: which rows go to which experts, with which weights
    experts, at_input = layer.experts, layer.weight_at == "input"
    ids = range(layer.num_experts)
    if isinstance(routing, Routing):  # sparse: each expert has its own rows
        y = reference_sum(experts, x_ND, routing, at_input=at_input)
    elif isinstance(routing, DenseRouting):  # dense: every expert has all rows
        y = sum((weighed(experts, e, x_ND, routing.weight[..., e], at_input) for e in ids), x_ND.new_zeros(()))
    else:  # slots: expert e has S mixtures of the rows, and each row gets a mixture of what came out
        assert isinstance(routing, SlotRouting)
        slots_ESD = torch.einsum("nes,nd->esd", routing.dispatch, x_ND)
        y = sum((routing.combine[:, e] @ expert(experts, e, slots_ESD[e]) for e in ids), x_ND.new_zeros(()))
    for s in range(layer.num_shared):  # shared experts, the last of the bank: every row, with weight 1 or a given one
        given = routing.shared_weight_NS
        weight_N = torch.ones_like(x_ND[:, 0]) if given is None else given[:, s]
        y = y + weighed(experts, layer.num_experts + s, x_ND, weight_N, at_input)
    return y


def reference_sum(experts: Experts, x_ND: Tensor, routing: Routing, *, at_input: bool = False) -> Tensor:
    """Sum of ``w_m E_m(x[row_m])`` over the assignments m of each output row, (outputs, O)."""
    y_NO = x_ND.new_zeros(routing.num_outputs, experts.out_dim)
    for e in range(experts.num_experts):  # 2. loop over the experts; id E, "no work", is never reached
        mine_R = (routing.expert_M == e).nonzero()[:, 0]
        y_RO = weighed(experts, e, x_ND[routing.row_M[mine_R]], routing.weight_M[mine_R], at_input)
        y_NO = y_NO.index_add(0, routing.output_M[mine_R], y_RO)  # 3. combine: add to the rows they belong to
    return y_NO


def weighed(experts: Experts, e: int, x_RD: Tensor, weight: Tensor, at_input: bool) -> Tensor:
    """``w E_e(x)``, or ``E_e(w x)`` where weights multiply the input."""
    return expert(experts, e, weight[:, None] * x_RD) if at_input else weight[..., None] * expert(experts, e, x_RD)


def expert(experts: Experts, e: int, x_RD: Tensor) -> Tensor:
    """One expert on its rows: two linear layers with an activation, or a module of any kind."""
    stack = experts.feed_forward()
    if stack is None:
        return experts.every(x_RD)[:, e]
    h_RH = x_RD @ stack.w_in[e] + (0 if stack.b_in is None else stack.b_in[e])
    if stack.gated:
        gate_RF, up_RF = h_RH.chunk(2, dim=-1)
        a_RF = stack.activation.function(gate_RF) * up_RF
    else:
        a_RF = stack.activation.function(h_RH)
    return a_RF @ stack.w_out[e] + (0 if stack.b_out is None else stack.b_out[e])
