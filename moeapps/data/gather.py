# SPDX-License-Identifier: Apache-2.0
"""Rows fetched a batch at a time: one gather per column instead of one Python call per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset


class BatchDataset(Dataset[Any]):
    """A map-style data set that makes a whole batch of row numbers at once; a loader hands it to ``collate`` as it is.

    A subclass provides ``batch``, ``join`` and ``__len__``.
    """

    def batch(self, rows: Tensor) -> Any:
        """Return the batch of the rows at int64 positions [n], in that order."""
        raise TypeError(f"{type(self).__name__} must define batch(rows)")

    def join(self, parts: list[Any], order: Tensor) -> Any:
        """Return one batch of several: row k is row ``order[k]`` (int64 [n]) of the parts laid end to end."""
        raise TypeError(f"{type(self).__name__} must define join(parts, order)")

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} must define __len__()")

    def __getitem__(self, index: int) -> Any:
        """Return a batch of one row.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.batch(torch.tensor([index]))

    def __getitems__(self, rows: Sequence[int]) -> Any:
        """Return the batch of these rows; torch's loader prefers this method where there is one."""
        return self.batch(torch.as_tensor(rows, dtype=torch.int64))


class GatherConcat(ConcatDataset[Any]):
    """Data sets laid end to end: whole batches where each part is a `BatchDataset`, else item by item as torch does."""

    def __getitems__(self, rows: Sequence[int]) -> Any:
        """Return a batch (`BatchDataset` parts) or the list of items."""
        parts = [part for part in self.datasets if isinstance(part, BatchDataset)]
        if len(parts) < len(self.datasets):
            return [self[row] for row in rows]
        wanted = torch.as_tensor(rows, dtype=torch.int64)
        return gather(wanted, self.cumulative_sizes, lambda part, inside: parts[part].batch(inside), parts[0].join)


def gather(
    rows: Tensor,
    ends: Sequence[int],
    fetch: Callable[[int, Tensor], Any],
    join: Callable[[list[Any], Tensor], Any],
) -> Any:
    """Fetch rows that lie in several parts, each part asked once, and put them into the order they were asked in.

    Args:
        rows: int64 [n], positions in the parts laid end to end.
        ends: running totals of the parts' sizes.
        fetch: (part, int64 positions inside it) -> batch.
        join: (batches, order) -> batch, as ``BatchDataset.join``.

    Raises:
        IndexError: a row outside the parts.
    """
    bounds = torch.as_tensor(ends)
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= int(bounds[-1])):
        raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of {int(bounds[-1])}")
    part_of = torch.searchsorted(bounds, rows, right=True)
    starts = torch.cat([bounds.new_zeros(1), bounds[:-1]])
    touched = torch.unique(part_of).tolist()
    if len(touched) == 1:
        return fetch(touched[0], rows - starts[touched[0]])
    where = [torch.nonzero(part_of == part).squeeze(1) for part in touched]
    batches = [fetch(part, rows[at] - starts[part]) for part, at in zip(touched, where, strict=True)]
    return join(batches, torch.cat(where).argsort())
