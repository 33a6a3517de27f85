# SPDX-License-Identifier: Apache-2.0
r"""Fast path of the CPU: one matrix product per expert into buffers, with a hand-written backward.

For the rows R of expert e, with ``h = x W_in + b_in``, ``a = f(h)`` (or ``f(gate) * up``) and ``y = a W_out + b_out``,
the output is ``sum_m w_m y_m``. Backward, with ``g`` the gradient of the output gathered to the rows:

    da     = g W_out^T                          dw     = <da, a> + <g, b_out>
    dW_out = a^T (w g)                          db_out = g^T w
    dh     = da * f'(h)                         dx     = w (dh W_in^T)
    dW_in  = (w x)^T dh                         db_in  = dh^T w

The weight ``w`` is multiplied into the narrow tensors only (x, g, dx). Only ``h`` is stored; ``a`` is computed again.
Rows are taken in chunks that stay in the cache, in scratch memory used again by each: gathers and elementwise steps run
once per chunk, matrix products once per block (the rows of one expert within the chunk). The weights' gradients are
written straight into one stacked buffer: nothing here costs O(E^2).

Shape legend: N rows, M sorted assignments, C rows of a chunk, R rows of a block, D, F, O widths, H = F or 2F when
gated, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeapps.moe.backends.loop import combine, weigh
from moeapps.moe.backends.memory import empty
from moeapps.moe.experts import FeedForward

if TYPE_CHECKING:
    from moeapps.moe.activation import Activation
    from moeapps.moe.backends.plan import Plan


_CHUNK_ROWS = 512  # enough for a matrix product at full speed, few enough for the scratch to stay in the cache


class _Chunk:
    """Consecutive sorted assignments, ``size`` of them, in blocks: ``sizes[i]`` rows for ``experts[i]``.

    ``firsts[i]`` says whether the block is the first of its expert, whose weight gradient it sets, or adds to it.
    """

    def __init__(self, start: int) -> None:
        self.start, self.size = start, 0
        self.sizes: list[int] = []
        self.experts: list[int] = []
        self.firsts: list[bool] = []

    def append(self, expert: int, size: int, first: bool) -> None:
        """Add a block at the end."""
        self.sizes.append(size)
        self.experts.append(expert)
        self.firsts.append(first)
        self.size += size

    @property
    def rows(self) -> slice:
        """Where the chunk lies in the sorted assignments."""
        return slice(self.start, self.start + self.size)

    def split(self, rows_C: Tensor) -> Sequence[Tensor]:
        """Cut a tensor with one row per row of the chunk into its blocks."""
        return (rows_C,) if len(self.sizes) == 1 else rows_C.split(self.sizes)


@dataclass(frozen=True)
class _Static:
    """What the function needs besides the tensors it is differentiated by."""

    activation: Activation
    gated: bool
    plan: Plan
    at_input: bool
    grad_enabled: bool


def segments_refusal(ffn: FeedForward) -> str | None:
    """Say why ``segments`` cannot run these experts, or None when it can."""
    if not ffn.activation.recomputable:
        return f"the activation {ffn.activation.name} has parameters or is random, and segments computes it twice"
    return None


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


def _chunks(counts: list[int]) -> list[_Chunk]:
    """Cut the sorted assignments into chunks of at most ``_CHUNK_ROWS`` rows.

    An expert with more rows is cut into equal parts; neighbours with few rows share a chunk.
    """
    chunks: list[_Chunk] = []
    for expert, count in enumerate(counts):
        num_parts = -(-count // _CHUNK_ROWS)
        for part in range(num_parts):
            size = count * (part + 1) // num_parts - count * part // num_parts
            if not chunks or chunks[-1].size + size > _CHUNK_ROWS:
                chunks.append(_Chunk(chunks[-1].rows.stop if chunks else 0))
            chunks[-1].append(expert, size, part == 0)
    return chunks


def _linear_out(
    x_CI: Tensor, weight_E: Sequence[Tensor], bias_E: Sequence[Tensor] | None, out_CO: Tensor, chunk: _Chunk
) -> None:
    """Write ``x W[e] + b[e]`` of every block into its rows of ``out``."""
    for e, x_RI, out_RO in zip(chunk.experts, chunk.split(x_CI), chunk.split(out_CO), strict=True):
        if bias_E is None:
            torch.mm(x_RI, weight_E[e], out=out_RO)
        else:
            torch.addmm(bias_E[e], x_RI, weight_E[e], out=out_RO)


def _forward(x_ND: Tensor, weight_M: Tensor, ffn: FeedForward, static: _Static, keep: bool) -> tuple[Tensor, Tensor]:
    """Output (targets, O) and pre-activations: all of them (M, H) when ``keep``, else scratch."""
    plan = static.plan
    chunks = _chunks(plan.counts)
    size = max((chunk.size for chunk in chunks), default=0)
    y_MO = empty(x_ND, (plan.num_assignments, ffn.w_out.shape[2]))
    h_MH = empty(x_ND, (plan.num_assignments if keep else size, ffn.w_in.shape[2]))
    x_buffer = x_ND.new_empty(size, ffn.w_in.shape[1])
    a_buffer = x_ND.new_empty(size, ffn.w_out.shape[1])
    w_in, w_out = ffn.w_in.unbind(0), ffn.w_out.unbind(0)
    b_in = None if ffn.b_in is None else ffn.b_in.unbind(0)
    b_out = None if ffn.b_out is None else ffn.b_out.unbind(0)
    for chunk in chunks:
        x_CD = torch.index_select(x_ND, 0, plan.row_M[chunk.rows], out=x_buffer[: chunk.size])
        if static.at_input:
            x_CD.mul_(weight_M[chunk.rows].unsqueeze(1))
        h_CH, a_CF = h_MH[chunk.rows] if keep else h_MH[: chunk.size], a_buffer[: chunk.size]
        _linear_out(x_CD, w_in, b_in, h_CH, chunk)
        _activate(static, h_CH, a_CF)
        _linear_out(a_CF, w_out, b_out, y_MO[chunk.rows], chunk)
    weight = None if static.at_input else weight_M
    return _scatter(y_MO, weight, plan.target_M, plan.num_targets, plan.inverse_NK), h_MH


def _activate(static: _Static, h_CH: Tensor, a_CF: Tensor) -> None:
    """Write what the second layer reads into ``a_CF``."""
    if not static.gated:
        static.activation.forward_out(h_CH, a_CF)
        return
    gate_CF, up_CF = h_CH.chunk(2, dim=1)
    static.activation.forward_out(gate_CF, a_CF)
    a_CF.mul_(up_CF)


def _scatter(
    values_MO: Tensor, weight_M: Tensor | None, index_M: Tensor, num_rows: int, inverse_NK: Tensor | None
) -> Tensor:
    """``out[index_m] += weight_m values_m``; with the inverse order known, as one fused weighted gather per row."""
    if inverse_NK is not None and num_rows:
        weight_NK = None if weight_M is None else weight_M[inverse_NK]
        return F.embedding_bag(inverse_NK, values_MO, mode="sum", per_sample_weights=weight_NK)
    if weight_M is not None:
        values_MO.mul_(weight_M.unsqueeze(1))
    return values_MO.new_zeros(num_rows, values_MO.shape[1]).index_add_(0, index_M, values_MO)


class _Backward:
    """One backward pass: buffers of the gradients that are asked for, scratch, and the work of one chunk."""

    def __init__(
        self, x_ND: Tensor, weight_M: Tensor, ffn: FeedForward, static: _Static, needs: Sequence[bool]
    ) -> None:
        plan = static.plan
        self.static, self.plan, self.ffn, self.x_ND, self.weight_M = static, plan, ffn, x_ND, weight_M
        self.chunks = _chunks(plan.counts)
        self.need_x, need_weight, need_w_in, need_b_in, need_w_out, need_b_out = needs
        self.dweight_M = torch.empty_like(weight_M) if need_weight else None
        self.dw_in = _gradient_buffer(ffn.w_in, plan.counts, need_w_in)
        self.db_in = _gradient_buffer(ffn.b_in, plan.counts, need_b_in)
        self.dw_out = _gradient_buffer(ffn.w_out, plan.counts, need_w_out)
        self.db_out = _gradient_buffer(ffn.b_out, plan.counts, need_b_out)
        # Which products are needed at all: frozen experts skip both weight products, a fixed x the last one.
        need_dx = self.need_x or (need_weight and static.at_input)
        self.need_dh = need_dx or need_w_in or need_b_in
        self.need_dot = need_weight and not static.at_input
        (d, h), (f, o) = ffn.w_in.shape[1:], ffn.w_out.shape[1:]
        size = max((chunk.size for chunk in self.chunks), default=0)
        self.dx_MD = empty(x_ND, (plan.num_assignments, d)) if need_dx else None
        self.x_buffer, self.g_buffer = x_ND.new_empty(size, d), x_ND.new_empty(size, o)
        self.a_buffer, self.da_buffer = x_ND.new_empty(size, f), x_ND.new_empty(size, f)
        self.s_buffer = x_ND.new_empty(size, f) if ffn.gated else self.a_buffer
        self.dh_buffer = x_ND.new_empty(size, h) if ffn.gated else self.da_buffer
        self.w_in_T, self.w_out_T = ffn.w_in.mT.unbind(0), ffn.w_out.mT.unbind(0)

    def run(self, grad_TO: Tensor, h_MH: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, w_in, b_in, w_out, b_out; None where not asked for."""
        plan = self.plan
        for chunk in self.chunks:
            g_CO = torch.index_select(grad_TO, 0, plan.target_M[chunk.rows], out=self.g_buffer[: chunk.size])
            dh_CH = self._second_layer(chunk, g_CO, h_MH[chunk.rows])
            if self.need_dh:
                self._first_layer(chunk, dh_CH)
        dx_ND = None
        if self.need_x and self.dx_MD is not None:
            dx_ND = _scatter(self.dx_MD, self.weight_M, plan.row_M, plan.num_rows, plan.inverse_NK)
        return dx_ND, self.dweight_M, self.dw_in, self.db_in, self.dw_out, self.db_out

    def _second_layer(self, chunk: _Chunk, g_CO: Tensor, h_CH: Tensor) -> Tensor:
        """Gradients of the second layer and of the weight; returns that of the pre-activations, without the weight."""
        num, weight_C = chunk.size, self.weight_M[chunk.rows]
        a_CF, s_CF = self.a_buffer[:num], self.s_buffer[:num]
        da_CF, dh_CH = self.da_buffer[:num], self.dh_buffer[:num]
        if self.static.gated:
            gate_CF, up_CF = h_CH.chunk(2, dim=1)
            self.static.activation.forward_out(gate_CF, s_CF)
            torch.mul(s_CF, up_CF, out=a_CF)
        else:
            self.static.activation.forward_out(h_CH, a_CF)
        if self.need_dh or self.need_dot:
            _linear_out(g_CO, self.w_out_T, None, da_CF, chunk)
        if self.need_dot:
            self._weight_gradient(chunk, g_CO, a_CF, da_CF)
        if not self.static.at_input:
            g_CO.mul_(weight_C.unsqueeze(1))
        _accumulate(self.dw_out, chunk, a_CF, g_CO)
        _accumulate_bias(self.db_out, chunk, g_CO, None)
        if self.need_dh:
            self._activation_backward(h_CH, s_CF, da_CF, dh_CH)
        return dh_CH

    def _weight_gradient(self, chunk: _Chunk, g_CO: Tensor, a_CF: Tensor, da_CF: Tensor) -> None:
        """``<da, a> + <g, b_out>``, which is ``<g, y>`` without y."""
        if self.dweight_M is None:
            return
        dot_C = torch.sum(a_CF * da_CF, dim=1, out=self.dweight_M[chunk.rows])
        if self.ffn.b_out is not None:
            for e, dot_R, g_RO in zip(chunk.experts, chunk.split(dot_C), chunk.split(g_CO), strict=True):
                dot_R.add_(torch.mv(g_RO, self.ffn.b_out[e]))

    def _activation_backward(self, h_CH: Tensor, s_CF: Tensor, da_CF: Tensor, dh_CH: Tensor) -> None:
        backward_out = self.static.activation.backward_out
        if not self.static.gated:
            backward_out(da_CF, h_CH, s_CF, dh_CH)
            return
        gate_CF, up_CF = h_CH.chunk(2, dim=1)
        dgate_CF, dup_CF = dh_CH.chunk(2, dim=1)
        torch.mul(da_CF, s_CF, out=dup_CF)
        da_CF.mul_(up_CF)
        backward_out(da_CF, gate_CF, s_CF, dgate_CF)

    def _first_layer(self, chunk: _Chunk, dh_CH: Tensor) -> None:
        """Gradients of the first layer and of the gathered rows; for a weight at the input, of that weight too."""
        weight_C = self.weight_M[chunk.rows]
        x_CD = torch.index_select(self.x_ND, 0, self.plan.row_M[chunk.rows], out=self.x_buffer[: chunk.size])
        if self.dx_MD is not None:
            dx_CD = self.dx_MD[chunk.rows]
            _linear_out(dh_CH, self.w_in_T, None, dx_CD, chunk)
            if self.static.at_input and self.dweight_M is not None:
                torch.sum(dx_CD * x_CD, dim=1, out=self.dweight_M[chunk.rows])
        _accumulate_bias(self.db_in, chunk, dh_CH, None if self.static.at_input else weight_C)
        if self.dw_in is not None:
            _accumulate(self.dw_in, chunk, x_CD.mul_(weight_C.unsqueeze(1)), dh_CH)


