# SPDX-License-Identifier: Apache-2.0
"""Public logs of impressions: read once in their published layout, kept as Parquet, then read as `TableFiles`.

A log's reader says which files it needs, and yields their rows as tables with two further columns: ``split`` (train,
val, test) and ``domain``. They are written to ``<cache>/recommendation/<name>-<hash>/<split>/<domain>.parquet``, where
any program can read them too. Memory is bounded by the parts of text (8 MB) and one row group per split and domain.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from numpy.typing import NDArray

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import SPLITS, Role, Split
from moeapps.data.gather import BatchDataset
from tasks.recommendation.data.batch import Schema
from tasks.recommendation.data.readers.blocks import block_writer
from tasks.recommendation.data.readers.columns import TableColumns, TaskColumn
from tasks.recommendation.data.readers.published import Published
from tasks.recommendation.data.readers.tables import TableDomain, TableFiles, TableSplit
from tasks.recommendation.data.readers.values import TableError
from tasks.recommendation.data.source import LogSource, touched

log = logging.getLogger("moeapps")

ROWS = 16_384  # rows of a row group: what is read and held at once


class PublicLog(Published, LogSource):
    """Base class of the readers of public logs of impressions.

    Args:
        root: folder of the published files.
        columns: which of the columns that `parts` yields are what.
        domains: all domains the log can have.
        settings: everything that changes what `parts` yields.
        window: blocks whose rows are shuffled together, and that are held in memory at most.

    Attributes:
        time_unit: seconds per unit of the time column.
    """

    time_unit: ClassVar[float] = 1.0
    streaming = True

    def __init__(
        self,
        *,
        root: Path,
        columns: TableColumns,
        domains: Iterable[str],
        settings: dict[str, Any],
        window: int = 8,
    ) -> None:
        super().__init__(root)
        self.columns, self.settings, self.window = columns, settings, window
        self.domains: dict[str, TableDomain] = {}
        for domain in domains:
            train, val, test = (TableSplit([f"{split}/{domain}.parquet"]) for split in SPLITS)
            self.domains[domain] = TableDomain(train=train, val=val, test=test)
        self.roles: dict[Role, list[str]] = {}
        self._tables: TableFiles | None = None

    # What a reader says -------------------------------------------------------------------------------------------

    def parts(self) -> Iterator[pa.Table]:
        """Yield the log's rows, with ``split`` and ``domain``; rows without one of them are left out."""
        raise TypeError(f"{type(self).__name__} must define parts()")

    # What a log provides ------------------------------------------------------------------------------------------

    @property
    def schema(self) -> Schema:
        """Sizes of the columns."""
        return self.columns.schema()

    def bind(self, roles: dict[Role, list[str]]) -> None:
        """Check the names of the domains."""
        self._files(self.root).bind(roles)
        self.roles, self._tables = roles, None

    def describe(self, domain: str) -> str:
        """Name the data set."""
        return f"{self.name}, domain {domain}"

    def prepare(self, cache: Path | None) -> None:
        """Convert the published files if that was not done yet, and count and check the rows of this run's domains."""
        self._converted(cache).prepare(cache)

    def dataset(self, domain: str, split: Split, cache: Path | None) -> BatchDataset:
        """Return the rows of one domain and split, read when they are asked for."""
        return self._converted(cache).dataset(domain, split, cache)

    def _files(self, folder: Path) -> TableFiles:
        timed = self.columns.time is not None
        return TableFiles(
            root=folder,
            columns=self.columns,
            domains=self.domains,
            window=self.window,
            time_sorted=False,
            time_unit=self.time_unit if timed else 1.0,
        )

    def _converted(self, cache: Path | None) -> TableFiles:
        if self._tables is None:
            folder = self.convert(cache)
            for _, name, split in touched(self.roles):
                if not (folder / split / f"{name}.parquet").is_file():
                    there = ", ".join(sorted(path.stem for path in (folder / split).glob("*.parquet"))) or "none"
                    raise TableError(f"{self.name}: domain {name!r} has no {split} rows; domains with some: {there}")
            self._tables = self._files(folder)
            self._tables.bind(self.roles)
        return self._tables

    def convert(self, cache: Path | None) -> Path:
        """Return the folder of the Parquet files, made if they are not there.

        Raises:
            TableError: a published file is missing or is not what it should be.
        """
        key = config_hash([type(self).__name__, self.revision, self.stamps(), self.settings])
        folder = cache_dir("recommendation", root=cache) / f"{type(self).__name__.lower()}-{key}"

        def write(path: Path) -> None:
            # Without its list of counts a folder is not finished: what a broken run left is made again.
            for split in SPLITS:
                shutil.rmtree(folder / split, ignore_errors=True)
            log.info("%s: %s", self.name, self.terms)
            counts = write_parts(self.parts(), folder)
            path.write_text(json.dumps(counts, indent=1, sort_keys=True), encoding="utf-8")

        build_once(folder / "rows.json", write, beside=lambda: sorted(folder.glob("*/*.parquet")))
        return folder


