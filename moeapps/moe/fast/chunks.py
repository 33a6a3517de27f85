# SPDX-License-Identifier: Apache-2.0
"""Chunks of sorted assignments and the matrix products of one chunk, expert by expert, into given memory.

Used by ``segments`` always: its scratch then stays in the cache, however many rows there are. The gain is a part of
that of segments.py and is not measured alone.

Shape legend: C rows of a chunk, R rows of a block (one expert within a chunk), I and O widths of a layer, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeapps.moe.fast.memory import empty

# Enough rows for a matrix product at full speed, and scratch that stays in the cache; narrow layers take more rows, so
# that the calls of Python stay few.
MIN_CHUNK_ROWS = 512
CHUNK_ELEMENTS = 512 << 10


class Chunk:
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


def make_chunks(counts: list[int], share: range, width: int) -> list[Chunk]:
    """Cut the sorted assignments of the experts in ``share`` into chunks of few rows.

    An expert with more rows is cut into equal parts; neighbours with few rows share a chunk.

    Args:
        counts: Rows of each expert.
        share: The experts to cut up.
        width: Widest row of the scratch; it sets how many rows a chunk may have.
    """
    most = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // width)
    chunks: list[Chunk] = []
    start = sum(counts[: share.start])
    for expert in share:
        count = counts[expert]
        num_parts = -(-count // most)
        for part in range(num_parts):
            size = count * (part + 1) // num_parts - count * part // num_parts
            if not chunks or chunks[-1].size + size > most:
                chunks.append(Chunk(chunks[-1].rows.stop if chunks else start))
            chunks[-1].append(expert, size, part == 0)
    return chunks


def linear_out(
    x_CI: Tensor, weight_E: Sequence[Tensor], bias_E: Sequence[Tensor] | None, out_CO: Tensor, chunk: Chunk
) -> None:
    """Write ``x W[e] + b[e]`` of every block into its rows of ``out``."""
    for e, x_RI, out_RO in zip(chunk.experts, chunk.split(x_CI), chunk.split(out_CO), strict=True):
        if bias_E is None:
            torch.mm(x_RI, weight_E[e], out=out_RO)
        else:
            torch.addmm(bias_E[e], x_RI, weight_E[e], out=out_RO)


def gradient_buffer(stack: Tensor | None, counts: list[int], needed: bool) -> Tensor | None:
    """Uninitialised gradient of a stack, except that the rows of idle experts are exactly zero."""
    if stack is None or not needed:
        return None
    buffer = empty(stack, stack.shape)
    for e, count in enumerate(counts):
        if not count:
            buffer[e].zero_()
    return buffer


def accumulate(gradient: Tensor | None, chunk: Chunk, left_CI: Tensor, right_CO: Tensor) -> None:
    """``gradient[e] (+)= left^T right``, set by the first block of an expert and added to by the later ones."""
    if gradient is None:
        return
    blocks = zip(chunk.experts, chunk.firsts, chunk.split(left_CI), chunk.split(right_CO), strict=True)
    for e, first, left_RI, right_RO in blocks:
        if first:
            torch.mm(left_RI.t(), right_RO, out=gradient[e])
        else:
            gradient[e].addmm_(left_RI.t(), right_RO)


def accumulate_bias(gradient: Tensor | None, chunk: Chunk, rows_CO: Tensor, weight_C: Tensor | None) -> None:
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
