# SPDX-License-Identifier: Apache-2.0
"""Rows and lists of one's own, a file or arrays, as batches.

Ids are those of the source that the network was trained on: numbers in [0, cardinality), 0 for unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeapps.data.images.arrays import read_arrays
from moeapps.data.numbers import real_numbers, whole_numbers
from tasks.recommendation.data.batch import Interactions, Schema
from tasks.recommendation.data.lists import Lists, ListSchema

Columns = dict[str, Any]


def columns_of(inputs: Any) -> Columns:
    """Read columns: of a .npz, .csv or .parquet file, or of a mapping.

    Raises:
        ValueError: another file, or one that cannot be read.
    """
    if isinstance(inputs, Mapping):
        return {str(name): values for name, values in inputs.items()}
    if not isinstance(inputs, str | Path):
        raise ValueError(f"inputs of type {type(inputs).__name__}; give a mapping of columns, or a file of them")
    path = Path(inputs)
    if not path.is_file() or path.suffix.lower() not in (".npz", ".csv", ".parquet"):
        raise ValueError(f"{path}: no such file of .npz, .csv or .parquet; give one, or a mapping of columns")
    try:
        if path.suffix.lower() == ".npz":
            return dict(read_arrays(path))
        import pyarrow.csv as csv
        import pyarrow.parquet as parquet

        table = csv.read_csv(path) if path.suffix.lower() == ".csv" else parquet.read_table(path)
    except Exception as error:  # each format has errors of its own
        raise ValueError(
            f"{path} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"
        ) from error
    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"{path} has two columns {twice!r}; rename or drop one")
    return {name: table[name].to_pylist() for name in names}


def interactions_of(inputs: Any, schema: Schema) -> Interactions:
    """Make a batch of rows.

    Args:
        inputs: columns by name: every field of the schema (ids [B]), every bag ([B, L] ids, 0 at padding, or lists of
            ids), and ``dense`` [B, F] or its columns ``dense_0`` ... where there are dense features.
        schema: the columns of the network.

    Raises:
        ValueError: a column that is missing, of another length, or that holds an id beyond its cardinality.
    """
    columns = columns_of(inputs)
    dense = [f"dense_{i}" for i in range(schema.dense_dim)]
    if dense and "dense" not in columns and set(dense) <= set(columns):
        columns["dense"] = np.stack([_reals(name, columns[name]) for name in dense], 1)
    needed = [*(["dense"] if dense else []), *schema.fields, *schema.bags]
    _require(columns, needed)
    flat = [name for name in schema.fields if np.ndim(columns[name]) != 1]
    if flat or any(not hasattr(columns[name], "__len__") for name in needed):
        raise ValueError(f"{', '.join(flat or needed)}: no column of one number a row; give a list, or an array [B]")
    rows = {len(columns[name]) for name in needed}
    if len(rows) != 1:
        raise ValueError(f"columns of different lengths, {sorted(rows)}; give every row a value in each column")
    (size,) = rows
    tasks = len(schema.tasks)
    batch = Interactions(
        dense=_reals("dense", columns["dense"]) if dense else torch.zeros(size, 0),
        ids=torch.stack([_ids(name, columns[name]) for name in schema.fields], 1)
        if schema.fields
        else torch.zeros(size, 0, dtype=torch.int64),
        bags={name: _bag(name, columns[name], columns.get(f"{name}_weight")) for name in schema.bags},
        label=torch.zeros(size, tasks),
        mask=torch.zeros(size, tasks, dtype=torch.bool),
        user=torch.zeros(size, dtype=torch.int64),
        row=torch.arange(size),
    )
    schema.check(batch, "inputs")
    return batch


def lists_of(inputs: Any, schema: ListSchema) -> Lists:
    """Make a batch of lists.

    Args:
        inputs: arrays by name: ``candidates`` [B, N, F] and ``history`` [B, H, F] of item fields in the schema's order
            (latest first, 0 at padding), ``query`` [B, Q] and ``profile`` [B, U] where the schema has such fields. N
            and H may be smaller than the schema's. An item whose first field is 0 is padding.
        schema: the columns of the network.

    Raises:
        ValueError: an array that is missing or of another shape, or that holds an id beyond its cardinality.
    """
    columns = columns_of(inputs)
    parts = {"query": schema.query_fields, "profile": schema.profile_fields}
    _require(columns, ["candidates", "history", *(name for name, fields in parts.items() if fields)])
    widths = {"candidates": schema.candidates, "history": schema.history}
    items = {name: _items(name, columns[name], len(schema.item_fields), width) for name, width in widths.items()}
    size = len(items["candidates"])
    plain = {
        name: _ids(name, columns[name]) if fields else torch.zeros(size, 0, dtype=torch.int64)
        for name, fields in parts.items()
    }
    known = {name: values[:, :, 0] != 0 for name, values in items.items()}
    number = {name: values[:, :, 0].where(known[name], -1) for name, values in items.items()}
    batch = Lists(
        history=items["history"],
        history_mask=known["history"],
        history_item=number["history"],
        candidates=items["candidates"],
        candidate_mask=known["candidates"],
        candidate_item=number["candidates"],
        label=torch.zeros(size, schema.candidates),
        **plain,
        user=torch.zeros(size, dtype=torch.int64),
        row=torch.arange(size),
        factor=torch.full((size,), -1),
    )
    schema.check(batch, "inputs")
    return batch


def _require(columns: Columns, needed: list[str]) -> None:
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ValueError(
            f"inputs lack the columns {', '.join(missing)}; they have {', '.join(columns) or 'none'}, the network "
            f"reads {', '.join(needed)}"
        )


def _ids(name: str, values: Any) -> Tensor:
    return torch.from_numpy(whole_numbers(values, f"column {name!r}"))


def _reals(name: str, values: Any) -> Tensor:
    return torch.from_numpy(real_numbers(values, f"column {name!r}").astype(np.float32))


def _bag(name: str, values: Any, weight: Any) -> tuple[Tensor, Tensor]:
    """Ids [B, L] and their weights, 1 where none are given; lists of several lengths are padded with 0."""
    ids = torch.from_numpy(whole_numbers(_padded(name, values), f"column {name!r}"))
    if weight is None:
        return ids, (ids != 0).float()
    given = _reals(f"{name}_weight", _padded(f"{name}_weight", weight))
    if given.shape != ids.shape or not given.isfinite().all():
        raise ValueError(
            f"column '{name}_weight' has shape {tuple(given.shape)} beside ids {tuple(ids.shape)}, or holds nan or "
            "infinity; give each id a finite weight"
        )
    return ids, given


def _padded(name: str, values: Any) -> Any:
    rows = [real_numbers(row, f"column {name!r}") if np.size(row) else np.zeros(0, np.int64) for row in values]
    if any(row.ndim != 1 for row in rows):
        raise ValueError(f"column {name!r} holds rows of {rows[0].ndim} dimensions; give each row a list of numbers")
    longest = max((len(row) for row in rows), default=1)
    return np.stack([np.pad(row, (0, longest - len(row))) for row in rows]) if rows else np.zeros((0, longest))


def _items(name: str, values: Any, fields: int, width: int) -> Tensor:
    found = _ids(name, values)
    if found.ndim != 3 or found.shape[2] != fields or found.shape[1] > width:
        raise ValueError(f"{name} is {tuple(found.shape)}; give (lists, up to {width} items, {fields} fields)")
    return torch.nn.functional.pad(found, (0, 0, 0, width - found.shape[1]))
