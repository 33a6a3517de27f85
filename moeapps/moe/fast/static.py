# SPDX-License-Identifier: Apache-2.0
"""Dispatch whose shapes do not depend on what was routed: for graphs that are traced once.

Used under ``torch.compile(fullgraph=True)``, ``torch.export`` and ``torch.func.vmap`` over routings. It makes these
possible and gains no time. For devices that must not wait there is ``grouped_mm_static`` in backends/grouped_mm.py.

* ``segments_static`` - the CPU's fast path as one operator, ``moeapps::segments``, opaque to the compiler. Its backward
  is a second one. Both look at the routing inside.
* ``every_expert`` - every expert on every row, E / k times the work: for banks without stacked two-layer weights.

Shape legend: N rows, M assignments with the sentinels, D, F, O widths, H = F or 2F when gated, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moeapps.moe.activation import resolve_activation
from moeapps.moe.derivatives import Gradients, first_gradients
from moeapps.moe.fast.memory import empty
from moeapps.moe.fast.segments import Backward, Static, by_operations, compute_forward
from moeapps.moe.feed_forward import FeedForward
from moeapps.moe.plan import sort_assignments, weigh
from moeapps.moe.routing import Routing

if TYPE_CHECKING:
    from moeapps.moe.experts import Experts

_ROUTING = "Tensor row, Tensor expert, Tensor? target, SymInt? top_k, SymInt num_targets"
_BANK = "Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, str activation, bool gated, bool at_input"


class _Call(NamedTuple):
    """The inputs that both operators share, in the order of their schemas."""

    x_ND: Tensor
    weight_M: Tensor
    row_M: Tensor
    expert_M: Tensor
    target_M: Tensor | None
    top_k: int | None
    num_targets: int
    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    activation: Any
    gated: bool
    at_input: bool

    def sorted(self) -> tuple[FeedForward, Static, Tensor]:
        """The bank, the plan with what else the passes of ``segments`` read, and the sorted weights."""
        ffn = FeedForward(*self[7:11], resolve_activation(self.activation), self.gated)
        num_rows, num_experts = self.x_ND.shape[0], self.w_in.shape[0]
        targets = (self.target_M, self.num_targets, self.top_k)
        plan = sort_assignments(Routing(self.row_M, self.expert_M, self.weight_M, num_rows, num_experts, *targets))
        return ffn, Static(ffn.activation, ffn.gated, plan, self.at_input, False), plan.weight_M


def segments_static(ffn: FeedForward, x_ND: Tensor, routing: Routing, *, at_input: bool = False) -> Tensor:
    """Compute the weighted sum of the chosen experts by the operator ``moeapps::segments``; see ``segments``.

    Pre-activations are kept for all M assignments, those of sentinels included: M is what the graph knows. The
    activation must be one of the table.
    """
    weight_M = routing.weight_M.to(x_ND.dtype)
    places = (routing.row_M, routing.expert_M, routing.target_M, routing.top_k, routing.num_outputs)
    bank = (ffn.w_in, ffn.b_in, ffn.w_out, ffn.b_out, ffn.activation.name, ffn.gated)
    y_TO: Tensor = _segments(x_ND, weight_M, *places, *bank, at_input, torch.is_grad_enabled())[0]
    return y_TO


@torch.library.custom_op(
    "moeapps::segments",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, {_ROUTING}, {_BANK}, bool keep) -> (Tensor, Tensor)",
)
def _segments(*values: Any) -> tuple[Tensor, Tensor]:
    """Output (targets, O), and the pre-activations (M, H), of no rows unless ``keep``."""
    call, keep = _Call(*values[:-1]), values[-1]
    ffn, static, sorted_M = call.sorted()
    h_MH = empty(call.x_ND, (call.expert_M.shape[0] if keep else 0, call.w_in.shape[2]))
    h_MH[static.plan.num_assignments :].zero_()
    return compute_forward(call.x_ND, sorted_M, ffn, static, h_MH if keep else None), h_MH


@_segments.register_fake
def _(*values: Any) -> tuple[Tensor, Tensor]:
    call, keep = _Call(*values[:-1]), values[-1]
    num_kept = call.expert_M.shape[0] if keep else 0
    return call.x_ND.new_empty(call.num_targets, call.w_out.shape[2]), call.x_ND.new_empty(num_kept, call.w_in.shape[2])


@torch.library.custom_op(
    "moeapps::segments_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor h, Tensor x, Tensor weight, {_ROUTING}, {_BANK}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _segments_backward(grad_TO: Tensor, h_MH: Tensor, *values: Any) -> tuple[Tensor, ...]:
    """Gradients of x, weight, w_in, b_in, w_out, b_out; an empty tensor where not asked for."""
    call, needs = _Call(*values[:-1]), values[-1]
    ffn, static, sorted_M = call.sorted()
    dx, dsorted_M, *rest = Backward(call.x_ND, sorted_M, ffn, static, needs).run(grad_TO.contiguous(), h_MH)
    dweight_M = None
    if dsorted_M is not None:  # a sentinel's weight has no effect
        dweight_M = torch.zeros_like(call.weight_M).index_copy_(0, static.plan.order_M, dsorted_M)
    return tuple(call.x_ND.new_empty(0) if found is None else found for found in (dx, dweight_M, *rest))


@_segments_backward.register_fake
def _(grad_TO: Tensor, h_MH: Tensor, *values: Any) -> tuple[Tensor, ...]:
    call, needs = _Call(*values[:-1]), values[-1]
    inputs = zip((call.x_ND, call.weight_M, *call[7:11]), needs, strict=True)
    return tuple(call.x_ND.new_empty(0) if t is None or not need else torch.empty_like(t) for t, need in inputs)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:5], *inputs[7:11])
    ctx.plain = inputs[5:7], inputs[11:14]


def _differentiate(ctx: Any, grad_TO: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    h_MH, *tensors = ctx.saved_tensors
    sizes, how = ctx.plain
    call = _Call(*tensors[:5], *sizes, *tensors[5:], *how)
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 7, 8, 9, 10)]

    def by_hand() -> Gradients:
        found = _segments_backward(grad_TO, h_MH, *call, needs)
        return tuple(g if need else None for g, need in zip(found, needs, strict=True))

    def forward(x_ND: Tensor, weight_M: Tensor, *stacks: Any) -> Tensor:
        _, static, sorted_M = _Call(x_ND, weight_M, *tensors[2:5], *sizes, *stacks, *how).sorted()
        return by_operations(static)(x_ND, sorted_M, *stacks)

    inputs = (call.x_ND, call.weight_M, *tensors[5:])
    dx, dweight, *rest = first_gradients(by_hand, forward, inputs, needs, grad_TO)
    return dx, dweight, *[None] * 5, *rest, *[None] * 4


_segments.register_autograd(_differentiate, setup_context=_keep_for_backward)


def every_expert(
    experts: Experts | FeedForward,
    x_ND: Tensor,
    routing: Routing,
    *,
    side: tuple[Tensor, ...] = (),
    at_input: bool = False,
) -> Tensor:
    """Compute the weighted sum of the chosen experts from the outputs of all; the bank has to offer ``every``.

    With ``at_input`` every expert runs on all M assignments. Else as ``backends.loop``, but for the routing.
    """
    num_experts = routing.num_experts
    weight_M = routing.weight_M.where(routing.expert_M < num_experts, 0)
    at_M = routing.row_M
    if at_input:
        x_ND = weigh(x_ND.index_select(0, at_M), weight_M)
        side = tuple(s.index_select(0, at_M) for s in side)
        at_M = torch.arange(at_M.shape[0], device=at_M.device)
    y_NEO = experts.every(x_ND, *side)
    y_MO = y_NEO.flatten(0, 1).index_select(0, at_M * num_experts + routing.expert_M.clamp(max=num_experts - 1))
    real_M = routing.expert_M < num_experts
    y_MO = weigh(y_MO, real_M.to(y_MO.dtype) if at_input else weight_M)
    return y_MO.new_zeros(routing.num_outputs, *y_MO.shape[1:]).index_add(0, routing.output_M, y_MO)
