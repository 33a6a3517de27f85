# SPDX-License-Identifier: Apache-2.0
r"""The views of `FeatureGates` without waste: few products, and elementwise steps on rows that stay in the cache.

With ``u_l = x B_l A_l / 2``, ``t_l = tanh(u_l)``, ``s = softmax(G x)`` a view is ``x + x sum_l s_l t_l``. Backward,
with ``g`` its gradient and ``p = g x``:

    ds_l = <p, t_l>              du_l = s_l p (1 - t_l^2)          dx = g (1 + sum_l s_l t_l) + ...

All first matrices (and those of the softmax, one column each) are one product per state; all second ones a batched
product per chunk of rows. The shares ``s`` are multiplied into narrow tensors only, where that is possible. Kept for
backward are ``t`` and what is as narrow as the rank.

Shape legend: N rows, C rows of a chunk, S states, d width of a state, V views, L low-rank gates of a view, Q = V L,
r rank, k = r + 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeapps.moe.derivatives import Gradients, first_gradients
from moeapps.moe.fast.memory import empty, scratch
from moeapps.moe.view_linear import runs

_CHUNK_ELEMENTS = 160 << 10  # of one of the tensors (Q, C, d) of a chunk: 640 KiB in float32
_MIN_CHUNK_ROWS = 64


def feature_views(
    x_SNd: Tensor,
    down: Tensor,
    up: Tensor,
    mix: Tensor,
    mix_bias: Tensor,
    views: tuple[int, ...],
    by_operations: Callable[..., Tensor],
) -> Tensor:
    """Views [V, N, d] of states [S, N, d].

    Args:
        x_SNd: the states.
        down: first matrices, [V, d, L r].
        up: second matrices, [V, L, r, d].
        mix: matrices of the softmax, [V, d, L].
        mix_bias: its biases, [V, L].
        views: for each view the state it is made of.
        by_operations: the same of the same arguments, for derivatives of derivatives.
    """
    if not torch.is_grad_enabled():
        return _Pass(x_SNd, down, up, mix, mix_bias, views).forward(None)
    y: Tensor = _Views.apply(x_SNd, down, up, mix, mix_bias, views, by_operations)
    return y


class _Views(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x_SNd, down, up, mix, mix_bias, ctx.views, ctx.by_operations = arguments
        made = _Pass(x_SNd, down, up, mix, mix_bias, ctx.views)
        tanh = empty(x_SNd, (made.num_rows * made.size,))
        view_VNd = made.forward(tanh)
        ctx.save_for_backward(x_SNd, down, up, mix, mix_bias, made.both_NQk, made.share_VLN, tanh)
        return view_VNd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_SNd, down, up, mix, mix_bias, both_NQk, share_VLN, tanh = ctx.saved_tensors
        inputs = (x_SNd, down, up, mix, mix_bias)
        views, needs = ctx.views, ctx.needs_input_grad[:5]

        def by_hand() -> Gradients:
            made = _Pass(x_SNd, down, up, mix, mix_bias, views, both_NQk, share_VLN)
            found = made.backward(tanh, grads[0])
            return tuple(gradient if need else None for gradient, need in zip(found, needs, strict=True))

        def forward(*inputs: Tensor) -> Tensor:
            again: Tensor = ctx.by_operations(*inputs, views)
            return again

        return *first_gradients(by_hand, forward, inputs, needs, grads[0]), None, None


@dataclass
class _Pass:
    """One pass over a batch; the narrow tensors are made at once, the wide ones chunk by chunk."""

    x_SNd: Tensor
    down: Tensor
    up: Tensor
    mix: Tensor
    mix_bias: Tensor
    views: tuple[int, ...]
    both_NQk: Tensor | None = None
    share_VLN: Tensor | None = None

    def __post_init__(self) -> None:
        self.num_views, self.num_low, self.rank, self.width = self.up.shape
        self.num_rows = self.x_SNd.shape[1]
        self.size = self.num_views * self.num_low * self.width  # elements of a row of the wide tensors
        self.runs = list(runs(self.views))
        first = self.down.transpose(0, 1).unflatten(2, (self.num_low, self.rank))
        self.weight_dVLk = torch.cat([first, self.mix.transpose(0, 1).unsqueeze(3)], 3)
        self.up_Qrd = (0.5 * self.up).flatten(0, 1)
        self.index = None if len(self.runs) == 1 else torch.tensor(self.views, device=self.x_SNd.device)
        if self.both_NQk is None:
            self.both_NQk, self.share_VLN = self._narrow()

    def _narrow(self) -> tuple[Tensor, Tensor]:
        """What the second matrices read, with the logits of the softmax behind it; and the softmax."""
        both_NQk = self.x_SNd.new_empty(self.num_rows, self.num_views * self.num_low, self.rank + 1)
        for state, start, stop in self.runs:
            torch.mm(
                self.x_SNd[state], self._columns(self.weight_dVLk, start, stop), out=self._of_run(both_NQk, start, stop)
            )
        logit_QN = self.x_SNd.new_empty(both_NQk.shape[1], self.num_rows)
        torch.add(both_NQk[:, :, -1].t(), self.mix_bias.view(-1, 1), out=logit_QN)
        return both_NQk, logit_QN.view(self.num_views, self.num_low, -1).softmax(1)

    def forward(self, tanh: Tensor | None) -> Tensor:
        """The views; the hyperbolic tangents go into ``tanh``, chunk by chunk, where they are to be kept."""
        view_NVd = self.x_SNd.new_empty(self.num_rows, self.num_views, self.width)
        for start, stop in self._chunks():
            t_QCd, gate_VCd = self._wide(stop - start, self.num_low), self._wide(stop - start, 1, "gate").squeeze(1)
            if tanh is not None:
                t_QCd = tanh[start * self.size : stop * self.size].view_as(t_QCd)
            torch.bmm(self._low(self.both_NQk, start, stop), self.up_Qrd, out=t_QCd.flatten(0, 1))
            self._gate(t_QCd.tanh_(), start, stop, gate_VCd)
            x_VCd = self._x(start, stop)
            torch.addcmul(x_VCd, x_VCd, gate_VCd, out=view_NVd[start:stop].transpose(0, 1))
        return view_NVd.transpose(0, 1)

    def backward(self, tanh: Tensor, grad_VNd: Tensor) -> tuple[Tensor, ...]:
        """Gradients of states and parameters."""
        assert self.both_NQk is not None
        assert self.share_VLN is not None
        dboth_NQk, dot_VLN = torch.empty_like(self.both_NQk), torch.empty_like(self.share_VLN)
        share_NQ1 = self.share_VLN.flatten(0, 1).t().unsqueeze(2)
        low_NQr = self.both_NQk[:, :, :-1] * share_NQ1
        dup_Qrd = torch.zeros_like(self.up_Qrd)
        dx_NSd = self.x_SNd.new_zeros(self.num_rows, len(self.x_SNd), self.width)
        for start, stop in self._chunks():
            q_VLCd, gate_VCd = self._wide(stop - start, self.num_low), self._wide(stop - start, 1, "gate").squeeze(1)
            t_VLCd = tanh[start * self.size : stop * self.size].view_as(q_VLCd)
            g_VCd = grad_VNd[:, start:stop]
            self._gate(t_VLCd, start, stop, gate_VCd)
            torch.addcmul(g_VCd, g_VCd, gate_VCd, out=gate_VCd)
            for state, first, last in self.runs:
                dx_NSd[start:stop, state] += gate_VCd[first:last].sum(0)
            p_V1Cd = torch.mul(g_VCd, self._x(start, stop), out=gate_VCd).unsqueeze(1)
            torch.mul(p_V1Cd, t_VLCd, out=q_VLCd)
            torch.sum(q_VLCd, -1, out=dot_VLN[:, :, start:stop])
            du_QCd = torch.addcmul(p_V1Cd, q_VLCd, t_VLCd, value=-1, out=q_VLCd).flatten(0, 1)  # but for the share
            self._low(dboth_NQk, start, stop).copy_(torch.bmm(du_QCd, self.up_Qrd.mT))  # out= there is a loop over Q
            torch.baddbmm(dup_Qrd, low_NQr[start:stop].permute(1, 2, 0), du_QCd, out=dup_Qrd)
        dboth_NQk[:, :, :-1].mul_(share_NQ1)
        dot_VLN.mul_(self.share_VLN)
        dmix_VLN = torch.addcmul(dot_VLN, self.share_VLN, dot_VLN.sum(1, keepdim=True), value=-1)
        dboth_NQk[:, :, -1] = dmix_VLN.flatten(0, 1).t()
        dweight_dVLk = torch.empty_like(self.weight_dVLk)
        for state, first, last in self.runs:
            back = self._of_run(dboth_NQk, first, last)
            torch.mm(self.x_SNd[state].t(), back, out=self._columns(dweight_dVLk, first, last))
            dx_NSd[:, state].addmm_(back, self._columns(self.weight_dVLk, first, last).t())
        ddown, dmix = dweight_dVLk[..., :-1].transpose(0, 1).flatten(2), dweight_dVLk[..., -1].transpose(0, 1)
        return dx_NSd.transpose(0, 1), ddown, 0.5 * dup_Qrd.view_as(self.up), dmix, dmix_VLN.sum(2)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """First row and last row + 1 of each chunk; all rows at once where there is no cache to stay in."""
        most = max(_MIN_CHUNK_ROWS, _CHUNK_ELEMENTS // self.size)
        num = -(-self.num_rows // most) if self.x_SNd.device.type == "cpu" else 1
        bounds = [i * self.num_rows // max(num, 1) for i in range(num + 1)]
        return itertools.pairwise(bounds)

    def _wide(self, rows: int, num_low: int, use: str = "tanh") -> Tensor:
        """Memory of a chunk, [V, L, C, d]."""
        (flat,) = scratch(f"feature views, {use}", self.x_SNd, [(self.num_views * num_low * rows, self.width)])
        return flat.view(self.num_views, num_low, rows, self.width)

    def _x(self, start: int, stop: int) -> Tensor:
        """The state of each view, [V, C, d]; not copied where all views are of one state."""
        x_SCd = self.x_SNd[:, start:stop]
        if self.index is None:
            return x_SCd[self.views[0]].expand(self.num_views, -1, -1)
        return x_SCd.transpose(0, 1).index_select(1, self.index).transpose(0, 1)

    def _gate(self, t_VLCd: Tensor, start: int, stop: int, out: Tensor) -> None:
        """``sum_l s_l t_l``, by additions: a reduction over so short a dimension is slow."""
        assert self.share_VLN is not None
        share_VLC1 = self.share_VLN[:, :, start:stop].unsqueeze(3)
        torch.mul(t_VLCd[:, 0], share_VLC1[:, 0], out=out)
        for low in range(1, self.num_low):
            torch.addcmul(out, t_VLCd[:, low], share_VLC1[:, low], out=out)

    def _low(self, both_NQk: Tensor | None, start: int, stop: int) -> Tensor:
        """What the second matrices read of a chunk, (Q, C, r), without a copy."""
        assert both_NQk is not None
        return both_NQk[start:stop, :, :-1].transpose(0, 1)

    def _of_run(self, both_NQk: Tensor, start: int, stop: int) -> Tensor:
        """The part of some views, (N, m L k)."""
        return both_NQk[:, start * self.num_low : stop * self.num_low].flatten(1)

    def _columns(self, weight_dVLk: Tensor, start: int, stop: int) -> Tensor:
        """The matrices of some views side by side, (d, m L k)."""
        return weight_dVLk[:, start:stop].flatten(1)
