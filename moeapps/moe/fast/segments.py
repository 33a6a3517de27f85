# SPDX-License-Identifier: Apache-2.0
r"""Fast path of the CPU: one matrix product per expert into buffers, with a hand-written backward.

Used where the measured table says so (backends/table.py), the bank is large, or torch has several threads.
Gains with 64 experts (128 rows each): 1.04 x dense, where the plain loop takes 1.31 and grouped products 1.45; what is
kept for backward is 0.47 of the dense network's, where both others keep 1.30 (core.json, R=128, silu-mlp).

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moeapps.moe.derivatives import Gradients, first_gradients
from moeapps.moe.fast.chunks import Chunk, accumulate, accumulate_bias, gradient_buffer, linear_out, make_chunks
from moeapps.moe.fast.memory import empty, scratch
from moeapps.moe.fast.threads import expert_shares, is_observed, run_shares
from moeapps.moe.feed_forward import FeedForward
from moeapps.moe.plan import Plan, combine, weigh

if TYPE_CHECKING:
    from moeapps.moe.activation import Activation


@dataclass(frozen=True)
class Static:
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

    Differentiable any number of times: under ``create_graph=True`` the gradients are the same to the bit, and what is
    asked of them in turn runs through ordinary operations. Forward mode and ``torch.func`` need the ``loop`` backend,
    whose arguments and result these are; the activation must give the same values when computed twice.
    """
    static = Static(ffn.activation, ffn.gated, plan, at_input, torch.is_grad_enabled())
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
        static: Static,
    ) -> Tensor:
        keep = static.grad_enabled and any(ctx.needs_input_grad)
        ffn = FeedForward(w_in, b_in, w_out, b_out, static.activation, static.gated)
        h_MH = empty(x_ND, (static.plan.num_assignments, w_in.shape[2])) if keep else None
        y_TO = compute_forward(x_ND, weight_M, ffn, static, h_MH)
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
        inputs = (x_ND, weight_M, w_in, b_in, w_out, b_out)

        def by_hand() -> Gradients:
            return Backward(x_ND, weight_M, ffn, static, needs).run(grad_TO, h_MH)

        return *first_gradients(by_hand, by_operations(static), inputs, needs, grad_TO), None


