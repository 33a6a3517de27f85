# SPDX-License-Identifier: Apache-2.0
"""Dispatch whose shapes do not depend on what was routed: for graphs traced once, and devices that must not wait.

Used under ``torch.compile(fullgraph=True)``, ``torch.export``, bfloat16 on CUDA and ``torch.func.vmap`` over routings.
It makes these possible; on a CPU it gains no time, and times on CUDA are not in core.json.

* ``segments_static`` - the CPU's fast path as one operator, ``moeapps::segments``, opaque to the compiler. Its backward
  is a second one. Both look at the routing inside.
* ``grouped_mm_static`` - ordinary operations on the device. Sentinels stay at the end of the sorted order, past the
  last offset, where grouped products leave memory as it is, in outputs as in gradients: such rows are masked on both
  sides.
* ``every_expert`` - every expert on every row, E / k times the work: for banks without stacked two-layer weights.

Shape legend: N rows, M assignments with the sentinels, D, F, O widths, H = F or 2F when gated, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeapps.moe.activation import resolve_activation
from moeapps.moe.backends.grouped_mm import grouped_linear
from moeapps.moe.backends.loop import weigh
from moeapps.moe.derivatives import Gradients, first_gradients
from moeapps.moe.fast.memory import empty
from moeapps.moe.fast.segments import Backward, Static, by_operations, compute_forward
from moeapps.moe.feed_forward import FeedForward
from moeapps.moe.plan import key_dtype, sort_assignments

if TYPE_CHECKING:
    from moeapps.moe.experts import Experts
    from moeapps.moe.feed_forward import BankPart
    from moeapps.moe.routing import Routing

_ROUTING = "Tensor row, Tensor expert, Tensor? target, SymInt? top_k, SymInt num_targets"
_BANK = "Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, str activation, bool gated, bool at_input"


def segments_static(ffn: FeedForward, x_ND: Tensor, routing: Routing, *, at_input: bool = False) -> Tensor:
    """Compute the weighted sum of the chosen experts by the operator ``moeapps::segments``; see ``segments``.

    Pre-activations are kept for all M assignments, those of sentinels included: M is what the graph knows.

    Args:
        ffn: Stacked weights; the activation must be one of the table.
        x_ND: Rows (N, D).
        routing: Sparse routing.
        at_input: Multiply the weight into the row before the expert instead of into its output.

    Returns:
        (targets, O).
    """
    y_TO: Tensor = _segments(
        x_ND,
        routing.weight_M.to(x_ND.dtype),
        routing.row_M,
        routing.expert_M,
        routing.target_M,
        routing.top_k,
        routing.num_outputs,
        ffn.w_in,
        ffn.b_in,
        ffn.w_out,
        ffn.b_out,
        ffn.activation.name,
        ffn.gated,
        at_input,
        torch.is_grad_enabled(),
    )[0]
    return y_TO


@torch.library.custom_op(
    "moeapps::segments",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, {_ROUTING}, {_BANK}, bool keep) -> (Tensor, Tensor)",
)
def _segments(
    x_ND: Tensor,
    weight_M: Tensor,
    row_M: Tensor,
    expert_M: Tensor,
    target_M: Tensor | None,
    top_k: int | None,
    num_targets: int,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: Any,
    gated: bool,
    at_input: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Output (targets, O), and the pre-activations (M, H), of no rows unless ``keep``."""
    ffn = FeedForward(w_in, b_in, w_out, b_out, resolve_activation(activation), gated)
    static, sorted_M = _sorted(x_ND, weight_M, row_M, expert_M, target_M, top_k, num_targets, ffn, at_input)
    h_MH = empty(x_ND, (expert_M.shape[0] if keep else 0, w_in.shape[2]))
    h_MH[static.plan.num_assignments :].zero_()
    return compute_forward(x_ND, sorted_M, ffn, static, h_MH if keep else None), h_MH


def _sorted(
    x_ND: Tensor,
    weight_M: Tensor,
    row_M: Tensor,
    expert_M: Tensor,
    target_M: Tensor | None,
    top_k: int | None,
    num_targets: int,
    ffn: FeedForward,
    at_input: bool,
) -> tuple[Static, Tensor]:
    """The plan with what else the passes of ``segments`` read, and the sorted weights."""
    from moeapps.moe.routing import Routing

    num_experts = ffn.w_in.shape[0]
    routing = Routing(row_M, expert_M, weight_M, x_ND.shape[0], num_experts, target_M, num_targets, top_k)
    plan = sort_assignments(routing)
    return Static(ffn.activation, ffn.gated, plan, at_input, False), plan.weight_M


