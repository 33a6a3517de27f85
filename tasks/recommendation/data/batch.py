# SPDX-License-Identifier: Apache-2.0
"""The batches of this task: impressions as columns, and the sizes of those columns.

B rows (impressions: one user was shown one item once), F dense features, J single-valued id fields, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.gather import Rows


@dataclass
class Interactions(Rows):
    """Some impressions, a batch or a whole table.

    Attributes:
        dense: float32 [B, F] features that are numbers; F may be 0.
        ids: int64 [B, J], one id per single-valued field in the order of ``Schema.fields``, each in [0, cardinality);
            0 means unknown.
        bags: multi-valued fields: name -> (ids int64 [B, L], weight float32 [B, L]). Padding has id 0; its weight
            does not count. May be empty.
        label: float32 [B, T], 0 or 1; 0 where ``mask`` is False.
        mask: bool [B, T], False where a label is missing.
        user: int64 [B], whom a row belongs to: the groups of GAUC.
        row: int64 [B], number of the row in its source, for predictions.
        oracle: float32 [B, T] true probabilities where the source knows them, else None.
    """

    dense: Tensor
    ids: Tensor
    bags: dict[str, tuple[Tensor, Tensor]]
    label: Tensor
    mask: Tensor
    user: Tensor
    row: Tensor
    oracle: Tensor | None = None

    @classmethod
    @override
    def cat(cls, parts: Sequence[Interactions]) -> Interactions:
        """Return the rows of all parts, one part after another; bags are padded to the longest.

        Raises:
            ValueError: no part, or parts of different columns.
        """
        if not parts:
            raise ValueError("nothing to join: give at least one part")
        first = parts[0]
        if len(parts) == 1:
            return first
        for part in parts:
            if set(part.bags) != set(first.bags) or (part.oracle is None) != (first.oracle is None):
                raise ValueError(
                    f"parts with bags {sorted(first.bags)} and {sorted(part.bags)} (or with and without oracle) do not "
                    "fit together; domains of one data module must come from sources of one schema"
                )
        plain = ("dense", "ids", "label", "mask", "user", "row") + (() if first.oracle is None else ("oracle",))
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in plain}
        return Interactions(
            bags={name: _cat_bags([part.bags[name] for part in parts]) for name in first.bags}, **joined
        )


def _cat_bags(bags: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    longest = max(ids.shape[1] for ids, _ in bags)
    pad = torch.nn.functional.pad
    padded = [(pad(ids, (0, longest - ids.shape[1])), pad(w, (0, longest - w.shape[1]))) for ids, w in bags]
    return torch.cat([ids for ids, _ in padded]), torch.cat([weight for _, weight in padded])


@dataclass(frozen=True)
class Schema:
    """The sizes of the columns of `Interactions`, known before any row is read.

    Args:
        tasks: names of the T tasks; a name ends a metric's key, so letters, digits and _ only.
        categories: category of each task, in the order of ``tasks``.
        dense_dim: F.
        fields: single-valued id fields: name -> cardinality, id 0 (unknown) included.
        bags: multi-valued id fields: name -> cardinality, id 0 (padding) included.

    Raises:
        ValueError: no task, a task named twice or badly, another number of categories than of tasks, or a
            cardinality below 2.
    """

    tasks: tuple[str, ...]
    categories: tuple[str, ...]
    dense_dim: int
    fields: dict[str, int]
    bags: dict[str, int]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("no task is given; name at least one")
        if len(set(self.tasks)) < len(self.tasks) or not all(name.isidentifier() for name in self.tasks):
            raise ValueError(f"tasks {list(self.tasks)}: names must differ and consist of letters, digits and _")
        if len(self.categories) != len(self.tasks):
            raise ValueError(f"{len(self.categories)} categories for {len(self.tasks)} tasks; give each task one")
        for name, cardinality in {**self.fields, **self.bags}.items():
            if cardinality < 2:
                raise ValueError(f"field {name!r} has cardinality {cardinality}; id 0 is unknown, so give 2 or more")

    def facts(self) -> dict[str, Any]:
        """Return the plain dictionary that networks are built from."""
        return {
            "dense_dim": self.dense_dim,
            "fields": dict(self.fields),
            "bags": dict(self.bags),
            "tasks": list(self.tasks),
            "categories": list(self.categories),
        }

    def check(self, table: Interactions, name: str) -> None:
        """Compare a table with the sizes.

        Args:
            table: the rows.
            name: what to call the table in an error.

        Raises:
            ValueError: another number of columns, an id beyond its cardinality, a label that is neither 0 nor 1, or a
                dense feature that is not finite. The text names the field.
        """
        shapes = {"dense": self.dense_dim, "ids": len(self.fields), "label": len(self.tasks), "mask": len(self.tasks)}
        for column, width in shapes.items():
            if getattr(table, column).shape != (len(table), width):
                raise ValueError(
                    f"{name}: {column} has shape {tuple(getattr(table, column).shape)}, "
                    f"expected ({len(table)}, {width})"
                )
        if set(table.bags) != set(self.bags):
            raise ValueError(f"{name}: bags {sorted(table.bags)}, expected {sorted(self.bags)}")
        if not torch.isfinite(table.dense).all():
            bad = torch.nonzero(~torch.isfinite(table.dense))[0].tolist()
            raise ValueError(f"{name}: dense feature {bad[1]} of row {bad[0]} is not finite; fill or drop it")
        if not ((table.label == 0) | (table.label == 1)).all():
            raise ValueError(f"{name}: labels must be 0 or 1; mark a missing label in the mask")
        for j, (field, size) in enumerate(self.fields.items()):
            check_ids(table.ids[:, j], size, f"{name}: field {field!r}")
        for field, size in self.bags.items():
            check_ids(table.bags[field][0], size, f"{name}: bag {field!r}")


def check_ids(ids: Tensor, size: int, what: str) -> None:
    """Raise ValueError, which begins with ``what``, unless all ids lie in [0, size)."""
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ValueError(f"{what} holds id {wrong}, allowed are 0 to {size - 1}; raise its cardinality or hash the ids")
