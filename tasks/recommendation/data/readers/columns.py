# SPDX-License-Identifier: Apache-2.0
"""Which columns of a table become which columns of `Interactions`: the part of `TableFiles` that YAML spells out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.recommendation.data.batch import Interactions, Schema
from tasks.recommendation.data.readers.blocks import Column, TableError
from tasks.recommendation.data.readers.hashing import hash_values, to_ids


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

    # From columns to tensors --------------------------------------------------------------------------------------

    def convert(self, found: dict[str, Column], rows: NDArray[np.int64], what: str) -> Interactions:
        """Make rows of `Interactions`.

        Args:
            found: the columns of a block.
            rows: int64 [n] numbers of these rows in their source.
            what: file and block, for errors.

        Raises:
            TableError: a label that is neither 0 nor 1, text where numbers must be, an id beyond its table.
        """
        label, mask = self.labels(found, what)
        columns = [self._scaled(spec, found[spec.column], what) for spec in self.dense]
        ids = [self._ids(spec, found[spec.column], what) for spec in self.ids]
        user = found[self.user]
        if user.null.any():
            raise TableError(f"{what}: {int(user.null.sum())} rows have no user ({self.user}); drop or fill them")
        count = len(user.values)
        key = hash_values(_whole(user, f"{what}, user {self.user!r}"), self.hash_seed) >> np.uint64(1)
        return Interactions(
            dense=torch.from_numpy(np.stack(columns, 1) if columns else np.zeros((count, 0), np.float32)),
            ids=torch.from_numpy(np.stack(ids, 1) if ids else np.zeros((count, 0), np.int64)),
            bags={spec.column: self._bag(spec, found[spec.column], what) for spec in self.bags},
            label=torch.from_numpy(label),
            mask=torch.from_numpy(mask),
            user=torch.from_numpy(key.astype(np.int64)),
            row=torch.from_numpy(rows),
        )

    def labels(self, found: dict[str, Column], what: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return labels and masks [n, T] of a block.

        Raises:
            TableError: a label that is neither 0 nor 1.
        """
        labels, masks = [], []
        for task in self.tasks:
            value = found[task.label_column].numbers(f"{what}, label {task.label_column!r}")
            mask = ~np.isnan(value)
            if task.mask_column is not None:
                mask &= np.nan_to_num(found[task.mask_column].numbers(f"{what}, mask {task.mask_column!r}")) != 0
            label = np.where(mask, value, 0)
            if task.above is not None:
                label = (label > task.above) & mask
            elif not np.isin(label, (0, 1)).all():
                wrong = label[~np.isin(label, (0, 1))][0]
                raise TableError(
                    f"{what}: label {task.label_column!r} of task {task.name!r} holds {wrong:g}; labels are 0 or 1, "
                    "or give above: the label is then value > above"
                )
            labels.append(label.astype(np.float32))
            masks.append(mask)
        return np.stack(labels, 1), np.stack(masks, 1)

    def _scaled(self, spec: DenseColumn, column: Column, what: str) -> NDArray[np.float32]:
        value = column.numbers(f"{what}, dense {spec.column!r}")
        if spec.log:
            value = np.log1p(np.maximum(value, 0))
        scaled = np.where(np.isfinite(value), (value - spec.mean) / spec.std, spec.fill)
        return np.asarray(scaled, np.float32)

    def _ids(self, spec: IdColumn | BagColumn, column: Column, what: str) -> NDArray[np.int64]:
        where = f"{what}, field {spec.column!r}"
        if spec.hashed:
            return np.where(
                column.null, 0, to_ids(hash_values(_whole(column, where), self.hash_seed), spec.cardinality)
            )
        value = column.numbers(where)
        ids = np.where(column.null, 0, np.nan_to_num(value) + spec.offset).astype(np.int64)
        wrong = (ids < 0) | (ids >= spec.cardinality) | (~column.null & (value != np.round(value)))
        if wrong.any():
            raise TableError(
                f"{where}: value {value[wrong][0]:g} gives no id in 0 .. {spec.cardinality - 1}; raise its "
                "cardinality, mend its offset, or set hashed: true"
            )
        return ids

    def _bag(self, spec: BagColumn, column: Column, what: str) -> tuple[torch.Tensor, torch.Tensor]:
        entries = [_entries(value, spec.separator)[: spec.max_length] for value in column.values.tolist()]
        lengths = np.array([len(words) for words in entries], np.int64)
        flat = np.empty(int(lengths.sum()), object)
        flat[:] = [word for words in entries for word in words]
        ids = np.zeros((len(entries), spec.max_length), np.int64)
        filled = np.arange(spec.max_length) < lengths[:, None]
        if len(flat):
            ids[filled] = self._ids(spec, Column(flat, np.zeros(len(flat), np.bool_)), what)
        return torch.from_numpy(ids), torch.from_numpy((filled & (ids > 0)).astype(np.float32))


def _entries(value: object, separator: str) -> list[str]:
    if isinstance(value, list):
        return [str(part) for part in value if part is not None]
    words = str(value).strip().strip("[]").split(separator)
    return [word.strip() for word in words if word.strip()]


def _whole(column: Column, what: str) -> NDArray[np.generic]:
    """Values as integers or text; numbers with a point that are whole count as integers."""
    if column.values.dtype.kind != "f":
        return column.values
    filled = np.where(column.null, 0, column.values)
    if not (np.isfinite(filled).all() and (filled == np.round(filled)).all()):
        raise TableError(f"{what}: numbers with a fraction are no ids; make them integers or text")
    return filled.astype(np.int64)
