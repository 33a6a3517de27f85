# SPDX-License-Identifier: Apache-2.0
"""Submanifold 3-D convolution in plain torch: occupied voxels in, the same voxels out, only occupied neighbours read.

Shape legend: N voxels, M pairs of neighbours, C channels in, O channels out, T = kernel_size ** 3 taps.

Most taps of most voxels are empty (a scan is a surface in space), so the work is done pair by pair: for each tap the
rows that have that neighbour are gathered, multiplied by the tap's matrix and added to their voxel. Measured on one
thread at 12k voxels and C = 64 this takes a sixth of a gather over all 27 taps and a twentieth of im2col. Wide features
on a CPU are worked on block by block (tap_blocks.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.derivatives import first_gradients, needs_operations
from tasks.point_cloud.nets import tap_blocks

_BITS = 17  # per axis: 16 bits of coordinate and room for the kernel's reach
_WIDE = 16  # channels from which on sorting the pairs costs less than it saves


@dataclass(frozen=True)
class NeighbourTable:
    """Pairs of occupied voxels that lie ``offset`` apart, for every offset of a kernel but the centre.

    Attributes:
        kernel_size: odd edge length of the kernel in voxels.
        num_rows: N.
        taps: for each tap (row-major over dx, dy, dz from -r to r) the int64 rows ``(out, in)`` with
            ``grid[in] = grid[out] + offset``; the centre tap is left out: it pairs every row with itself. Opposite taps
            hold the same pairs, turned round.
    """

    kernel_size: int
    num_rows: int
    taps: dict[int, tuple[Tensor, Tensor]]

    @cached_property
    def plan(self) -> tap_blocks.TapPlan:
        """The pairs sorted for `tap_blocks`; made on first use."""
        return tap_blocks.plan_taps(self.taps, self.num_rows)

    def centre(self, kernel_size: int) -> NeighbourTable:
        """The table of a smaller kernel with the same centre."""
        wide, cut = self.kernel_size, (self.kernel_size - kernel_size) // 2
        inner = range(cut, wide - cut)
        kept = [(x * wide + y) * wide + z for x in inner for y in inner for z in inner]
        middle = kernel_size**3 // 2
        return NeighbourTable(
            kernel_size, self.num_rows, {t: self.taps[old] for t, old in enumerate(kept) if t != middle}
        )


@torch.no_grad()
def neighbour_table(grid_N3: Tensor, batch_N: Tensor, kernel_size: int) -> NeighbourTable:
    """Find all neighbours of all voxels by one sort and one search per column of the kernel.

    Only half of the offsets are searched: j is at +offset from i exactly when i is at -offset from j. Along a column
    of constant (dx, dy) the sorted keys are walked, so one search serves ``kernel_size`` taps.

    Args:
        grid_N3: int64 voxel coordinates in [0, 65536), unique within a scan.
        batch_N: int64 scan of each voxel; voxels of different scans are never neighbours.
        kernel_size: odd, >= 1.

    Raises:
        ValueError: ``kernel_size`` is even or below 1.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: a submanifold kernel has a centre, use an odd number")
    reach, num_rows = kernel_size // 2, len(batch_N)
    x, y, z = (grid_N3 + reach).unbind(1)
    key_N, row_N = torch.sort((((batch_N << _BITS | x) << _BITS | y) << _BITS) | z)
    padded = torch.cat([key_N, key_N.new_full((1,), torch.iinfo(torch.int64).max)])
    taps: dict[int, tuple[Tensor, Tensor]] = {}
    last = kernel_size**3 - 1
    for dx in range(reach + 1):
        for dy in range(-reach if dx else 0, reach + 1):
            first_dz = -reach if dx or dy else 1
            if first_dz > reach:
                continue
            wanted = key_N + ((((dx << _BITS) + dy) << _BITS) + first_dz)
            at = torch.searchsorted(padded, wanted)
            for dz in range(first_dz, reach + 1):
                hit = padded.index_select(0, at) == wanted
                out = torch.nonzero(hit).squeeze(1)
                tap = ((dx + reach) * kernel_size + dy + reach) * kernel_size + dz + reach
                pair = row_N.index_select(0, out), row_N.index_select(0, at.index_select(0, out))
                taps[tap], taps[last - tap] = pair, pair[::-1]
                at, wanted = at + hit, wanted + 1
    return NeighbourTable(kernel_size, num_rows, taps)