def _scratch(static: Static, use: str, like: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Memory kept from call to call; fresh memory where a module of the user's runs in between."""
    if static.activation.tabulated:
        return scratch(use, like, shapes)
    return [like.new_empty(shape) for shape in shapes]


def _shares(static: Static, like: Tensor) -> list[range]:
    """Experts of each thread; all on one where the work cannot be handed to others."""
    alone = like.device.type != "cpu" or not static.activation.tabulated or is_observed()
    return expert_shares(static.plan.counts, 1 if alone else torch.get_num_threads())


def compute_forward(x_ND: Tensor, weight_M: Tensor, ffn: FeedForward, static: Static, h_MH: Tensor | None) -> Tensor:
    """Output (targets, O); the pre-activations go into the first M rows of ``h_MH``, where they are to be kept."""
    plan = static.plan
    (y_MO,) = _scratch(static, "rows", x_ND, [(plan.num_assignments, ffn.w_out.shape[2])])
    w_in, w_out = ffn.w_in.unbind(0), ffn.w_out.unbind(0)
    b_in = None if ffn.b_in is None else ffn.b_in.unbind(0)
    b_out = None if ffn.b_out is None else ffn.b_out.unbind(0)

    def work(share: range) -> None:
        chunks = make_chunks(plan.counts, share, ffn.w_in.shape[2])
        size = max((chunk.size for chunk in chunks), default=0)
        (d, wide), narrow = ffn.w_in.shape[1:], ffn.w_out.shape[1]
        widths = (d, wide, 0) if h_MH is None else (d, 0, narrow)
        x_buffer, h_buffer, a_buffer = _scratch(static, "chunk", x_ND, [(size, width) for width in widths])
        for chunk in chunks:
            x_CD = torch.index_select(x_ND, 0, plan.row_M[chunk.rows], out=x_buffer[: chunk.size])
            if static.at_input:
                x_CD.mul_(weight_M[chunk.rows].unsqueeze(1))
            h_CH = h_buffer[: chunk.size] if h_MH is None else h_MH[chunk.rows]
            a_CF = h_CH[:, :narrow] if h_MH is None else a_buffer[: chunk.size]  # in place where h is not kept
            linear_out(x_CD, w_in, b_in, h_CH, chunk)
            _activate(static, h_CH, a_CF, a_CF)
            linear_out(a_CF, w_out, b_out, y_MO[chunk.rows], chunk)

    run_shares(work, _shares(static, x_ND))
    weight = None if static.at_input else weight_M
    return _scatter(y_MO, weight, plan.target_M, plan.num_targets, plan.inverse_NK)


def _activate(static: Static, h_CH: Tensor, s_CF: Tensor, a_CF: Tensor) -> None:
    """Write the activation into ``s_CF`` and what the second layer reads into ``a_CF``; they may be the same memory."""
    gate_CF, *up = h_CH.chunk(2, dim=1) if static.gated else (h_CH,)
    static.activation.forward_out(gate_CF, s_CF)
    if up:
        torch.mul(s_CF, up[0], out=a_CF)


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


class _Buffers(NamedTuple):
    """Memory of one chunk, used again by the next; ``s`` and ``dh`` are ``a`` and ``da`` unless the bank is gated."""

    x_CD: Tensor
    g_CO: Tensor
    a_CF: Tensor
    da_CF: Tensor
    product_CF: Tensor
    s_CF: Tensor
    dh_CH: Tensor

    @classmethod
    def of(cls, ffn: FeedForward, static: Static, like: Tensor, size: int) -> _Buffers:
        """Take the memory for chunks of up to ``size`` rows."""
        (d, h), (f, o) = ffn.w_in.shape[1:], ffn.w_out.shape[1:]
        widths = [d, o, f, f, f, f, h] if ffn.gated else [d, o, f, f, f]
        taken = _scratch(static, "chunk", like, [(size, width) for width in widths])
        if not ffn.gated:
            taken += [taken[2], taken[3]]
        return cls(*taken)

    def first(self, size: int) -> _Buffers:
        """Views of the first ``size`` rows."""
        return _Buffers(*(buffer[:size] for buffer in self))


class Backward:
    """One backward pass: buffers of the gradients that are asked for, and the work of one chunk."""

    def __init__(self, x_ND: Tensor, weight_M: Tensor, ffn: FeedForward, static: Static, needs: Sequence[bool]) -> None:
        plan = static.plan
        self.static, self.plan, self.ffn, self.x_ND, self.weight_M = static, plan, ffn, x_ND, weight_M
        self.need_x, need_weight, need_w_in, need_b_in, need_w_out, need_b_out = needs
        self.dweight_M = torch.empty_like(weight_M) if need_weight else None
        self.dw_in = gradient_buffer(ffn.w_in, plan.counts, need_w_in)
        self.db_in = gradient_buffer(ffn.b_in, plan.counts, need_b_in)
        self.dw_out = gradient_buffer(ffn.w_out, plan.counts, need_w_out)
        self.db_out = gradient_buffer(ffn.b_out, plan.counts, need_b_out)
        # Which products are needed at all: frozen experts skip both weight products, a fixed x the last one.
        need_dx = self.need_x or (need_weight and static.at_input)
        self.need_dh = need_dx or need_w_in or need_b_in
        self.need_dot = need_weight and not static.at_input
        rows = [(plan.num_assignments, x_ND.shape[1])] if need_dx else []
        self.dx_MD = next(iter(_scratch(static, "rows", x_ND, rows)), None)
        self.w_in_T, self.w_out_T = ffn.w_in.mT.unbind(0), ffn.w_out.mT.unbind(0)

    def run(self, grad_TO: Tensor, h_MH: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, w_in, b_in, w_out, b_out; None where not asked for."""
        plan = self.plan

        def work(share: range) -> None:
            chunks = make_chunks(plan.counts, share, self.ffn.w_in.shape[2])
            size = max((chunk.size for chunk in chunks), default=0)
            buffers = _Buffers.of(self.ffn, self.static, self.x_ND, size)
            for chunk in chunks:
                own = buffers.first(chunk.size)
                torch.index_select(grad_TO, 0, plan.target_M[chunk.rows], out=own.g_CO)
                self._second_layer(chunk, own, h_MH[chunk.rows])
                if self.need_dh:
                    self._first_layer(chunk, own)

        run_shares(work, _shares(self.static, self.x_ND))
        dx_ND = None
        if self.need_x and self.dx_MD is not None:
            dx_ND = _scatter(self.dx_MD, self.weight_M, plan.row_M, plan.num_rows, plan.inverse_NK)
        return dx_ND, self.dweight_M, self.dw_in, self.db_in, self.dw_out, self.db_out

    def _second_layer(self, chunk: Chunk, own: _Buffers, h_CH: Tensor) -> None:
        """Gradients of the second layer and of the weight; leaves that of the pre-activations, without the weight."""
        _activate(self.static, h_CH, own.s_CF, own.a_CF)
        if self.need_dh or self.need_dot:
            linear_out(own.g_CO, self.w_out_T, None, own.da_CF, chunk)
        if self.need_dot:
            self._weight_gradient(chunk, own)
        if not self.static.at_input:
            own.g_CO.mul_(self.weight_M[chunk.rows].unsqueeze(1))
        accumulate(self.dw_out, chunk, own.a_CF, own.g_CO)
        accumulate_bias(self.db_out, chunk, own.g_CO, None)
        if self.need_dh:
            self._activation_backward(h_CH, own)

    def _weight_gradient(self, chunk: Chunk, own: _Buffers) -> None:
        """``<da, a> + <g, b_out>``, which is ``<g, y>`` without y."""
        if self.dweight_M is None:
            return
        torch.mul(own.a_CF, own.da_CF, out=own.product_CF)
        dot_C = torch.sum(own.product_CF, dim=1, out=self.dweight_M[chunk.rows])
        if self.ffn.b_out is not None:
            for e, dot_R, g_RO in zip(chunk.experts, chunk.split(dot_C), chunk.split(own.g_CO), strict=True):
                dot_R.add_(torch.mv(g_RO, self.ffn.b_out[e]))

    def _activation_backward(self, h_CH: Tensor, own: _Buffers) -> None:
        backward_out = self.static.activation.backward_out
        if not self.static.gated:
            backward_out(own.da_CF, h_CH, own.s_CF, own.dh_CH)
            return
        gate_CF, up_CF = h_CH.chunk(2, dim=1)
        dgate_CF, dup_CF = own.dh_CH.chunk(2, dim=1)
        torch.mul(own.da_CF, own.s_CF, out=dup_CF)
        own.da_CF.mul_(up_CF)
        backward_out(own.da_CF, gate_CF, own.s_CF, dgate_CF)

    def _first_layer(self, chunk: Chunk, own: _Buffers) -> None:
        """Gradients of the first layer and of the gathered rows; for a weight at the input, of that weight too."""
        weight_C = self.weight_M[chunk.rows]
        x_CD = torch.index_select(self.x_ND, 0, self.plan.row_M[chunk.rows], out=own.x_CD)
        if self.dx_MD is not None:
            dx_CD = self.dx_MD[chunk.rows]
            linear_out(own.dh_CH, self.w_in_T, None, dx_CD, chunk)
            if self.static.at_input and self.dweight_M is not None:
                torch.sum(dx_CD * x_CD, dim=1, out=self.dweight_M[chunk.rows])
        accumulate_bias(self.db_in, chunk, own.dh_CH, None if self.static.at_input else weight_C)
        if self.dw_in is not None:
            accumulate(self.dw_in, chunk, x_CD.mul_(weight_C.unsqueeze(1)), own.dh_CH)


def by_operations(static: Static) -> Callable[..., Tensor]:
    """The forward pass of the six tensors through ordinary operations, for derivatives of the derivatives."""
    plan = static.plan

    def forward(
        x_ND: Tensor, weight_M: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None
    ) -> Tensor:
        ffn = FeedForward(w_in, b_in, w_out, b_out, static.activation, static.gated)
        x_MD = x_ND.index_select(0, plan.row_M)
        y_MO = ffn.grouped(weigh(x_MD, weight_M) if static.at_input else x_MD, plan.counts)
        return combine(y_MO if static.at_input else weigh(y_MO, weight_M), plan)

    return forward
