# SPDX-License-Identifier: Apache-2.0
"""Batches as columns of rows, fetched a batch at a time: one gather per column, not one Python call per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from typing_extensions import override


class Rows:
    """Base of batches: data classes of tensors whose first dimension is the row.

    Fields may also hold dictionaries and tuples of such tensors, other `Rows`, or what is the same for all rows. No
    frozen classes: Lightning sets the fields of a copy where a precision wants other numbers (64-true, bf16-true).
    """

    def __len__(self) -> int:
        return len(next(value for value in vars(self).values() if isinstance(value, Tensor)))

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every tensor."""
        made: Self = cast(Any, type(self))(**{name: _changed(value, change) for name, value in vars(self).items()})
        return made

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch on a device."""
        return self.each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory (what a loader with ``pin_memory`` asks for)."""
        return self.each(lambda part: part.pin_memory())

    def take(self, rows: Tensor) -> Self:
        """Return the rows at int64 positions [n], in that order, or where a bool [B] is True."""
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        return self.each(lambda part: part.index_select(0, rows))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join batches whose fields are tensors or None.

        Raises:
            ValueError: no part, or parts with and without a field.
        """
        if not parts:
            raise ValueError("nothing to join: give at least one part")
        columns: dict[str, Any] = {}
        for field in fields(cast(Any, cls)):
            found = [getattr(part, field.name) for part in parts]
            given = [value for value in found if value is not None]
            if len(given) not in (0, len(found)):
                raise ValueError(f"parts with and without an {field.name} do not fit together; use one source")
            columns[field.name] = torch.cat(given) if given else None
        joined: Self = cast(Any, cls)(**columns)
        return joined


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Rows):
        return value.each(change)
    if isinstance(value, dict):
        return {name: _changed(part, change) for name, part in value.items()}
    return tuple(_changed(part, change) for part in value) if isinstance(value, tuple) else value


class BatchDataset(Dataset[Any]):
    """A map-style data set that makes a whole batch of row numbers at once; a loader hands it to ``collate`` as it is.

    A subclass provides ``batch`` and ``__len__``, and ``join`` where batches are no `Rows`.
    """

    def batch(self, rows: Tensor) -> Any:
        """Return the batch of the rows at int64 positions [n], in that order."""
        raise TypeError(f"{type(self).__name__} must define batch(rows)")

    def join(self, parts: list[Any], order: Tensor) -> Any:
        """Return one batch of several: row k is row ``order[k]`` (int64 [n]) of the parts laid end to end."""
        return type(parts[0]).cat(parts).take(order)

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


class TableDataset(BatchDataset):
    """A table in memory; a batch is one gather per column.

    Args:
        table: the rows.
    """

    def __init__(self, table: Rows) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    @override
    def batch(self, rows: Tensor) -> Any:
        return self.table.take(rows)


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
