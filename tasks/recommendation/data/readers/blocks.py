# SPDX-License-Identifier: Apache-2.0
"""Tables as blocks of rows that are read alone: the row groups of Parquet.

Text cannot be entered in the middle (quotes and compression begin at the top), so it is turned into Parquet once.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.files import WholeFile, absent
from tasks.recommendation.data.readers.text import TextFormat, read_header, refuse_open_quote, typed_batches
from tasks.recommendation.data.readers.values import TEXT, TableError

BLOCK_ROWS = 16_384
# What pyarrow answers damage with; names that are no text are a UnicodeDecodeError.
_DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, OverflowError)
_ANY_ROWS, _ROWS_PER_BYTE = 1 << 20, 8
"""A row group may hold so many rows more for each byte of its file: equal values take no room on the disk."""


class BlockFile:
    """A Parquet file; a block is a row group.

    Args:
        path: the file.

    Raises:
        TableError: a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: parquet.ParquetFile | None = None
        try:
            self._meta = parquet.read_metadata(path)
            schema = self._meta.schema.to_arrow_schema()
        except _DAMAGE as error:
            raise TableError(f"{path} is not a readable Parquet file ({error})") from error
        self.columns: list[str] = schema.names
        self.sizes: list[int] = [self._meta.row_group(group).num_rows for group in range(self._meta.num_row_groups)]
        size = path.stat().st_size
        if self.sizes and not 0 <= max(self.sizes) <= _ANY_ROWS + _ROWS_PER_BYTE * size:
            raise TableError(
                f"{path} has {size:,} bytes and a row group of {max(self.sizes):,} rows, which would fill memory; "
                f"write it with row groups of at most {_ANY_ROWS:,} rows"
            )
        # Words that repeat stay one entry of a dictionary each: they are then hashed once.
        self._words = [field.name for field in schema if field.type in TEXT]

    def read(self, block: int, columns: Collection[str]) -> pa.Table:
        """Return the named columns of one row group."""
        try:
            if self._file is None:
                # Buffering ahead, which helps far storage, makes a block of a local file dearer by a quarter.
                self._file = parquet.ParquetFile(
                    self.path, metadata=self._meta, read_dictionary=self._words, pre_buffer=False
                )
            return self._file.read_row_group(block, columns=list(columns), use_threads=False)
        except _DAMAGE as error:
            raise TableError(f"{self.path}, block {block} cannot be read ({error})") from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind: a loader process opens its own."""
        return {**self.__dict__, "_file": None}


def open_blocks(
    path: Path,
    rows: int = BLOCK_ROWS,
    *,
    numbers: Collection[str] = (),
    others: Collection[str] | None = None,
    form: TextFormat | None = None,
    cache: Path | None = None,
) -> BlockFile:
    """Open a .parquet file, or turn a .csv or .tsv file (also compressed) into one in the cache, once.

    Args:
        path: the file.
        rows: rows of a block of text.
        numbers: columns that should hold numbers.
        others: columns that hold ids or lists; None: all.
        form: how text is written.
        cache: root of the cache.

    Raises:
        TableError: another ending, a missing or damaged file, or a missing column.
    """
    if not path.is_file():
        raise TableError(f"{absent(path)}; check root and the file names of the domain")
    if path.suffix == ".parquet":
        file = BlockFile(path)
        _require(path, [*numbers, *(others or ())], file.columns)
        return file
    form = form or TextFormat()
    names = read_header(path, form)
    others = names if others is None else others
    _require(path, [*numbers, *others], names)
    about = [1, *stamp(path), rows, sorted(numbers), sorted(others), form]

    def write(target: Path) -> None:
        # The strictest types that the whole file keeps: numbers, else text; who reads a column says what is wrong.
        try:
            write_blocks(target, typed_batches(path, numbers, others, form, strict=True), rows)
        except TableError:
            write_blocks(target, typed_batches(path, numbers, others, form, strict=False), rows)
        refuse_open_quote(path, form)

    name = f"{path.name}-{config_hash(about)}.parquet"
    return BlockFile(build_once(cache_dir("recommendation", root=cache) / name, write))


def stamp(path: Path) -> tuple[str, int, int]:
    """Return path, size and time of a file: what a cache made of it hangs on."""
    return str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns


def _require(path: Path, wanted: Iterable[str], there: list[str]) -> None:
    for name in wanted:
        if name not in there:
            raise TableError(f"{path} has no column {name!r}; it has: {', '.join(there)}")


def block_writer(path: Path, schema: pa.Schema) -> parquet.ParquetWriter:
    """Open a Parquet file that is quickly written and read: words by dictionaries, numbers as they are, no compression.

    Ids and numbers of a log hardly get smaller, and a first use of text costs a tenth less without.
    """
    words: Any = [field.name for field in schema if field.type in TEXT] or False
    return parquet.ParquetWriter(path, schema, compression="none", use_dictionary=words, write_statistics=False)


def write_blocks(path: Path, batches: Iterable[pa.RecordBatch], rows: int = BLOCK_ROWS) -> None:
    """Write batches of one schema (at least one) as Parquet with ``rows`` rows in each block, one block in memory."""
    batches = iter(batches)
    rest = pa.Table.from_batches([next(batches)])
    with block_writer(path, rest.schema) as writer:
        for batch in batches:
            rest = pa.concat_tables([rest, pa.Table.from_batches([batch])])
            full = len(rest) - len(rest) % rows
            if full:
                writer.write_table(rest.slice(0, full), row_group_size=rows)
                rest = rest.slice(full)
        if len(rest):
            writer.write_table(rest, row_group_size=rows)


def write_table(path: Path, columns: dict[str, Sequence[Any]], rows_per_block: int = BLOCK_ROWS) -> None:
    """Write columns as .parquet, .csv or .tsv (without quotes): what tests and small exports need.

    Args:
        path: file to write; whole or not at all.
        columns: name -> values, all of one length; None is a missing value, a list a multi-valued one.
        rows_per_block: rows per row group of Parquet.

    Raises:
        ValueError: columns of different lengths.
        TableError: an unknown ending.
        csv.Error: a tab or a line end inside a field of .tsv.
    """
    plain = {name: values.tolist() if isinstance(values, np.ndarray) else values for name, values in columns.items()}
    with WholeFile(path) as temporary:
        if path.suffix == ".parquet":
            parquet.write_table(pa.table(plain), temporary, row_group_size=rows_per_block)
            return
        delimiter, quotes = TextFormat().dialect(path)
        form: dict[str, Any] = {} if quotes else {"quoting": csv.QUOTE_NONE, "quotechar": None}
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter, **form)
            writer.writerow(plain)
            writer.writerows(
                [",".join(map(str, value)) if isinstance(value, list) else value for value in row]
                for row in zip(*plain.values(), strict=True)
            )
