# SPDX-License-Identifier: Apache-2.0
"""Your own log in Parquet or CSV files, read block by block: no file is ever held whole in memory.

Text is turned into Parquet in the cache once. One pass over the filter, time and label columns then counts the rows of
each block and checks them; its result is kept as well. Training draws blocks in random order and shuffles rows in
windows of blocks (`moeapps.data.windows.WindowSampler`); evaluation reads blocks in order.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import Role, Split
from moeapps.files import absent
from tasks.recommendation.data.batch import Interactions, Schema
from tasks.recommendation.data.readers.block_rows import Block, BlockCache, BlockDataset
from tasks.recommendation.data.readers.blocks import BLOCK_ROWS, BlockFile, open_blocks, stamp
from tasks.recommendation.data.readers.columns import TableColumns
from tasks.recommendation.data.readers.text import TextFormat
from tasks.recommendation.data.readers.values import TableError, hash_values, to_numbers
from tasks.recommendation.data.source import LogSource, touched

DAY = 86_400.0


@dataclass
class TableSplit:
    """The rows of one split.

    Args:
        files: files or shell patterns below the root, read in this order.
        since: rows with time >= since only, in the unit of the time column.
        before: rows with time < before only.
    """

    files: list[str]
    since: float | None = None
    before: float | None = None


@dataclass
class TableDomain:
    """One domain.

    Args:
        train: rows to train on; needed by seen domains.
        val: rows to validate on; needed by seen and validation domains.
        test: rows to test on.
        where: column -> allowed values: the rows of this domain among those of the files. Values are compared, not
            spellings: 1 is also 1.0, "1" and true.
    """

    train: TableSplit | None = None
    val: TableSplit | None = None
    test: TableSplit | None = None
    where: dict[str, list[int | str]] = field(default_factory=dict)


class TableFiles(LogSource):
    """A log of one's own.

    Args:
        root: folder of the files.
        columns: which columns are what.
        domains: domains by name.
        window: blocks whose rows are shuffled together, and that are held in memory at most.
        csv_rows: records of a text file that make a block.
        time_sorted: times must not decrease from row to row of a file.
        time_unit: seconds per unit of the time column (0.001 for milliseconds); times later than now are refused.
        later_training_rows: allow training rows later than the first test row.
        text: how text files are written; None: `TextFormat()`.

    Raises:
        ValueError: a size below 1, or a time limit without a time column.
    """

    streaming = True
    domains: dict[str, TableDomain]

    def __init__(
        self,
        *,
        root: Path,
        columns: TableColumns,
        domains: dict[str, TableDomain],
        window: int = 8,
        csv_rows: int = BLOCK_ROWS,
        time_sorted: bool = True,
        time_unit: float = 1.0,
        later_training_rows: bool = False,
        text: TextFormat | None = None,
    ) -> None:
        if window < 1 or csv_rows < 1 or time_unit <= 0:
            raise ValueError(f"window={window}, csv_rows={csv_rows}, time_unit={time_unit}: all must be above 0")
        self.root, self.columns, self.domains = Path(root), columns, domains
        self.window, self.csv_rows = window, csv_rows
        self.time_sorted, self.time_unit, self.later_training_rows = time_sorted, time_unit, later_training_rows
        self.text = text or TextFormat()
        self.roles: dict[Role, list[str]] = {}
        self._blocks: dict[tuple[str, Split], list[Block]] = {}
        self._held: dict[Split, BlockCache] = {}
        self._files: dict[str, BlockFile] = {}
        for name, domain in domains.items():
            for split in (domain.train, domain.val, domain.test):
                if split and (split.since is not None or split.before is not None) and columns.time is None:
                    raise ValueError(f"domain {name!r} limits the time; name the time column in columns.time")

    @property
    def schema(self) -> Schema:
        """Sizes of the columns."""
        return self.columns.schema()

    def bind(self, roles: dict[Role, list[str]]) -> None:
        """Check that every domain is described and has the splits of its role."""
        super().bind(roles)
        for role, name, split in touched(roles):
            if getattr(self.domains[name], split) is None:
                raise ValueError(f"{role} domain {name!r} has no {split} files; give it at least one")

    def describe(self, domain: str) -> str:
        """Name the files."""
        test = self.domains[domain].test
        return f"tables {', '.join(test.files) if test else ''} below {self.root.name}"

    def prepare(self, cache: Path | None) -> None:
        """Count and check the rows that training and tests will read."""
        for _, name, split in touched(self.roles):
            self.blocks(name, split, cache)

    def dataset(self, domain: str, split: Split, cache: Path | None) -> BlockDataset:
        """Return the rows of one domain and split, read when they are asked for.

        Raises:
            TableError: unsorted or future times, training rows after the first test row, a task without positives.
        """
        blocks = self.blocks(domain, split, cache)
        if split == "train":
            self._check_training(cache)
        held = self._held.setdefault(split, BlockCache(self.window))
        return BlockDataset(blocks, partial(self.read, domain, split), held, (domain, split))

    # The pass that counts and checks ------------------------------------------------------------------------------

    def files(self, domain: str, split: Split, cache: Path | None) -> list[Path]:
        """Return the files of a split; a source that joins or mends files first overrides this.

        Args:
            domain: its domain.
            split: train, val or test.
            cache: root of the cache, where such a source puts what it makes (`write_blocks`).

        Raises:
            TableError: a name or pattern that no file has.
        """
        part: TableSplit = getattr(self.domains[domain], split)
        found: list[Path] = []
        for pattern in part.files:
            matches = sorted(self.root.glob(pattern))
            if not matches:
                raise TableError(f"domain {domain!r}: {absent(self.root / pattern)}; check root and the names")
            found += matches
        return found

    def blocks(self, domain: str, split: Split, cache: Path | None) -> list[Block]:
        """Return the blocks that hold rows of a domain and split; counted once, then kept in the cache."""
        if (domain, split) not in self._blocks:
            paths = self.files(domain, split, cache)
            for path in paths:
                self._open(path, cache)
            stamps = [stamp(path) for path in paths]
            about = self.domains[domain]
            rules = [asdict(getattr(about, split)), about.where, self.csv_rows, self.time_sorted, self.time_unit]
            tasks = [asdict(task) for task in self.columns.tasks]
            key = config_hash([2, stamps, rules, tasks, self.columns.time, self.text])

            def write(path: Path) -> None:
                path.write_text(json.dumps([asdict(b) for b in self._count(paths, domain, split)]), encoding="utf-8")

            path = build_once(cache_dir("recommendation", root=cache) / f"blocks-{domain}-{split}-{key}.json", write)
            raw = json.loads(path.read_text(encoding="utf-8"))
            self._blocks[domain, split] = [Block(**{**b, "times": b["times"] and tuple(b["times"])}) for b in raw]
        return self._blocks[domain, split]

    def _open(self, path: Path, cache: Path | None) -> None:
        """Open a file once, for all domains: with every column that one of them asks for."""
        if str(path) not in self._files:
            spelled = self.columns.spelled().union(*(domain.where for domain in self.domains.values()))
            timed = [self.columns.time] if self.columns.time else []
            numbers = sorted({*self.columns.needed(), *timed} - spelled)
            self._files[str(path)] = open_blocks(
                path, self.csv_rows, numbers=numbers, others=sorted(spelled), form=self.text, cache=cache
            )

    def _count(self, paths: list[Path], domain: str, split: Split) -> list[Block]:
        from rich.progress import track

        time_column, where = self.columns.time, self.domains[domain].where
        wanted = [*where, *self.columns.labels_needed(), *([time_column] if time_column else [])]
        blocks, first = [], 0
        for path in paths:
            file, last = self._files[str(path)], -math.inf
            numbers = range(len(file.sizes))
            for number in track(numbers, f"counting {path.name}", transient=True, disable=len(numbers) < 100):
                what = f"{path}, block {number}"
                found = file.read(number, list(dict.fromkeys(wanted)))
                times = self._times(found, what)
                if times is not None:
                    last = self._check_times(times, last, what)
                keep = self.keep(domain, split, found, what)
                every = len(keep) == len(found)
                label, mask = self.columns.labels(found if every else found.take(pa.array(keep)), what)
                if len(keep):
                    kept = times if every or times is None else times[keep]
                    span = None if kept is None else (float(kept.min()), float(kept.max()))
                    counts = (mask.sum(0).tolist(), (label > 0).sum(0).tolist())
                    blocks.append(Block(str(path), number, first, len(keep), span, *counts))
                first += file.sizes[number]
        return blocks

    def _times(self, found: pa.Table, what: str) -> NDArray[np.float64] | None:
        name = self.columns.time
        return None if name is None else to_numbers(found.column(name), f"{what}, time {name!r}", self.time_unit)

    def keep(self, domain: str, split: Split, found: pa.Table, what: str) -> NDArray[np.int64]:
        """Return the positions in a block of the rows that belong to a domain and split."""
        part: TableSplit = getattr(self.domains[domain], split)
        if not self.domains[domain].where and part.since is None and part.before is None:
            return np.arange(len(found))
        keep = np.ones(len(found), np.bool_)
        for name, allowed in self.domains[domain].where.items():
            # Equal values have equal hashes of 64 bits, whatever type or spelling a file gives them.
            values, null = hash_values(found.column(name), what=f"{what}, where {name!r}", fractions=True)
            wanted, _ = hash_values(pa.array([str(value) for value in allowed], pa.string()))
            keep &= np.isin(values, wanted) & ~null
        if part.since is not None or part.before is not None:
            times = cast(NDArray[np.float64], self._times(found, what))
            keep &= (times >= (-math.inf if part.since is None else part.since)) & (
                times < (math.inf if part.before is None else part.before)
            )
        return np.flatnonzero(keep)

    def _check_times(self, times: NDArray[np.float64], last: float, what: str) -> float:
        if np.isnan(times).any():
            raise TableError(f"{what}: row {int(np.flatnonzero(np.isnan(times))[0])} has no time; drop or fill it")
        late = times * self.time_unit > time.time() + DAY
        if late.any():
            raise TableError(
                f"{what}: row {int(np.flatnonzero(late)[0])} has time {times[late][0]:.0f}, which lies in the future; "
                "mend it, or set time_unit (0.001 for milliseconds)"
            )
        steps = np.diff(times, prepend=last)
        if self.time_sorted and (steps < 0).any():
            row = int(np.flatnonzero(steps < 0)[0])
            raise TableError(
                f"{what}: the time of row {row} ({times[row]:.0f}) is before that of the row above; sort the file by "
                f"{self.columns.time}, or set time_sorted: false if no feature is built from the order"
            )
        return float(times[-1]) if len(times) else last

    def _check_training(self, cache: Path | None) -> None:
        """Training rows of all seen domains: each task has positives, and none is later than the first test row."""
        train = [block for name in self.roles["seen"] for block in self.blocks(name, "train", cache)]
        for t, task in enumerate(self.columns.tasks):
            known, positive = sum(block.known[t] for block in train), sum(block.positive[t] for block in train)
            if positive == 0 or positive == known:
                kind = "positive" if positive == 0 else "negative"
                raise TableError(
                    f"task {task.name!r} has no {kind} among {known} training labels; take it out of columns.tasks or "
                    f"check column {task.label_column!r}"
                )
        if self.columns.time is None or self.later_training_rows:
            return
        names = [name for names in self.roles.values() for name in names]
        first_test = min(
            (b.times[0] for name in names for b in self.blocks(name, "test", cache) if b.times), default=math.inf
        )
        last_train = max((block.times[1] for block in train if block.times), default=-math.inf)
        if last_train >= first_test:
            raise TableError(
                f"the last training row (time {last_train:.0f}) is not earlier than the first test row "
                f"({first_test:.0f}): training would see the future; use since and before, or set later_training_rows"
            )

    # Reading ------------------------------------------------------------------------------------------------------

    def read(self, domain: str, split: Split, block: Block) -> Interactions:
        """Read the rows of a domain and split in one block."""
        file = self._files[block.file]
        part: TableSplit = getattr(self.domains[domain], split)
        timed = [self.columns.time] if self.columns.time and (part.since, part.before) != (None, None) else []
        wanted = [*self.columns.needed(), *self.domains[domain].where, *timed]
        found = file.read(block.number, list(dict.fromkeys(wanted)))
        what = f"{block.file}, block {block.number}"
        keep = self.keep(domain, split, found, what)
        if len(keep) != block.rows:
            raise TableError(f"{what} has changed while it was in use; start again")
        picked = found if len(keep) == len(found) else found.take(pa.array(keep))
        return self.columns.convert(picked, block.first + keep, what)

    def forget(self) -> None:
        """Let go of all held rows."""
        self._held.clear()
