# SPDX-License-Identifier: Apache-2.0
r"""Fast path of the CPU: one matrix product per expert into buffers, with a hand-written backward.

For the rows R of expert e, with ``h = x W_in + b_in``, ``a = f(h)`` (or ``f(gate) * up``) and ``y = a W_out + b_out``,
the output is ``sum_m w_m y_m``. Backward, with ``g`` the gradient of the output gathered to the rows:

    da     = g W_out^T                          dw     = <da, a> + <g, b_out>
    dW_out = a^T (w g)                          db_out = g^T w
    dh     = da * f'(h)                         dx     = w (dh W_in^T)
    dW_in  = (w x)^T dh                         db_in  = dh^T w

The weight ``w`` is multiplied into the narrow tensors only (x, g, dx). Only ``h`` is stored; ``a`` is computed again.
Rows are taken in blocks that stay in the cache, in scratch memory shared by all experts, and the weights' gradients are
written straight into one stacked buffer: nothing here costs O(E^2).

Shape legend: N rows, M sorted assignments, R rows of one block, D, F, O widths, H = F or 2F when gated, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeapps.moe.backends.loop import combine, weigh
from moeapps.moe.experts import FeedForward

if TYPE_CHECKING:
    from moeapps.moe.activation import Activation
    from moeapps.moe.backends.plan import Plan


_BLOCK_ROWS = (
    512  # rows of one matrix product: large enough for full speed, small enough for its scratch to stay cached
)


@dataclass(frozen=True)
class _Block:
    """Rows ``start .. stop`` of the sorted assignments, all of one expert; ``first`` of that expert or a later one."""

    expert: int
    start: int
    stop: int
    first: bool


def segments(ffn: FeedForward, x_ND: Tensor, plan: Plan, *, at_input: bool = False) -> Tensor:
    """Compute the weighted sum of the chosen experts, storing the pre-activations alone for backward.

    Under ``create_graph=True`` the backward pass runs through ordinary operations, so that it can be differentiated
    again; forward mode and ``torch.func`` need the ``loop`` backend.

    Args:
        ffn: Stacked weights; the activation must give the same values when computed twice.
        x_ND: Rows (N, D).
        plan: Sorted assignments.
        at_input: Multiply the weight into the row before the expert instead of into its output.

    Returns:
        (targets, O).
    """
    static = _Static(ffn.activation, ffn.gated, plan, at_input, torch.is_grad_enabled())
    weight_M = plan.weight_M.to(x_ND.dtype)
    y: Tensor = _Segments.apply(x_ND, weight_M, ffn.w_in, ffn.b_in, ffn.w_out, ffn.b_out, static)
    return y


@dataclass(frozen=True)
class _Static:
    """What the function needs besides the tensors it is differentiated by."""

    activation: Activation
    gated: bool
    plan: Plan
    at_input: bool
    grad_enabled: bool


class _Segments(torch.autograd.Function):
    """See the head of this file for the equations."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_M: Tensor,
        w_in: Tensor,
        b_in: Tensor | None,
        w_out: Tensor,
        b_out: Tensor | None,
        static: _Static,
    ) -> Tensor:
        keep = static.grad_enabled and any(ctx.needs_input_grad)
        ffn = FeedForward(w_in, b_in, w_out, b_out, static.activation, static.gated)
        y_TO, h_MH = _forward(x_ND, weight_M, ffn, static, keep)
        if keep:
            ctx.save_for_backward(x_ND, weight_M, w_in, b_in, w_out, b_out, h_MH)
            ctx.static = static
        return y_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_M, w_in, b_in, w_out, b_out, h_MH = ctx.saved_tensors
        static = ctx.static
        ffn = FeedForward(w_in, b_in, w_out, b_out, static.activation, static.gated)
        needs = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():
            return *_differentiable_backward(x_ND, weight_M, ffn, static, needs, grad_TO), None
        return *_Backward(x_ND, weight_M, ffn, static, needs).run(grad_TO, h_MH), None


