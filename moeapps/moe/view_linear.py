# SPDX-License-Identifier: Apache-2.0
"""Many small linear maps at once, several of which may read the same input: one product per input, none copied.

Shape legend: V views of the rows, N rows, D input width, B blocks (linear maps), O output width of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moeapps.moe.derivatives import Gradients, first_gradients, needs_operations
from moeapps.moe.fast.threads import is_observed


def view_linear(x_VND: Tensor, weight_BDO: Tensor, reads: Sequence[int]) -> Tensor:
    r"""Apply block b to the view it reads, :math:`y_{nb} = x_{reads(b), n} W_b`; gives (N, B, O).

    Consecutive blocks that read one view are one product (N, D) x (D, m O), written into place: nothing is gathered,
    repeated or stacked, which is what costs most in a network of many small experts. The views may lie in memory as
    they like as long as their rows are contiguous, for instance as ``rows_NVD.transpose(0, 1)``. Differentiable any
    number of times, and by ``torch.func``.

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
        if needs_operations() or is_observed():  # torch's counter of operations misses products into a buffer
            return _plain(x_VND, weight_BDO, reads)
        if not torch.is_grad_enabled():
            return _in_place(x_VND, weight_BDO, reads)
        y: Tensor = _ViewLinear.apply(x_VND, weight_BDO, tuple(reads))
        return y


def runs(reads: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (view, first block, last block + 1) of consecutive blocks that read one view."""
    start = 0
    for b in range(1, len(reads) + 1):
        if b == len(reads) or reads[b] != reads[start]:
            yield reads[start], start, b
            start = b


def _joined(weight_BDO: Tensor, start: int, stop: int) -> Tensor:
    """The matrices of some blocks side by side, (D, m O)."""
    return weight_BDO[start:stop].transpose(0, 1).reshape(weight_BDO.shape[1], -1)


def _plain(x_VND: Tensor, weight_BDO: Tensor, reads: Sequence[int]) -> Tensor:
    parts = [x_VND[v] @ _joined(weight_BDO, start, stop) for v, start, stop in runs(reads)]
    y_NBO: Tensor = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).unflatten(1, (len(reads), -1))
    return y_NBO


def _in_place(x_VND: Tensor, weight_BDO: Tensor, reads: Sequence[int]) -> Tensor:
    """As `_plain`, every product written where it belongs."""
    y_NBO = x_VND.new_empty(x_VND.shape[1], len(reads), weight_BDO.shape[2])
    even = _even(reads)
    if even is not None:
        views, size = even
        torch.bmm(x_VND[views], _stacked(weight_BDO, size), out=_by_run(y_NBO, size))
        return y_NBO
    for v, start, stop in runs(reads):
        torch.mm(x_VND[v], _joined(weight_BDO, start, stop), out=y_NBO[:, start:stop].flatten(1))
    return y_NBO


class _ViewLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_VND: Tensor, weight_BDO: Tensor, reads: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x_VND, weight_BDO)
        ctx.reads = reads
        return _in_place(x_VND, weight_BDO, reads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_VND, weight_BDO = ctx.saved_tensors
        needs, even = ctx.needs_input_grad[:2], _even(ctx.reads)

        def by_hand() -> Gradients:
            grad_NBO = grads[0].contiguous()
            if even is not None:
                return _even_gradients(x_VND, weight_BDO, grad_NBO, even, *needs)
            return _gradients(x_VND, weight_BDO, grad_NBO, ctx.reads, *needs)

        def forward(x_VND: Tensor, weight_BDO: Tensor) -> Tensor:
            return _plain(x_VND, weight_BDO, ctx.reads)

        dx_VND, dw_BDO = first_gradients(by_hand, forward, (x_VND, weight_BDO), needs, grads[0])
        return dx_VND, dw_BDO, None


def _even(reads: Sequence[int]) -> tuple[slice, int] | None:
    """The views read and blocks per view, where runs are equally long and in order: one batched product."""
    found = list(runs(reads))
    first, size = found[0][0], found[0][2]
    in_order = all(v == first + i and stop - start == size for i, (v, start, stop) in enumerate(found))
    return (slice(first, first + len(found)), size) if in_order and len(found) > 1 else None


def _stacked(weight_BDO: Tensor, size: int) -> Tensor:
    """Matrices of ``size`` blocks side by side, for every run: (R, D, size O)."""
    return weight_BDO if size == 1 else weight_BDO.unflatten(0, (-1, size)).transpose(1, 2).flatten(2)


def _by_run(y_NBO: Tensor, size: int) -> Tensor:
    """(N, B, O) seen as (R, N, size O)."""
    y_NRK: Tensor = y_NBO.unflatten(1, (-1, size)).flatten(2)
    return y_NRK.transpose(0, 1)


def _even_gradients(
    x_VND: Tensor, weight_BDO: Tensor, grad_NBO: Tensor, even: tuple[slice, int], need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    views, size = even
    grad_RNK = _by_run(grad_NBO, size)
    dx_VND = dw_BDO = None
    if need_x:
        dx_VND = _like_rows(x_VND)
        dx_VND[: views.start].zero_()
        dx_VND[views.stop :].zero_()
        torch.bmm(grad_RNK, _stacked(weight_BDO, size).transpose(1, 2), out=dx_VND[views])
    if need_w:
        dw_RDK = torch.bmm(x_VND[views].transpose(1, 2), grad_RNK)
        dw_BDO = dw_RDK if size == 1 else dw_RDK.unflatten(2, (size, -1)).transpose(1, 2).flatten(0, 1)
    return dx_VND, dw_BDO


def _gradients(
    x_VND: Tensor, weight_BDO: Tensor, grad_NBO: Tensor, reads: Sequence[int], need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx_VND = _like_rows(x_VND) if need_x else None
    dw_BDO = torch.empty_like(weight_BDO) if need_w else None
    written: set[int] = set()
    for v, start, stop in runs(reads):
        grad_NK = grad_NBO[:, start:stop].flatten(1)
        if dx_VND is not None:
            back = _joined(weight_BDO, start, stop).T
            torch.addmm(dx_VND[v], grad_NK, back, beta=int(v in written), out=dx_VND[v])
            written.add(v)
        if dw_BDO is not None:
            dw_BDO[start:stop] = (x_VND[v].T @ grad_NK).unflatten(1, (stop - start, -1)).transpose(0, 1)
    if dx_VND is not None:
        for v in set(range(len(x_VND))) - written:
            dx_VND[v].zero_()
    return dx_VND, dw_BDO


def _like_rows(x_VND: Tensor) -> Tensor:
    """An empty tensor of the shape of ``x_VND``, laid out row by row as the views mostly are."""
    num_views, num_rows, dim = x_VND.shape
    return x_VND.new_empty(num_rows, num_views, dim).transpose(0, 1)
