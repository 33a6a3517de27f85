# SPDX-License-Identifier: Apache-2.0
"""Batches that mix domains of which each is read block by block: the three mixings, with rows shuffled in windows.

No order of a whole epoch is ever held: memory is that of one window for each domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from moeapps.data.mixing import DomainMixing, MixingSampler, fold

_DRAWN = 65_536
_NUMPY_MOST = 10**9
"""As many rows or more numpy's draw without putting back refuses."""
"""Rows of concat and balanced whose domains are drawn at once."""


@runtime_checkable
class InBlocks(Protocol):
    """A data set that is read in blocks, of which it holds those of one window."""

    sizes: list[int]
    window: int


class MixedWindows(MixingSampler):
    """A `MixingSampler` for domains in blocks: a domain's blocks are permuted, and rows are shuffled within windows.

    Which domains share a batch is as in `MixingSampler`, and so is what holds for several processes: W processes with
    batch B see the rows that one process with batch W * B sees.

    Args:
        domains: rows of each block of each domain, in the order of row numbers.
        batch_size: rows per process and step.
        window: blocks whose rows are shuffled together, >= 1.
        options: ``mode``, ``seed``, ``rank``, ``world_size`` and ``repeat`` of `MixingSampler`.

    Raises:
        ValueError: as `MixingSampler`, or window < 1.
    """

    def __init__(self, domains: Sequence[Sequence[int]], batch_size: int, *, window: int = 32, **options: Any) -> None:
        super().__init__([sum(blocks) for blocks in domains], batch_size, **options)
        if window < 1:
            raise ValueError(f"window={window} is not allowed; use 1 or more blocks")
        self.blocks = [torch.tensor(list(blocks)) for blocks in domains]
        self.window = window

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self.epoch, self.start
        seed = fold(self.seed, 0 if self.repeat else epoch)
        drawn = np.random.default_rng(seed)
        streams = [_Rows(self._stream(domain, fold(seed, domain + 1))) for domain in range(len(self.sizes))]
        whole = self._by_domain(streams, drawn) if self.mode == "one_domain" else self._by_row(streams, drawn)
        for step, batch in enumerate(whole):
            if step >= start:
                yield batch[self.rank :: self.world_size].tolist()

    @property
    def _step(self) -> int:
        """Rows of a global batch; fewer where all rows together, shared equally, are fewer."""
        step = self.batch_size * self.world_size
        return min(step, sum(self.sizes) // self.world_size * self.world_size)

    def _by_domain(self, streams: list[_Rows], drawn: np.random.Generator) -> Iterator[Tensor]:
        step = self.batch_size * self.world_size
        steps = [min(step, size // self.world_size * self.world_size) for size in self.sizes]
        turns = np.repeat(np.arange(len(streams)), [max(1, size // step) for size in self.sizes])
        for domain in drawn.permutation(turns).tolist():
            yield streams[domain].next(steps[domain])

    def _by_row(self, streams: list[_Rows], drawn: np.random.Generator) -> Iterator[Tensor]:
        rows = _Rows(self._concat(streams, drawn) if self.mode == "concat" else self._balanced(streams, drawn))
        for _ in range(self.num_batches):
            yield rows.next(self._step)

    def _concat(self, streams: list[_Rows], drawn: np.random.Generator) -> Iterator[Tensor]:
        """Draw domains without putting back, so that each row comes once."""
        left = np.array(self.sizes)
        while left.sum():
            counts = _counts(left, min(_DRAWN, int(left.sum())), drawn)
            left -= counts
            yield _dealt(streams, drawn.permutation(np.repeat(np.arange(len(streams)), counts)), counts)

    def _balanced(self, streams: list[_Rows], drawn: np.random.Generator) -> Iterator[Tensor]:
        rounds = max(1, _DRAWN // len(streams))
        while True:
            turns = np.tile(np.arange(len(streams)), (rounds, 1))
            yield _dealt(streams, drawn.permuted(turns, axis=1).ravel(), np.full(len(streams), rounds))

    def _stream(self, domain: int, seed: int) -> Iterator[Tensor]:
        """Rows of a domain for ever: pass after pass, window after window."""
        sizes = self.blocks[domain]
        starts = sizes.cumsum(0) - sizes + sum(self.sizes[:domain])
        generator = torch.Generator().manual_seed(seed)
        while True:
            for blocks in torch.randperm(len(sizes), generator=generator).split(self.window):
                rows = torch.cat([torch.arange(int(starts[b]), int(starts[b] + sizes[b])) for b in blocks.tolist()])
                yield rows[torch.randperm(len(rows), generator=generator)]


def _counts(left: np.ndarray, rows: int, drawn: np.random.Generator) -> np.ndarray:
    """Draw ``rows`` of all rows that are left without putting back; return how many each domain gives, int64 [D]."""
    if (total := int(left.sum())) < _NUMPY_MOST:
        return drawn.multivariate_hypergeometric(left, rows, method="marginals")
    # Places of rows, drawn until so many differ: repeats are rare, and the first ones of any order are a fair draw.
    places = drawn.integers(total, size=rows)
    while len(first := np.unique(places, return_index=True)[1]) < rows:
        places = np.concatenate([places[np.sort(first)], drawn.integers(total, size=rows - len(first))])
    return np.bincount(np.searchsorted(left.cumsum(), places, side="right"), minlength=len(left))


class _Rows:
    """As many rows as are asked for, out of pieces of any length."""

    def __init__(self, pieces: Iterator[Tensor]) -> None:
        self.pieces = pieces
        self.rest = torch.empty(0, dtype=torch.int64)

    def next(self, count: int) -> Tensor:
        """Return the next rows."""
        parts, missing = [self.rest], count - len(self.rest)
        while missing > 0:
            parts.append(next(self.pieces))
            missing -= len(parts[-1])
        rows = torch.cat(parts)
        self.rest = rows[count:]
        return rows[:count]


def _dealt(streams: list[_Rows], turns: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> Tensor:
    """The next rows of several streams, each at the places where it is its turn."""
    rows = torch.empty(len(turns), dtype=torch.int64)
    for domain, (stream, count) in enumerate(zip(streams, counts.tolist(), strict=True)):
        rows[torch.from_numpy(turns == domain)] = stream.next(count)
    return rows


def sampler_of(parts: Sequence[object], batch_size: int, *, mode: DomainMixing, **options: Any) -> MixingSampler:
    """Return the sampler of data sets laid end to end: in windows where one of them is read in blocks.

    Args:
        parts: the data sets.
        batch_size: rows per process and step.
        mode: how domains share batches.
        options: further arguments of `MixingSampler`.
    """
    streamed = [part for part in parts if isinstance(part, InBlocks)]
    if not streamed:
        return MixingSampler([len(cast(Sized, part)) for part in parts], batch_size, mode=mode, **options)
    blocks = [part.sizes if isinstance(part, InBlocks) else [len(cast(Sized, part))] for part in parts]
    return MixedWindows(blocks, batch_size, window=min(part.window for part in streamed), mode=mode, **options)
