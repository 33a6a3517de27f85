# SPDX-License-Identifier: Apache-2.0
"""Submanifold convolution block by block, for wide features on a CPU; nothing here changes what is computed.

Rows are in z-order, so the neighbours of a block of voxels lie close together in memory. Within a block the pairs are
sorted by tap: one gather fetches the rows of all of them, each tap is one matrix product on a slice, and the products
of a voxel are summed by one ``embedding_bag`` instead of being added to it tap by tap. The backward is the same walk
over the gradients, as every pair is there in both directions. Buffers are of one block.

Shape legend: N voxels, M pairs, R voxels and Q pairs of a block, C channels in, O channels out, T taps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_BITS = 12
"""Voxels of a block, as a power of two; 2,048 to 16,384 take the same time."""


@dataclass(frozen=True)
class Block:
    """Some voxels that follow one another and the pairs they receive from.

    Attributes:
        rows: of the voxels.
        pairs: of its pairs, within all sorted ones.
        taps: that occur, ascending.
        sizes: pairs of each of them.
    """

    rows: slice
    pairs: slice
    taps: list[int]
    sizes: list[int]


@dataclass(frozen=True)
class TapPlan:
    """The pairs of a neighbour table, sorted by block, then by tap.

    Attributes:
        target_M: int32 voxel that each pair adds to.
        source_M: int32 voxel that it reads.
        place_M: int32 pairs of each block, counted from its first, in the order of the voxels they add to.
        start_N: int32 for each voxel where its own begin among those, counted from the block's first.
        blocks: that have pairs.
    """

    target_M: Tensor
    source_M: Tensor
    place_M: Tensor
    start_N: Tensor
    blocks: list[Block]


@torch.no_grad()
def plan_taps(taps: dict[int, tuple[Tensor, Tensor]], num_rows: int) -> TapPlan:
    """Sort the pairs of all taps.

    Args:
        taps: for each tap the int64 rows ``(target, source)``.
        num_rows: N.
    """
    ids = sorted(tap for tap, (target, _) in taps.items() if len(target))
    if not ids:
        none = torch.empty(0, dtype=torch.int32)
        return TapPlan(none, none, none, none, [])
    sizes = [len(taps[tap][0]) for tap in ids]
    target_M = torch.cat([taps[tap][0] for tap in ids]).int()
    source_M = torch.cat([taps[tap][1] for tap in ids]).int()
    num_blocks = (num_rows - 1 >> _BLOCK_BITS) + 1
    key_M = target_M >> _BLOCK_BITS
    order_M = torch.sort(key_M.to(torch.uint8 if num_blocks <= 255 else torch.int32), stable=True).indices
    counts_TB = torch.stack([torch.bincount(part, minlength=num_blocks) for part in key_M.split(sizes)])
    target_M, source_M = target_M.index_select(0, order_M), source_M.index_select(0, order_M)

    count_N, count_B = torch.bincount(target_M, minlength=num_rows), counts_TB.sum(0)
    first_B = count_B.cumsum(0) - count_B
    first_N = first_B.repeat_interleave(1 << _BLOCK_BITS)[:num_rows]
    place_M = torch.sort(target_M, stable=True).indices - first_B.repeat_interleave(count_B)
    blocks, first = [], 0
    for b, counts in enumerate(counts_TB.T.tolist()):
        used = [(tap, count) for tap, count in zip(ids, counts, strict=True) if count]
        num = sum(counts)
        rows = slice(b << _BLOCK_BITS, min(num_rows, (b + 1) << _BLOCK_BITS))
        if num:
            blocks.append(Block(rows, slice(first, first + num), [tap for tap, _ in used], [c for _, c in used]))
        first += num
    return TapPlan(target_M, source_M, place_M.int(), (count_N.cumsum(0) - count_N - first_N).int(), blocks)


def forward(x_NC: Tensor, weight_TCO: Tensor, plan: TapPlan) -> Tensor:
    """See `submanifold_conv`."""
    y_NO = x_NC @ weight_TCO[len(weight_TCO) // 2]
    _add_neighbours(y_NO, x_NC, weight_TCO.unbind(0), plan)
    return y_NO


def backward(
    x_NC: Tensor, weight_TCO: Tensor, plan: TapPlan, grad_NO: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the features and the weights, where needed.

    The pair (i, j) of tap t says that j reads from i by the opposite tap t': its gradient with respect to x_i is
    ``g_j W_t'^T`` and with respect to W_t' is ``x_i^T g_j``. So the rows of g are gathered once for both.
    """
    middle, last = len(weight_TCO) // 2, len(weight_TCO) - 1
    grad_NO = grad_NO.contiguous()
    opposite_TOC = weight_TCO.flip(0).transpose(1, 2)
    grad_x = grad_NO @ opposite_TOC[middle] if need_x else None
    grad_weight = torch.zeros_like(weight_TCO) if need_weight else None
    collect: Callable[[Block, Tensor], None] | None = None
    if grad_weight is not None:
        torch.mm(x_NC.t(), grad_NO, out=grad_weight[middle])
        weights = grad_weight.unbind(0)
        buffer = _buffer(plan, x_NC)

        def add(block: Block, grad_QO: Tensor) -> None:
            x_QC = torch.index_select(x_NC, 0, plan.target_M[block.pairs], out=buffer[: len(grad_QO)])
            for tap, x, grad in zip(block.taps, x_QC.split(block.sizes), grad_QO.split(block.sizes), strict=True):
                weights[last - tap].addmm_(x.t(), grad)

        collect = add

    _add_neighbours(grad_x, grad_NO, opposite_TOC.unbind(0), plan, collect)
    return grad_x, grad_weight


def _add_neighbours(
    y_NO: Tensor | None,
    x_NC: Tensor,
    weights: tuple[Tensor, ...],
    plan: TapPlan,
    collect: Callable[[Block, Tensor], None] | None = None,
) -> None:
    """``y[target] += x[source] W[tap]`` over all pairs; ``collect`` is shown the gathered rows of each block."""
    x_buffer = _buffer(plan, x_NC)
    y_buffer = None if y_NO is None else _buffer(plan, y_NO)
    for block in plan.blocks:
        num = block.pairs.stop - block.pairs.start
        x_QC = torch.index_select(x_NC, 0, plan.source_M[block.pairs], out=x_buffer[:num])
        if y_NO is not None and y_buffer is not None:
            y_QO = y_buffer[:num]
            for tap, x, y in zip(block.taps, x_QC.split(block.sizes), y_QO.split(block.sizes), strict=True):
                torch.mm(x, weights[tap], out=y)
            y_NO[block.rows] += F.embedding_bag(plan.place_M[block.pairs], y_QO, plan.start_N[block.rows], mode="sum")
        if collect is not None:
            collect(block, x_QC)


def _buffer(plan: TapPlan, like: Tensor) -> Tensor:
    """Uninitialised rows for the pairs of any one block."""
    most = max((block.pairs.stop - block.pairs.start for block in plan.blocks), default=0)
    return like.new_empty(most, like.shape[1])
