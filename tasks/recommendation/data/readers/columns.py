# SPDX-License-Identifier: Apache-2.0
"""Which columns of a table become which columns of `Interactions`: the part of `TableFiles` that YAML spells out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from tasks.recommendation.data.batch import Interactions, Schema
from tasks.recommendation.data.readers.hashing import to_ids
from tasks.recommendation.data.readers.values import (
    TEXT,
    TableError,
    hash_values,
    plain_array,
    to_numbers,
    whole_numbers,
)


@dataclass
class TaskColumn:
    """One task.

    Args:
        name: name of the task: ends metric keys.
        category: category of the task.
        label_column: column of the label; a missing value is a missing label.
        mask_column: column that is 0 or missing where the label does not count.
        above: the label is ``value > above``; None: the column holds 0 and 1.
    """

    name: str
    category: str
    label_column: str
    mask_column: str | None = None
    above: float | None = None


@dataclass
class IdColumn:
    """One single-valued id field.

    Args:
        column: the column; a missing value is id 0.
        cardinality: size of the field's table, 2 or more.
        hashed: hash values to 1 .. cardinality - 1; False: the value plus ``offset`` is the id.
        offset: added to values that are not hashed (1 where the file counts from 0 and 0 is not "unknown").
    """

    column: str
    cardinality: int
    hashed: bool = True
    offset: int = 0


@dataclass
class BagColumn:
    """One multi-valued id field: a list column, or text such as ``12,65`` or ``[27, 9]``.

    Args:
        column: the column.
        cardinality: size of the field's table, 2 or more.
        max_length: entries kept (the first ones).
        separator: what separates entries of text; square brackets around it are dropped.
        hashed: as in `IdColumn`.
        offset: as in `IdColumn`.
    """

    column: str
    cardinality: int
    max_length: int = 20
    separator: str = ","
    hashed: bool = True
    offset: int = 0


@dataclass
class DenseColumn:
    """One feature that is a number.

    Args:
        column: the column.
        log: take log(1 + max(value, 0)) first.
        mean: subtracted (after the log).
        std: divided by, above 0.
        fill: result where the value is missing.
    """

    column: str
    log: bool = False
    mean: float = 0.0
    std: float = 1.0
    fill: float = 0.0


@dataclass
class TableColumns:
    """All columns of a log.

    Args:
        tasks: the tasks, at least one.
        user: column of the user: groups of GAUC.
        ids: single-valued id fields.
        bags: multi-valued id fields.
        dense: features that are numbers.
        time: column of the time, or None.
        hash_seed: seed of all hashes.

    Raises:
        ValueError: a scale that is not positive, or what `Schema` refuses.
    """

    tasks: list[TaskColumn]
    user: str
    ids: list[IdColumn] = field(default_factory=list)
    bags: list[BagColumn] = field(default_factory=list)
    dense: list[DenseColumn] = field(default_factory=list)
    time: str | None = None
    hash_seed: int = 0

    def __post_init__(self) -> None:
        for column in self.dense:
            if column.std <= 0:
                raise ValueError(f"dense column {column.column!r}: std={column.std} must be above 0")
        self.schema()

    def schema(self) -> Schema:
        """Return the sizes of the columns."""
        return Schema(
            tasks=tuple(task.name for task in self.tasks),
            categories=tuple(task.category for task in self.tasks),
            dense_dim=len(self.dense),
            fields={spec.column: spec.cardinality for spec in self.ids},
            bags={spec.column: spec.cardinality for spec in self.bags},
        )

    def labels_needed(self) -> list[str]:
        """Columns that `labels` reads."""
        masks = [task.mask_column for task in self.tasks if task.mask_column is not None]
        return [*(task.label_column for task in self.tasks), *masks]

    def needed(self) -> list[str]:
        """Columns that a batch is made of, each once."""
        specs: list[IdColumn | BagColumn | DenseColumn] = [*self.ids, *self.bags, *self.dense]
        return list(dict.fromkeys([self.user, *self.labels_needed(), *(spec.column for spec in specs)]))

    def spelled(self) -> set[str]:
        """Columns whose values are hashed or split, so that text must keep its spelling; the others are numbers."""
        return self._single() | {spec.column for spec in self.bags}

    # From columns to tensors --------------------------------------------------------------------------------------

    def convert(self, found: pa.Table, rows: NDArray[np.int64], what: str) -> Interactions:
        """Make rows of `Interactions`.

        Args:
            found: the columns of a block.
            rows: int64 [n] numbers of these rows in their source.
            what: file and block, for errors.

        Raises:
            TableError: a label that is neither 0 nor 1, text where numbers must be, an id beyond its table.
        """
        hashed = {
            name: hash_values(found.column(name), self.hash_seed, f"{what}, field {name!r}") for name in self._single()
        }
        key, null = hashed[self.user]
        if null.any():
            raise TableError(f"{what}: {int(null.sum())} rows have no user ({self.user}); drop or fill them")
        ids = np.empty((len(found), len(self.ids)), np.int64)
        for k, spec in enumerate(self.ids):
            if spec.hashed:
                ids[:, k] = to_ids(hashed[spec.column][0], spec.cardinality)
                ids[hashed[spec.column][1], k] = 0
            else:
                ids[:, k] = _plain_ids(spec, found.column(spec.column), what)
        label, mask = self.labels(found, what)
        return Interactions(
            dense=torch.from_numpy(self._dense(found, what)),
            ids=torch.from_numpy(ids),
            bags={spec.column: self._bag(spec, found.column(spec.column), what) for spec in self.bags},
            label=torch.from_numpy(label),
            mask=torch.from_numpy(mask),
            user=torch.from_numpy((key >> np.uint64(1)).view(np.int64)),
            row=torch.from_numpy(rows),
        )

    def _single(self) -> set[str]:
        return {self.user, *(spec.column for spec in self.ids if spec.hashed)}

    def _dense(self, found: pa.Table, what: str) -> NDArray[np.float32]:
        dense = np.empty((len(found), len(self.dense)), np.float32)
        with np.errstate(over="ignore"):  # what float32 cannot hold is filled, too
            for k, spec in enumerate(self.dense):
                value = to_numbers(found.column(spec.column), f"{what}, dense {spec.column!r}")
                value = np.log1p(np.maximum(value, 0)) if spec.log else value
                dense[:, k] = value if (spec.mean, spec.std) == (0, 1) else (value - spec.mean) / spec.std
        finite = np.isfinite(dense)
        if not finite.all():
            np.copyto(dense, np.array([spec.fill for spec in self.dense], np.float32), where=~finite)
        return dense

    def labels(self, found: pa.Table, what: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return labels and masks [n, T] of a block.

        Raises:
            TableError: a label that is neither 0 nor 1.
        """
        labels = np.empty((len(found), len(self.tasks)), np.float32)
        masks = np.empty((len(found), len(self.tasks)), np.bool_)
        for t, task in enumerate(self.tasks):
            column = found.column(task.label_column)
            whole = whole_numbers(column)  # the usual label: no cast, nothing missing
            value = to_numbers(column, f"{what}, label {task.label_column!r}") if whole is None else whole
            mask = ~np.isnan(value) if whole is None else np.ones(len(value), np.bool_)
            if task.mask_column is not None:
                counts = to_numbers(found.column(task.mask_column), f"{what}, mask {task.mask_column!r}")
                mask &= np.nan_to_num(counts) != 0
            label = value if whole is not None and task.mask_column is None else np.where(mask, value, 0)
            if task.above is not None:
                label = (label > task.above) & mask
            elif whole is None or (len(label) and not (label.min() >= 0 and label.max() <= 1)):
                wrong = label[(label != 0) & (label != 1)]
                if len(wrong):
                    raise TableError(
                        f"{what}: label {task.label_column!r} of task {task.name!r} holds {wrong[0]:g}; labels are 0 "
                        "or 1, or give above: the label is then value > above"
                    )
            labels[:, t], masks[:, t] = label, mask
        return labels, masks

    def _bag(self, spec: BagColumn, column: pa.ChunkedArray, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        entries, row = _entries(column, spec.separator)
        # Entries of one row stand together: an entry's place is its distance from the first one of its row.
        place = np.arange(len(row)) - np.searchsorted(row, row)
        kept = np.flatnonzero(place < spec.max_length)
        ids = np.zeros((len(column), spec.max_length), np.int64)
        filled = np.zeros(ids.shape, np.bool_)
        row, place = row[kept], place[kept]
        entries = entries.take(pa.array(kept))
        if spec.hashed:
            hashed, _ = hash_values(entries, self.hash_seed, f"{what}, field {spec.column!r}")
            ids[row, place] = to_ids(hashed, spec.cardinality)
        else:
            ids[row, place] = _plain_ids(spec, entries, what)
        filled[row, place] = True
        return torch.from_numpy(ids), torch.from_numpy((filled & (ids > 0)).astype(np.float32))


def _plain_ids(spec: IdColumn | BagColumn, column: pa.ChunkedArray | pa.Array, what: str) -> NDArray[np.int64]:
    where = f"{what}, field {spec.column!r}"
    value = to_numbers(column, where)
    place = np.where(np.isnan(value), 0, value + spec.offset)
    wrong = (place < 0) | (place >= spec.cardinality) | (place != np.rint(place))
    if wrong.any():
        raise TableError(
            f"{where}: value {value[wrong][0]:g} gives no id in 0 .. {spec.cardinality - 1}; raise its "
            "cardinality, mend its offset, or set hashed: true"
        )
    return place.astype(np.int64)


def _entries(column: pa.ChunkedArray, separator: str) -> tuple[pa.Array, NDArray[np.int64]]:
    """Return all entries of a column of lists, or of text that spells lists, and the row of each (int64 [n])."""
    array = plain_array(column)
    if not pa.types.is_nested(array.type):
        array = pc.split_pattern(pc.utf8_trim(array.cast(pa.string()), "[] "), separator)
    row, entries = pc.list_parent_indices(array).to_numpy(), plain_array(pc.list_flatten(array))
    there = entries.is_valid()
    if entries.type in TEXT:
        entries = pc.utf8_trim_whitespace(entries.cast(pa.string()))
        there = pc.and_(there, pc.not_equal(entries, "").fill_null(False))
    kept = np.flatnonzero(there.to_numpy(zero_copy_only=False))
    return entries.take(pa.array(kept)), row[kept].astype(np.int64)
