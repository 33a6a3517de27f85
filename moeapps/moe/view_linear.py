# SPDX-License-Identifier: Apache-2.0
"""Many small linear maps at once, several of which may read the same input: one product per input, none copied.

Shape legend: V views of the rows, N rows, D input width, B blocks (linear maps), O output width of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def view_linear(x_VND: Tensor, weight_BDO: Tensor, reads: Sequence[int]) -> Tensor:
    r"""Apply block b to the view it reads, :math:`y_{nb} = x_{reads(b), n} W_b`; gives (N, B, O).

    Consecutive blocks that read one view are one product (N, D) x (D, m O), written into place: nothing is gathered,
    repeated or stacked, which is what costs most in a network of many small experts. The views may lie in memory as
    they like as long as their rows are contiguous, for instance as ``rows_NVD.transpose(0, 1)``. Differentiable any
    number of times.

    Args:
        x_VND: the views.
        weight_BDO: one matrix per block.
        reads: for each block the view it reads, in [0, V).

    Example:
        >>> view_linear(torch.ones(2, 3, 4), torch.ones(5, 4, 6), (0, 0, 0, 1, 1)).shape
        torch.Size([3, 5, 6])
    """
    device = x_VND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_VND, weight_BDO = x_VND.to(dtype), weight_BDO.to(dtype)
    with torch.autocast(device, enabled=False):
        if not torch.is_grad_enabled():  # also where products are counted: torch's counter misses those into a buffer
            return _plain(x_VND, weight_BDO, reads)
        y: Tensor = _ViewLinear.apply(x_VND, weight_BDO, tuple(reads))
        return y


def _runs(reads: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(view, first block, last block + 1) of consecutive blocks that read one view."""
    start = 0
    for b in range(1, len(reads) + 1):
        if b == len(reads) or reads[b] != reads[start]:
            yield reads[start], start, b
            start = b


def _joined(weight_BDO: Tensor, start: int, stop: int) -> Tensor:
    """The matrices of some blocks side by side, (D, m O)."""
    return weight_BDO[start:stop].transpose(0, 1).reshape(weight_BDO.shape[1], -1)


def _plain(x_VND: Tensor, weight_BDO: Tensor, reads: Sequence[int]) -> Tensor:
    parts = [x_VND[v] @ _joined(weight_BDO, start, stop) for v, start, stop in _runs(reads)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).unflatten(1, (len(reads), -1))


class _ViewLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_VND: Tensor, weight_BDO: Tensor, reads: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x_VND, weight_BDO)
        ctx.reads = reads
        y_NBO = x_VND.new_empty(x_VND.shape[1], len(reads), weight_BDO.shape[2])
        for v, start, stop in _runs(reads):
            torch.mm(x_VND[v], _joined(weight_BDO, start, stop), out=y_NBO[:, start:stop].flatten(1))
        return y_NBO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_VND, weight_BDO = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: go through operations that can be differentiated again
            with torch.enable_grad():
                y_NBO = _plain(x_VND, weight_BDO, ctx.reads)
                wanted = [t for t, need in zip((x_VND, weight_BDO), ctx.needs_input_grad, strict=False) if need]
                found = iter(torch.autograd.grad(y_NBO, wanted, grads[0], create_graph=True))
            dx, dw = (next(found) if need else None for need in ctx.needs_input_grad[:2])
            return dx, dw, None
        grad_NK = grads[0].contiguous().flatten(1)
        width = weight_BDO.shape[2]
        need_x, need_w = ctx.needs_input_grad[:2]
        dx_VND = _like_rows(x_VND) if need_x else None
        dw_BDO = torch.empty_like(weight_BDO) if need_w else None
        written: set[int] = set()
        for v, start, stop in _runs(ctx.reads):
            grad = grad_NK[:, start * width : stop * width]
            if dx_VND is not None:
                torch.addmm(
                    dx_VND[v], grad, _joined(weight_BDO, start, stop).T, beta=int(v in written), out=dx_VND[v]
                )
                written.add(v)
            if dw_BDO is not None:
                dw_BDO[start:stop] = (x_VND[v].T @ grad).unflatten(1, (stop - start, width)).transpose(0, 1)
        if dx_VND is not None:
            for v in set(range(len(x_VND))) - written:
                dx_VND[v].zero_()
        return dx_VND, dw_BDO, None


def _like_rows(x_VND: Tensor) -> Tensor:
    """An empty tensor of the shape of ``x_VND``, laid out row by row as the views mostly are."""
    num_views, num_rows, dim = x_VND.shape
    return x_VND.new_empty(num_rows, num_views, dim).transpose(0, 1)