def _gradient_buffer(stack: Tensor | None, counts: list[int], needed: bool) -> Tensor | None:
    """Uninitialised gradient of a stack, except that the rows of idle experts are exactly zero."""
    if stack is None or not needed:
        return None
    buffer = empty(stack, stack.shape)
    for e, count in enumerate(counts):
        if not count:
            buffer[e].zero_()
    return buffer


def _accumulate(gradient: Tensor | None, chunk: _Chunk, left_CI: Tensor, right_CO: Tensor) -> None:
    """``gradient[e] (+)= left^T right``, set by the first block of an expert and added to by the later ones."""
    if gradient is None:
        return
    blocks = zip(chunk.experts, chunk.firsts, chunk.split(left_CI), chunk.split(right_CO), strict=True)
    for e, first, left_RI, right_RO in blocks:
        if first:
            torch.mm(left_RI.t(), right_RO, out=gradient[e])
        else:
            gradient[e].addmm_(left_RI.t(), right_RO)


def _accumulate_bias(gradient: Tensor | None, chunk: _Chunk, rows_CO: Tensor, weight_C: Tensor | None) -> None:
    """``gradient[e] (+)= sum of the rows``, weighted where a weight is given."""
    if gradient is None:
        return
    weights = [None] * len(chunk.sizes) if weight_C is None else chunk.split(weight_C)
    blocks = zip(chunk.experts, chunk.firsts, chunk.split(rows_CO), weights, strict=True)
    for e, first, rows_RO, weight_R in blocks:
        total_O = rows_RO.sum(0) if weight_R is None else torch.mv(rows_RO.t(), weight_R)
        if first:
            gradient[e].copy_(total_O)
        else:
            gradient[e].add_(total_O)


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
