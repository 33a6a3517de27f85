# SPDX-License-Identifier: Apache-2.0
"""Rows that stay in their files until a batch asks for them; the blocks read last are held."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moeapps.data.gather import BatchDataset, gather
from tasks.recommendation.data.batch import Interactions


@dataclass(frozen=True)
class Block:
    """Where some rows lie, and what one pass over them found.

    Attributes:
        file: the file.
        number: its block.
        first: row number of the block's first row in the split's files.
        rows: rows of the domain in it.
        times: smallest and largest time of those rows; None without a time column.
        known: labels per task.
        positive: positive labels per task.
    """

    file: str
    number: int
    first: int
    rows: int
    times: tuple[float, float] | None
    known: list[int]
    positive: list[int]


class BlockCache:
    """The blocks read last, at most ``capacity`` of them.

    Attributes:
        peak_rows: most rows ever held.
        reads: blocks read so far.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: OrderedDict[Hashable, Interactions] = OrderedDict()
        self.peak_rows = 0
        self.reads = 0

    def get(self, key: Hashable, read: Callable[[], Interactions]) -> Interactions:
        """Return a held block, or read it and let go of the one used longest ago."""
        if key in self.held:
            self.held.move_to_end(key)
            return self.held[key]
        while len(self.held) >= self.capacity:
            self.held.popitem(last=False)
        self.held[key] = read()
        self.reads += 1
        self.peak_rows = max(self.peak_rows, sum(len(table) for table in self.held.values()))
        return self.held[key]


class BlockDataset(BatchDataset):
    """Rows of one domain and split, read block by block.

    Args:
        blocks: where the rows lie.
        read: reads the rows of one block.
        held: blocks in memory; domains that are read together share it.
        name: tells these blocks from those of others in ``held``.
    """

    def __init__(
        self, blocks: Sequence[Block], read: Callable[[Block], Interactions], held: BlockCache, name: Hashable
    ) -> None:
        self.blocks, self.read, self.held, self.name = list(blocks), read, held, name
        self.sizes = [block.rows for block in self.blocks]
        self._ends: list[int] = np.cumsum(self.sizes, dtype=np.int64).tolist()

    @property
    def window(self) -> int:
        """Blocks whose rows may be shuffled together without reading any twice."""
        return self.held.capacity

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._ends[-1] if self._ends else 0

    def batch(self, rows: Tensor) -> Interactions:
        """Return the rows at int64 positions [n]."""
        found: Interactions = gather(rows, self._ends, self._part, self.join)
        return found

    def _part(self, number: int, rows: Tensor) -> Interactions:
        return self.held.get((self.name, number), lambda: self.read(self.blocks[number])).take(rows)
