# SPDX-License-Identifier: Apache-2.0
"""The MLP of a block, run in chunks of rows that stay in the cache; it keeps what its GELU reads and nothing else.

The hidden layer is the widest tensor of a block. timm's `Mlp` keeps it twice for the backward, before and after the
GELU, and the backward needs two more of it at the moment when memory is fullest. Here the second is computed again.

Shape legend: N rows, R rows of a chunk, D width, H hidden width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.derivatives import first_gradients, needs_operations

_CHUNK = 1 << 18
"""Hidden values of a chunk: a megabyte."""


class GeluMlp(Mlp):  # type: ignore[misc]  # timm is untyped
    """``fc2(gelu(fc1(x)))`` with timm's parameters and initial values.

    Args:
        dim: width in and out.
        hidden_dim: width between.

    Shape:
        [N, dim] -> [N, dim].
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, hidden_dim, act_layer=nn.GELU)

    @override
    def forward(self, x_ND: Tensor) -> Tensor:
        tensors: tuple[Tensor, ...] = (x_ND, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        if needs_operations():
            return _operations(*tensors)
        if x_ND.dtype != torch.float64 and torch.is_autocast_enabled(x_ND.device.type):  # autocast leaves float64 alone
            tensors = tuple(t.to(torch.get_autocast_dtype(x_ND.device.type)) for t in tensors)
        y_NO: Tensor = _GeluMlp.apply(*tensors, torch.is_grad_enabled())
        return y_NO


def _operations(x_ND: Tensor, w_HD: Tensor, b_H: Tensor, w_OH: Tensor, b_O: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x_ND, w_HD, b_H)), w_OH, b_O)


class _GeluMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, w_HD: Tensor, b_H: Tensor, w_OH: Tensor, b_O: Tensor, grad_enabled: bool
    ) -> Tensor:
        keep = grad_enabled and any(ctx.needs_input_grad)
        h_NH = x_ND.new_empty(len(x_ND), len(w_HD)) if keep else None
        y_NO = x_ND.new_empty(len(x_ND), len(w_OH))
        buffer = _buffer(x_ND, len(w_HD))
        for rows in _chunks(len(x_ND), len(w_HD)):
            a_RH = buffer[: rows.stop - rows.start]
            h_RH = torch.addmm(b_H, x_ND[rows], w_HD.t(), out=a_RH if h_NH is None else h_NH[rows])
            torch.ops.aten.gelu.out(h_RH, out=a_RH)
            torch.addmm(b_O, a_RH, w_OH.t(), out=y_NO[rows])
        if keep:
            ctx.save_for_backward(x_ND, w_HD, b_H, w_OH, b_O, h_NH)
        return y_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, h_NH = ctx.saved_tensors
        x_ND, w_HD, _, w_OH, _ = inputs
        needs = ctx.needs_input_grad[:5]
        by_hand = partial(_gradients, x_ND, w_HD, w_OH, h_NH, grad_NO)
        return *first_gradients(by_hand, _operations, inputs, needs, grad_NO), None


def _gradients(x_ND: Tensor, w_HD: Tensor, w_OH: Tensor, h_NH: Tensor, grad_NO: Tensor) -> tuple[Tensor, ...]:
    """Those of all inputs: ``da = g W2``, ``dh = da gelu'(h)``, and what follows."""
    dx_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    dw_HD, db_H, dw_OH = torch.zeros_like(w_HD), w_HD.new_zeros(len(w_HD)), torch.zeros_like(w_OH)
    a_buffer, d_buffer = _buffer(x_ND, len(w_HD)), _buffer(x_ND, len(w_HD))
    for rows in _chunks(len(x_ND), len(w_HD)):
        num = rows.stop - rows.start
        g_RO, h_RH = grad_NO[rows], h_NH[rows]
        dw_OH.addmm_(g_RO.t(), torch.ops.aten.gelu.out(h_RH, out=a_buffer[:num]))
        d_RH = torch.mm(g_RO, w_OH, out=d_buffer[:num])
        torch.ops.aten.gelu_backward.grad_input(d_RH, h_RH, grad_input=d_RH)
        dw_HD.addmm_(d_RH.t(), x_ND[rows])
        db_H += d_RH.sum(0)
        torch.mm(d_RH, w_HD, out=dx_ND[rows])
    return dx_ND, dw_HD, db_H, dw_OH, grad_NO.sum(0)


def _chunks(num_rows: int, hidden_dim: int) -> Iterator[slice]:
    most = max(1, _CHUNK // hidden_dim)
    return (slice(start, min(num_rows, start + most)) for start in range(0, num_rows, most))


def _buffer(like: Tensor, hidden_dim: int) -> Tensor:
    """Uninitialised memory for the hidden values of one chunk."""
    return like.new_empty(min(len(like), max(1, _CHUNK // hidden_dim)), hidden_dim)