@_segments.register_fake
def _(x_ND: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    expert_M, num_targets, w_in, w_out, keep = rest[2], rest[5], rest[6], rest[8], rest[13]
    num_kept = expert_M.shape[0] if keep else 0
    return x_ND.new_empty(num_targets, w_out.shape[2]), x_ND.new_empty(num_kept, w_in.shape[2])


@torch.library.custom_op(
    "moeapps::segments_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor h, Tensor x, Tensor weight, {_ROUTING}, {_BANK}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _segments_backward(
    grad_TO: Tensor,
    h_MH: Tensor,
    x_ND: Tensor,
    weight_M: Tensor,
    row_M: Tensor,
    expert_M: Tensor,
    target_M: Tensor | None,
    top_k: int | None,
    num_targets: int,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: Any,
    gated: bool,
    at_input: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, w_in, b_in, w_out, b_out; an empty tensor where not asked for."""
    ffn = FeedForward(w_in, b_in, w_out, b_out, resolve_activation(activation), gated)
    static, sorted_M = _sorted(x_ND, weight_M, row_M, expert_M, target_M, top_k, num_targets, ffn, at_input)
    dx, dsorted_M, *rest = Backward(x_ND, sorted_M, ffn, static, needs).run(grad_TO.contiguous(), h_MH)
    dweight_M = None
    if dsorted_M is not None:  # a sentinel's weight has no effect
        dweight_M = torch.zeros_like(weight_M).index_copy_(0, static.plan.order_M, dsorted_M)
    return tuple(x_ND.new_empty(0) if found is None else found for found in (dx, dweight_M, *rest))


@_segments_backward.register_fake
def _(*values: Any) -> tuple[Tensor, ...]:
    x_ND, weight_M, w_in, b_in, w_out, b_out = (values[i] for i in (2, 3, 9, 10, 11, 12))
    stacks = zip((x_ND, weight_M, w_in, b_in, w_out, b_out), values[16], strict=True)
    return tuple(x_ND.new_empty(0) if t is None or not need else torch.empty_like(t) for t, need in stacks)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_ND, weight_M, row_M, expert_M, target_M, top_k, num_targets, *bank, _ = inputs
    ctx.save_for_backward(output[1], x_ND, weight_M, row_M, expert_M, target_M, *bank[:4])
    ctx.plain = (top_k, num_targets, *bank[4:])


def _differentiate(ctx: Any, grad_TO: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    h_MH, x_ND, weight_M, row_M, expert_M, target_M, *stacks = ctx.saved_tensors
    top_k, num_targets, *how = ctx.plain
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 7, 8, 9, 10)]
    inputs = (x_ND, weight_M, *stacks)

    def by_hand() -> Gradients:
        found = _segments_backward(
            grad_TO, h_MH, x_ND, weight_M, row_M, expert_M, target_M, top_k, num_targets, *stacks, *how, needs
        )
        return tuple(g if need else None for g, need in zip(found, needs, strict=True))

    def forward(x_ND: Tensor, weight_M: Tensor, *stacks: Any) -> Tensor:
        (w_in, b_in, w_out, b_out), (activation, gated, at_input) = stacks, how
        ffn = FeedForward(w_in, b_in, w_out, b_out, resolve_activation(activation), gated)
        static, sorted_M = _sorted(x_ND, weight_M, row_M, expert_M, target_M, top_k, num_targets, ffn, at_input)
        return by_operations(static)(x_ND, sorted_M, *stacks)

    dx, dweight, *rest = first_gradients(by_hand, forward, inputs, needs, grad_TO)
    return dx, dweight, *[None] * 5, *rest, *[None] * 4


_segments.register_autograd(_differentiate, setup_context=_keep_for_backward)


def grouped_mm_static(ffn: FeedForward, x_ND: Tensor, routing: Routing, *, at_input: bool = False) -> Tensor:
    """Compute the weighted sum of the chosen experts with grouped products and nothing that the host has to see.

    Outputs are combined by the inverse permutation where every row has K assignments, so that results are the same to
    the bit from run to run; ``index_add`` on CUDA is not.

    Args:
        ffn: Stacked weights.
        x_ND: Rows (N, D), of a dtype and widths that ``grouped_mm`` takes.
        routing: Sparse routing.
        at_input: Multiply the weight into the row before the expert instead of into its output.

    Returns:
        (targets, O).
    """
    num_experts, num, top_k = routing.num_experts, routing.expert_M.shape[0], routing.top_k
    order_M = torch.sort(routing.expert_M.to(key_dtype(num_experts)), stable=True).indices
    offs_E = routing.counts().cumsum(0).to(torch.int32)
    place_M = torch.arange(num, device=x_ND.device)
    real_M1 = (place_M < offs_E[-1]).unsqueeze(1)
    expert_M = routing.expert_M.index_select(0, order_M).clamp(max=num_experts - 1)
    weight_M = routing.weight_M.index_select(0, order_M)
    x_MD = x_ND.index_select(0, routing.row_M.index_select(0, order_M))
    if at_input:
        x_MD = weigh(x_MD, weight_M)
    x_MD = x_MD.where(real_M1, 0)  # last, so that the undefined gradient of such a row reaches neither x nor a weight
    h_MH = grouped_linear(x_MD, ffn.w_in, ffn.b_in, offs_E, expert_M)
    if ffn.b_in is not None:  # the gradient of the bias adds up the rows
        h_MH = h_MH.where(real_M1, 0)
    y_MO = grouped_linear(ffn.hidden(h_MH), ffn.w_out, ffn.b_out, offs_E, expert_M).where(real_M1, 0)
    if not at_input:
        y_MO = weigh(y_MO, weight_M)
    if top_k is not None and routing.target_M is None:
        inverse_M = torch.zeros_like(order_M).scatter(0, order_M, place_M)
        y_TO: Tensor = y_MO.index_select(0, inverse_M).view(routing.num_rows, top_k, y_MO.shape[1]).sum(1)
        return y_TO
    target_M = routing.output_M.index_select(0, order_M)
    return y_MO.new_zeros(routing.num_outputs, y_MO.shape[1]).index_add(0, target_M, y_MO)


def every_expert(
    experts: Experts | BankPart,
    x_ND: Tensor,
    routing: Routing,
    *,
    side: tuple[Tensor, ...] = (),
    at_input: bool = False,
) -> Tensor:
    """Compute the weighted sum of the chosen experts from the outputs of all.

    Args:
        experts: The bank; it has to offer ``every``.
        x_ND: Rows (N, ...).
        routing: Sparse routing.
        side: Further inputs with N rows each.
        at_input: Multiply the weight into the row before the expert; then every expert runs on all M assignments.

    Returns:
        (targets, O).
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
