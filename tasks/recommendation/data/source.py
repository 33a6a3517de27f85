# SPDX-License-Identifier: Apache-2.0
"""What every log provides: its columns, its domains, and the rows of a domain and split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from moeapps.data.domain import Role, Split
from moeapps.data.gather import BatchDataset
from tasks.recommendation.data.batch import Interactions, Schema
from tasks.recommendation.data.lists import ListSchema


class LogSource:
    """Base class of the logs that `RecommendationData` (impressions) and `ListData` (lists) can read.

    Attributes:
        default_roles: domains per role where the data module names none.
        streaming: rows are read block by block while training; see `tasks.recommendation.data.readers.tables`.
    """

    default_roles: ClassVar[dict[Role, list[str]]] = {}
    streaming: bool = False

    @property
    def schema(self) -> Schema | ListSchema:
        """Sizes of the columns, known before anything is read."""
        raise TypeError(f"{type(self).__name__} must define schema")

    def bind(self, roles: dict[Role, list[str]]) -> None:
        """Take note of the roles of this run's domains.

        Raises:
            ValueError: a domain this log does not have.
        """
        raise TypeError(f"{type(self).__name__} must define bind(roles)")

    def missing(self, domain: str, cache: Path | None) -> str | None:
        """Return why an OPTIONAL domain cannot be had, or None."""
        return None

    def prepare(self, cache: Path | None) -> None:
        """Fetch or generate what is not in the cache yet; called once, by one process."""

    def dataset(self, domain: str, split: Split, cache: Path | None) -> BatchDataset:
        """Return the rows of one domain and split."""
        raise TypeError(f"{type(self).__name__} must define dataset(domain, split, cache)")

    def describe(self, domain: str) -> str:
        """Say where a domain's rows come from, for results files."""
        raise TypeError(f"{type(self).__name__} must define describe(domain)")

    def item_name(self, item: int) -> str:
        """Return what to call an item, by its number in this log, in reports."""
        return f"item {item}"


def touched(roles: dict[Role, list[str]]) -> Iterator[tuple[Role, str, Split]]:
    """Yield role, domain and split of all rows that a run may read."""
    splits: dict[Role, tuple[Split, ...]] = {
        "seen": ("train", "val", "test"),
        "validation": ("val", "test"),
        "unseen": ("test",),
    }
    for role, names in roles.items():
        yield from ((role, name, split) for name in names for split in splits[role])


class TableDataset(BatchDataset):
    """A table in memory; a batch is one gather per column.

    Args:
        table: the rows.
    """

    def __init__(self, table: Interactions) -> None:
        self.table = table

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.table)

    def batch(self, rows: Tensor) -> Interactions:
        """Return the rows at int64 positions [n]."""
        return self.table.take(rows)

    def join(self, parts: list[Any], order: Tensor) -> Interactions:
        """Return one batch of several."""
        return Interactions.cat(parts).take(order)
