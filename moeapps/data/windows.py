# SPDX-License-Identifier: Apache-2.0
"""Shuffling rows of files too large for memory: blocks in random order, rows shuffled inside a window of blocks.

A block is what is read at once: a row group of a Parquet file, some thousand lines of text. A reader that keeps the
blocks of one window needs no more memory than that, and the order is still a function of (seed, epoch) alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moeapps.data.mixing import MixingSampler, fold


class WindowSampler(MixingSampler):
    """Batch sampler over rows in blocks, for readers that hold few blocks at a time.

    The blocks are permuted and laid end to end; the row sequence is cut into one equal share for each (process,
    loader worker), so that each reads blocks of its own (a block on a cut is read by both sides). A share is taken in
    windows of ``window`` blocks, whose rows are permuted. Step t of a process comes from the share of worker t mod
    ``num_workers``, as torch's loader deals steps to workers. Rows left over at the end of a share are dropped.

    Unlike `MixingSampler`, W processes with batch B do not see the batches that one process with batch W * B sees.

    Args:
        blocks: rows of each block, in the order of row numbers; each >= 1.
        batch_size: rows per process and step, >= 1.
        window: blocks whose rows are shuffled together, >= 1.
        num_workers: loader processes of this process; 0 counts as 1.
        seed: seed of all orders.
        rank: index of this process, in [0, world_size).
        world_size: number of processes.
        repeat: give the order of epoch 0 in every epoch.

    Raises:
        ValueError: as `MixingSampler`, window < 1, or fewer rows than shares.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        batch_size: int,
        *,
        window: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = False,
    ) -> None:
        super().__init__(blocks, batch_size, seed=seed, rank=rank, world_size=world_size, repeat=repeat)
        if window < 1:
            raise ValueError(f"window={window} is not allowed; use 1 or more blocks")
        self.window = window
        self.workers = max(1, num_workers)
        self.share = sum(self.sizes) // (world_size * self.workers)
        if self.share < 1:
            raise ValueError(
                f"{sum(self.sizes)} rows cannot be shared by {world_size} processes with {self.workers} workers each; "
                "use fewer"
            )

    @property
    def num_batches(self) -> int:
        """Steps of one whole epoch, the same on every process and in every epoch."""
        return max(1, self.share // self.batch_size) * self.workers

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self.epoch, self.start
        number = 0 if self.repeat else epoch
        order = torch.randperm(len(self.sizes), generator=torch.Generator().manual_seed(fold(self.seed, number)))
        shares = [self._share(order, self.rank * self.workers + worker, number) for worker in range(self.workers)]
        for step in range(self.num_batches):
            batch = next(shares[step % self.workers])
            if step >= start:
                yield batch.tolist()

    def _share(self, order: Tensor, share: int, epoch: int) -> Iterator[Tensor]:
        """Give the batches of one share."""
        size = min(self.batch_size, self.share)
        generator = torch.Generator().manual_seed(fold(fold(self.seed, epoch), share + 1))
        rest = torch.empty(0, dtype=torch.int64)
        pieces = self._pieces(order, share)
        for first in range(0, len(pieces), self.window):
            rows = torch.cat([torch.arange(*piece) for piece in pieces[first : first + self.window]])
            rest = torch.cat([rest, rows[torch.randperm(len(rows), generator=generator)]])
            while len(rest) >= size:
                batch, rest = rest[:size], rest[size:]
                yield batch

    def _pieces(self, order: Tensor, share: int) -> list[tuple[int, int]]:
        """Row ranges of a share: what its interval of the permuted blocks covers."""
        sizes = torch.tensor(self.sizes)
        starts = sizes.cumsum(0) - sizes  # first row number of each block
        low, high = share * self.share, (share + 1) * self.share
        pieces, place = [], 0
        for block in order.tolist():
            size = self.sizes[block]
            first, last = max(low - place, 0), min(high - place, size)
            if first < last:
                pieces.append((int(starts[block]) + first, int(starts[block]) + last))
            place += size
        return pieces
