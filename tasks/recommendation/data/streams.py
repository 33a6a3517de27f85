# SPDX-License-Identifier: Apache-2.0
"""Logs as streams: impressions or lists in blocks on a disk, written by ``moeapps data optimize``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.domain import SPLITS_OF, DomainDataModule, Split
from moeapps.data.gather import BatchDataset
from moeapps.data.stream_writing import StreamPart, StreamPlan
from moeapps.data.streaming import Columns, StreamedRows, StreamError, read_about, split_folder
from tasks.recommendation.data.batch import Interactions, Schema
from tasks.recommendation.data.lists import Lists, ListSchema
from tasks.recommendation.data.source import LogSource

ROWS_PER_BLOCK = 4096
_BAG = "bags/"


class StreamedLog(LogSource):
    """A log out of a stream.

    Args:
        root: folder that ``moeapps data optimize`` has written.
        window: blocks of 4096 rows whose rows are shuffled together, and that are held in memory, for each domain.

    Raises:
        StreamError: no stream of impressions or lists, or a damaged one.
    """

    lists = False

    def __init__(self, *, root: Path, window: int = 32) -> None:
        self.root, self.window = Path(root).expanduser(), window
        self.about = read_about(self.root, "lists" if self.lists else "impressions")
        self.domains = list(dict.fromkeys(name.rpartition("/")[0] for name in self.about["splits"]))
        self.default_roles = self.about["roles"]  # type: ignore[misc]
        facts: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in self.about["facts"].items()
        }
        try:
            self._schema = ListSchema(**facts) if self.lists else Schema(**facts)
        except (TypeError, ValueError) as error:
            raise StreamError(f"{self.root} describes no columns ({error}); write the stream again") from error

    @property
    def schema(self) -> Schema | ListSchema:
        """Sizes of the columns, as they were written."""
        return self._schema

    @override
    def dataset(self, domain: str, split: Split, cache: Path | None) -> BatchDataset:
        folder = split_folder(self.root, self.about, domain, split)
        return StreamedRows(folder, lists_of_columns if self.lists else impressions_of_columns, self.window)

    @override
    def describe(self, domain: str) -> str:
        return f"stream {self.root.name}"


class StreamedLists(StreamedLog):
    """Lists of candidates out of a stream; options as of `StreamedLog`."""

    lists = True


def columns_of(batch: Interactions | Lists) -> Columns:
    """Return the columns of a batch by name; those of bags have a name for ids and one for weights."""
    columns = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    for name, (ids, weight) in getattr(batch, "bags", {}).items():
        columns |= {f"{_BAG}{name}/ids": ids, f"{_BAG}{name}/weight": weight}
    return columns


def impressions_of_columns(columns: Columns) -> Interactions:
    """Return the impressions whose columns these are."""
    plain = {name: column for name, column in columns.items() if not name.startswith(_BAG)}
    bags = [name.removeprefix(_BAG).removesuffix("/ids") for name in columns if name.endswith("/ids")]
    pairs = {name: (columns[f"{_BAG}{name}/ids"], columns[f"{_BAG}{name}/weight"]) for name in sorted(bags)}
    return Interactions(bags=pairs, **plain)


def lists_of_columns(columns: Columns) -> Lists:
    """Return the lists whose columns these are."""
    return Lists(**columns)


def plan(data: DomainDataModule, source: LogSource) -> StreamPlan:
    """Say how a log becomes a stream: every row that a run may read, in the log's own order."""
    lists = isinstance(source.schema, ListSchema)
    parts = {}
    for role, names in data.roles.items():
        for domain, split in ((name, split) for name in names for split in SPLITS_OF[role]):
            rows = cast(BatchDataset, data.get_dataset(domain, split))
            parts[domain, split] = StreamPart(len(rows), partial(_blocks, rows, source.schema, f"{domain}, {split}"))

    def overlay(root: Path) -> dict[str, Any]:
        name = StreamedLists.__qualname__ if lists else StreamedLog.__qualname__
        reader = {"class_path": f"{__name__}.{name}", "init_args": {"root": str(root)}}
        return {
            "class_path": f"{type(data).__module__}.{type(data).__qualname__}",
            "init_args": {"source": reader, **{role: list(names) for role, names in data.roles.items()}},
        }

    return StreamPlan("lists" if lists else "impressions", source.schema.facts(), data.roles, parts, overlay)


def _blocks(rows: BatchDataset, schema: Schema | ListSchema, name: str) -> Iterator[tuple[int, Columns]]:
    for part in torch.arange(len(rows)).split(ROWS_PER_BLOCK):
        batch = rows.batch(part)
        schema.check(batch, name)
        yield len(part), columns_of(batch)