class _SubmanifoldConv(torch.autograd.Function):
    """Sum over taps of gather, matmul, scatter; the backward needs no buffer larger than one tap's rows."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_TCO: Tensor, table: NeighbourTable) -> Tensor:
        ctx.save_for_backward(x_NC, weight_TCO)
        ctx.table = table
        if _in_blocks(x_NC, weight_TCO):
            return tap_blocks.forward(x_NC, weight_TCO, table.plan)
        return _sum_over_taps(x_NC, weight_TCO, table)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_NC, weight_TCO = ctx.saved_tensors
        needs, table = ctx.needs_input_grad[:2], ctx.table
        grad_NO = grad_NO.to(x_NC.dtype)

        def by_hand() -> tuple[Tensor | None, Tensor | None]:
            if _in_blocks(x_NC, weight_TCO):
                return tap_blocks.backward(x_NC, weight_TCO, table.plan, grad_NO, *needs)
            return _gradients(x_NC, weight_TCO, table, grad_NO, *needs)

        dx_NC, dweight_TCO = first_gradients(
            by_hand,
            lambda x_NC, weight_TCO: _sum_over_taps(x_NC, weight_TCO, table),
            (x_NC, weight_TCO),
            needs,
            grad_NO,
        )
        return dx_NC, dweight_TCO, None


def _in_blocks(x_NC: Tensor, weight_TCO: Tensor) -> bool:
    return x_NC.device.type == "cpu" and min(weight_TCO.shape[1:]) >= _WIDE


def _sum_over_taps(x_NC: Tensor, weight_TCO: Tensor, table: NeighbourTable) -> Tensor:
    y_NO = x_NC @ weight_TCO[len(weight_TCO) // 2]
    for tap, (out, source) in table.taps.items():
        if len(out):
            y_NO.index_add_(0, out, x_NC.index_select(0, source) @ weight_TCO[tap])
    return y_NO


def _gradients(
    x_NC: Tensor, weight_TCO: Tensor, table: NeighbourTable, grad_NO: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    centre = len(weight_TCO) // 2
    grad_x = grad_NO @ weight_TCO[centre].t() if need_x else None
    grad_weight = torch.zeros_like(weight_TCO) if need_weight else None
    if grad_weight is not None:
        torch.mm(x_NC.t(), grad_NO, out=grad_weight[centre])
    for tap, (out, source) in table.taps.items():
        if not len(out):
            continue
        grad_MO = grad_NO.index_select(0, out)
        if grad_x is not None:
            grad_x.index_add_(0, source, grad_MO @ weight_TCO[tap].t())
        if grad_weight is not None:
            torch.mm(x_NC.index_select(0, source).t(), grad_MO, out=grad_weight[tap])
    return grad_x, grad_weight


def submanifold_conv(x_NC: Tensor, weight_TCO: Tensor, table: NeighbourTable) -> Tensor:
    """Convolve features on occupied voxels.

    y[p] = sum over taps t of x[p + offset_t] W_t, over the occupied p + offset_t only; on a dense cube this is
    ``torch.nn.functional.conv3d`` with zero padding. Differentiable any number of times.

    Args:
        x_NC: features.
        weight_TCO: one matrix per tap, taps row-major over (dx, dy, dz).
        table: neighbours of the same voxels and kernel size.

    Returns:
        [N, O].
    """
    if torch.is_autocast_enabled(x_NC.device.type):
        dtype = torch.get_autocast_dtype(x_NC.device.type)
        x_NC, weight_TCO = x_NC.to(dtype), weight_TCO.to(dtype)
    if needs_operations():
        return _sum_over_taps(x_NC, weight_TCO, table)
    y_NO: Tensor = _SubmanifoldConv.apply(x_NC, weight_TCO, table)
    return y_NO


class SubmanifoldConv3d(nn.Module):
    """Submanifold convolution layer (Graham et al. 2018): the set of occupied voxels does not grow.

    Args:
        in_dim: channels in.
        out_dim: channels out.
        kernel_size: odd edge length in voxels.
        bias: add a learned vector to every voxel.

    Shape:
        x [N, in_dim] and the `NeighbourTable` of the N voxels -> [N, out_dim].
    """

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int = 3, *, bias: bool = True) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: a submanifold kernel has a centre, use an odd number")
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(kernel_size**3, in_dim, out_dim))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(taps * in_dim), as ``torch.nn.Conv3d``."""
        bound = 1 / math.sqrt(self.weight.shape[0] * self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @override
    def forward(self, x_NC: Tensor, table: NeighbourTable) -> Tensor:
        y_NO = submanifold_conv(x_NC, self.weight, table)
        return y_NO if self.bias is None else y_NO + self.bias

    @override
    def extra_repr(self) -> str:
        in_dim, out_dim = self.weight.shape[1:]
        return f"{in_dim}, {out_dim}, kernel_size={self.kernel_size}, bias={self.bias is not None}"