def _blocks(counts: list[int]) -> list[_Block]:
    """Cut the segment of every busy expert into equal blocks of at most ``_BLOCK_ROWS`` rows."""
    blocks = []
    start = 0
    for expert, count in enumerate(counts):
        num_blocks = -(-count // _BLOCK_ROWS)
        for b in range(num_blocks):
            low, high = start + count * b // num_blocks, start + count * (b + 1) // num_blocks
            blocks.append(_Block(expert, low, high, b == 0))
        start += count
    return blocks


def _unbind(stack: Tensor | None, num_experts: int) -> Sequence[Tensor | None]:
    return [None] * num_experts if stack is None else stack.unbind(0)


def _linear_out(x_RI: Tensor, weight_IO: Tensor, bias_O: Tensor | None, out: Tensor) -> Tensor:
    if bias_O is None:
        return torch.mm(x_RI, weight_IO, out=out)
    return torch.addmm(bias_O, x_RI, weight_IO, out=out)


def _forward(x_ND: Tensor, weight_M: Tensor, ffn: FeedForward, static: _Static, keep: bool) -> tuple[Tensor, Tensor]:
    """Output (targets, O) and pre-activations: all of them (M, H) when ``keep``, else scratch."""
    plan = static.plan
    blocks = _blocks(plan.counts)
    size = max((b.stop - b.start for b in blocks), default=0)
    y_TO = x_ND.new_zeros(plan.num_targets, ffn.w_out.shape[2])
    h_MH = x_ND.new_empty(plan.num_assignments if keep else size, ffn.w_in.shape[2])
    x_buffer = x_ND.new_empty(size, ffn.w_in.shape[1])
    a_buffer = x_ND.new_empty(size, ffn.w_out.shape[1])
    y_buffer = x_ND.new_empty(size, ffn.w_out.shape[2])
    w_in, w_out = ffn.w_in.unbind(0), ffn.w_out.unbind(0)
    b_in, b_out = _unbind(ffn.b_in, len(w_in)), _unbind(ffn.b_out, len(w_in))
    for block in blocks:
        e, rows, num = block.expert, slice(block.start, block.stop), block.stop - block.start
        weight_R1 = weight_M[rows].unsqueeze(1)
        x_RD = torch.index_select(x_ND, 0, plan.row_M[rows], out=x_buffer[:num])
        if static.at_input:
            x_RD.mul_(weight_R1)
        h_RH = _linear_out(x_RD, w_in[e], b_in[e], h_MH[rows] if keep else h_MH[:num])
        a_RF = a_buffer[:num]
        _activate(static, h_RH, a_RF)
        y_RO = _linear_out(a_RF, w_out[e], b_out[e], y_buffer[:num])
        if not static.at_input:
            y_RO.mul_(weight_R1)
        y_TO.index_add_(0, plan.target_M[rows], y_RO)
    return y_TO, h_MH


def _activate(static: _Static, h_RH: Tensor, a_RF: Tensor) -> None:
    """Write what the second layer reads into ``a_RF``."""
    if not static.gated:
        static.activation.forward_out(h_RH, a_RF)
        return
    gate_RF, up_RF = h_RH.chunk(2, dim=1)
    static.activation.forward_out(gate_RF, a_RF)
    a_RF.mul_(up_RF)


class _Backward:
    """One backward pass: gradient buffers of what is asked for, scratch, and the work of one block."""

    def __init__(
        self, x_ND: Tensor, weight_M: Tensor, ffn: FeedForward, static: _Static, needs: Sequence[bool]
    ) -> None:
        plan = static.plan
        self.static, self.plan, self.ffn, self.x_ND, self.weight_M = static, plan, ffn, x_ND, weight_M
        self.blocks = _blocks(plan.counts)
        size = max((b.stop - b.start for b in self.blocks), default=0)
        need_x, need_weight, need_w_in, need_b_in, need_w_out, need_b_out = needs
        self.dx_ND = torch.zeros_like(x_ND) if need_x else None
        self.dweight_M = torch.empty_like(weight_M) if need_weight else None
        self.dw_in = _gradient_buffer(ffn.w_in, plan.counts, need_w_in)
        self.db_in = _gradient_buffer(ffn.b_in, plan.counts, need_b_in)
        self.dw_out = _gradient_buffer(ffn.w_out, plan.counts, need_w_out)
        self.db_out = _gradient_buffer(ffn.b_out, plan.counts, need_b_out)
        # Which products are needed at all: frozen experts skip both weight products, a fixed x the last one.
        self.need_dxs = need_x or (need_weight and static.at_input)
        self.need_dh = self.need_dxs or need_w_in or need_b_in
        self.need_dot = need_weight and not static.at_input
        self.x_buffer = x_ND.new_empty(size, ffn.w_in.shape[1])
        self.d_buffer = x_ND.new_empty(size, ffn.w_in.shape[1])
        self.g_buffer = x_ND.new_empty(size, ffn.w_out.shape[2])
        self.a_buffer = x_ND.new_empty(size, ffn.w_out.shape[1])
        self.da_buffer = x_ND.new_empty(size, ffn.w_out.shape[1])
        self.s_buffer = x_ND.new_empty(size, ffn.w_out.shape[1]) if ffn.gated else self.a_buffer
        self.dh_buffer = x_ND.new_empty(size, ffn.w_in.shape[2]) if ffn.gated else self.da_buffer
        self.w_in_E, self.w_out_E = ffn.w_in.unbind(0), ffn.w_out.unbind(0)
        self.b_out_E = _unbind(ffn.b_out, plan.num_experts)

    def run(self, grad_TO: Tensor, h_MH: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, w_in, b_in, w_out, b_out; None where not asked for."""
        for block in self.blocks:
            rows = slice(block.start, block.stop)
            num = block.stop - block.start
            g_RO = torch.index_select(grad_TO, 0, self.plan.target_M[rows], out=self.g_buffer[:num])
            dh_RH = self._second_layer(block, g_RO, h_MH[rows])
            if self.need_dh:
                self._first_layer(block, dh_RH)
        return self.dx_ND, self.dweight_M, self.dw_in, self.db_in, self.dw_out, self.db_out

    def _second_layer(self, block: _Block, g_RO: Tensor, h_RH: Tensor) -> Tensor:
        """Gradients of the second layer and of the weight; returns that of the pre-activations, without the weight."""
        e, rows, num = block.expert, slice(block.start, block.stop), block.stop - block.start
        a_RF, s_RF = self.a_buffer[:num], self.s_buffer[:num]
        if self.static.gated:
            self.static.activation.forward_out(h_RH.chunk(2, dim=1)[0], s_RF)
            torch.mul(s_RF, h_RH.chunk(2, dim=1)[1], out=a_RF)
        else:
            self.static.activation.forward_out(h_RH, a_RF)
        da_RF = self.da_buffer[:num]
        if self.need_dh or self.need_dot:
            torch.mm(g_RO, self.w_out_E[e].t(), out=da_RF)
        if self.need_dot and self.dweight_M is not None:
            dot_R = self.dweight_M[rows]
            torch.sum(a_RF * da_RF, dim=1, out=dot_R)
            bias_O = self.b_out_E[e]
            if bias_O is not None:
                dot_R.add_(torch.mv(g_RO, bias_O))
        if not self.static.at_input:
            g_RO.mul_(self.weight_M[rows].unsqueeze(1))
        _accumulate(self.dw_out, block, a_RF, g_RO)
        _accumulate_bias(self.db_out, block, g_RO)
        dh_RH = self.dh_buffer[:num]
        if self.need_dh:
            self._activation_backward(h_RH, s_RF, da_RF, dh_RH)
        return dh_RH

    def _activation_backward(self, h_RH: Tensor, s_RF: Tensor, da_RF: Tensor, dh_RH: Tensor) -> None:
        backward_out = self.static.activation.backward_out
        if not self.static.gated:
            backward_out(da_RF, h_RH, s_RF, dh_RH)
            return
        gate_RF, up_RF = h_RH.chunk(2, dim=1)
        dgate_RF, dup_RF = dh_RH.chunk(2, dim=1)
        torch.mul(da_RF, s_RF, out=dup_RF)
        da_RF.mul_(up_RF)
        backward_out(da_RF, gate_RF, s_RF, dgate_RF)

    def _first_layer(self, block: _Block, dh_RH: Tensor) -> None:
        e, rows, num = block.expert, slice(block.start, block.stop), block.stop - block.start
        row_R = self.plan.row_M[rows]
        weight_R1 = self.weight_M[rows].unsqueeze(1)
        x_RD = torch.index_select(self.x_ND, 0, row_R, out=self.x_buffer[:num])
        if self.need_dxs:
            dx_RD = torch.mm(dh_RH, self.w_in_E[e].t(), out=self.d_buffer[:num])
            if self.static.at_input and self.dweight_M is not None:
                torch.sum(dx_RD * x_RD, dim=1, out=self.dweight_M[rows])
            if self.dx_ND is not None:
                self.dx_ND.index_add_(0, row_R, dx_RD.mul_(weight_R1))
        if self.db_in is not None:
            bias_weight = None if self.static.at_input else self.weight_M[rows]
            _accumulate_bias(self.db_in, block, dh_RH, bias_weight)
        if self.dw_in is not None:
            _accumulate(self.dw_in, block, x_RD.mul_(weight_R1), dh_RH)


def _gradient_buffer(stack: Tensor | None, counts: list[int], needed: bool) -> Tensor | None:
    """Uninitialised gradient of a stack, except that the rows of idle experts are exactly zero."""
    if stack is None or not needed:
        return None
    buffer = torch.empty_like(stack, memory_format=torch.contiguous_format)
    for e, count in enumerate(counts):
        if not count:
            buffer[e].zero_()
    return buffer


def _accumulate(gradient: Tensor | None, block: _Block, left_RI: Tensor, right_RO: Tensor) -> None:
    """``gradient[e] (+)= left^T right``, set by the first block of an expert and added to by the later ones."""
    if gradient is None:
        return
    if block.first:
        torch.mm(left_RI.t(), right_RO, out=gradient[block.expert])
    else:
        gradient[block.expert].addmm_(left_RI.t(), right_RO)


def _accumulate_bias(gradient: Tensor | None, block: _Block, rows_RO: Tensor, weight_R: Tensor | None = None) -> None:
    """``gradient[e] (+)= sum of the rows``, weighted where a weight is given."""
    if gradient is None:
        return
    total_O = rows_RO.sum(0) if weight_R is None else torch.mv(rows_RO.t(), weight_R)
    if block.first:
        gradient[block.expert].copy_(total_O)
    else:
        gradient[block.expert].add_(total_O)


def _differentiable_backward(
    x_ND: Tensor, weight_M: Tensor, ffn: FeedForward, static: _Static, needs: Sequence[bool], grad_TO: Tensor
) -> tuple[Tensor | None, ...]:
    """The same gradients through ordinary operations, so that they can be differentiated again."""
    plan = static.plan
    inputs = (x_ND, weight_M, ffn.w_in, ffn.b_in, ffn.w_out, ffn.b_out)
    x_MD = x_ND.index_select(0, plan.row_M)
    y_MO = ffn.grouped(weigh(x_MD, weight_M) if static.at_input else x_MD, plan.counts)
    y_TO = combine(y_MO if static.at_input else weigh(y_MO, weight_M), plan)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    gradients = iter(torch.autograd.grad(y_TO, wanted, grad_TO, create_graph=True, allow_unused=True))
    return tuple(next(gradients) if need else None for need in needs)