def write_parts(tables: Iterable[pa.Table], folder: Path, rows: int = ROWS) -> dict[str, int]:
    """Write rows to ``<folder>/<split>/<domain>.parquet`` as they come.

    Args:
        tables: with text columns ``split`` and ``domain``; rows that lack one of them are left out.
        folder: where.
        rows: rows of a row group.

    Returns:
        Rows by ``<split>/<domain>``, and those left out as ``left_out``.
    """
    waiting: dict[str, list[pa.Table]] = {}
    writers: dict[str, pyarrow.parquet.ParquetWriter] = {}
    counts: Counter[str] = Counter()

    def flush(name: str) -> None:
        table = pa.concat_tables(waiting.pop(name))
        if name not in writers:
            path = folder / f"{name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            writers[name] = block_writer(path, table.schema)
        writers[name].write_table(table, row_group_size=rows)

    try:
        for table in tables:
            place = pc.binary_join_element_wise(table["split"], table["domain"], "/").combine_chunks()
            counts["left_out"] += place.null_count
            code = place.dictionary_encode()
            for k, name in enumerate(code.dictionary.to_pylist()):
                mine = table.filter(pc.equal(code.indices, k)).drop_columns(["split"])
                counts[name] += len(mine)
                waiting.setdefault(name, []).append(mine)
                if sum(map(len, waiting[name])) >= rows:
                    flush(name)
        for name in list(waiting):
            flush(name)
    finally:
        for writer in writers.values():
            writer.close()
    return dict(counts)


# Columns that readers make --------------------------------------------------------------------------------------------


def replace(table: pa.Table, **columns: Any) -> pa.Table:
    """Return a table with columns added, or put in the place of those of the same name."""
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.append_column(name, values) if place < 0 else table.set_column(place, name, values)
    return table


def by_time(times: pa.ChunkedArray, val: float, test: float) -> pa.Array:
    """Return the split of each row: before ``val`` train, before ``test`` val, else test; none without a time."""
    values = times.to_numpy()
    names = np.array(SPLITS, object)[np.searchsorted([val, test], values, side="right")]
    return pa.array(names, pa.string(), mask=pc.is_null(times, nan_is_null=True).to_numpy())


def choose(values: NDArray[np.int64], names: Iterable[str | None]) -> pa.Array:
    """Return ``names[value]`` for each value."""
    return pa.array(list(names), pa.string()).take(pa.array(values))


def instant(day: str, hours: int = 0) -> float:
    """Return the seconds since 1970 at which a day (2022-04-22) begins, where clocks are ``hours`` before UTC's.

    Raises:
        ValueError: text that is no date.
    """
    return datetime.fromisoformat(day).replace(tzinfo=timezone(timedelta(hours=hours))).timestamp()


def chosen(all_tasks: Iterable[TaskColumn], names: Iterable[str]) -> list[TaskColumn]:
    """Return tasks by name.

    Raises:
        ValueError: an unknown name.
    """
    known = {task.name: task for task in all_tasks}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown task {name!r}; allowed: {', '.join(known)}")
    return [known[name] for name in names]


def in_order(val: float, test: float, said: str) -> None:
    """Check that validation begins before the test.

    Raises:
        ValueError: it does not.
    """
    if val >= test:
        raise ValueError(f"{said}: the validation must begin before the test")
