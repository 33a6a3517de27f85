# SPDX-License-Identifier: Apache-2.0
"""Parquet and CSV files as blocks of rows that are read alone: row groups, or some thousand records of text.

Parquet needs pyarrow (``pip install -e '.[tables]'``); CSV needs nothing. No file is ever held whole.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeapps.files import WholeFile


class TableError(ValueError):
    """A table that is missing, damaged, or does not hold what the configuration says."""


@dataclass(frozen=True)
class Column:
    """Values of one column in one block.

    Attributes:
        values: [n] float64, int64 or bool; or objects: str, or a list per row (Parquet's list columns).
        null: bool [n], True where there is no value; ``values`` holds 0, "" or [] there.
    """

    values: NDArray[Any]
    null: NDArray[np.bool_]

    def numbers(self, what: str) -> NDArray[np.float64]:
        """Return the values as float64, NaN where there is none.

        Raises:
            TableError: text that is not a number; the message begins with ``what``.
        """
        values = self.values
        if values.dtype == object:
            try:
                values = np.array([float(word) if word != "" else np.nan for word in values], np.float64)
            except (ValueError, TypeError) as error:
                raise TableError(f"{what}: {error}; this column must hold numbers") from error
        return np.where(self.null, np.nan, values.astype(np.float64))


class BlockFile:
    """A file of rows in blocks.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise TableError(f"no file {path}; check root and the file names of the domain")

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        raise TypeError(f"{type(self).__name__} must define columns")

    @property
    def sizes(self) -> list[int]:
        """Rows of each block."""
        raise TypeError(f"{type(self).__name__} must define sizes")

    def read(self, block: int, columns: Sequence[str]) -> dict[str, Column]:
        """Return the named columns of one block."""
        raise TypeError(f"{type(self).__name__} must define read(block, columns)")

    def require(self, columns: Iterable[str]) -> None:
        """Check that columns are there.

        Raises:
            TableError: one is missing; the text lists those that are there.
        """
        for name in columns:
            if name not in self.columns:
                raise TableError(f"{self.path} has no column {name!r}; it has: {', '.join(self.columns)}")


def open_blocks(path: Path, csv_rows: int = 16_384) -> BlockFile:
    """Open a .parquet or .csv (.tsv: tab separated) file.

    Raises:
        TableError: another ending, a missing file, or Parquet without pyarrow.
    """
    if path.suffix == ".parquet":
        return ParquetBlocks(path)
    if path.suffix in (".csv", ".tsv"):
        return CsvBlocks(path, rows=csv_rows, delimiter="\t" if path.suffix == ".tsv" else ",")
    raise TableError(f"{path}: ending {path.suffix!r} is unknown; allowed are .parquet, .csv and .tsv")


class ParquetBlocks(BlockFile):
    """A Parquet file; a block is a row group.

    Raises:
        TableError: pyarrow is missing or the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise TableError(f"{path}: Parquet needs pyarrow: pip install -e '.[tables]', or use CSV") from error
        try:
            self._meta = parquet.read_metadata(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise TableError(f"{path} is not a readable Parquet file ({error})") from error

    @cached_property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._meta.schema.to_arrow_schema().names)

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each row group."""
        return [self._meta.row_group(group).num_rows for group in range(self._meta.num_row_groups)]

    def read(self, block: int, columns: Sequence[str]) -> dict[str, Column]:
        """Return the named columns of one row group."""
        import pyarrow.parquet as parquet

        self.require(columns)
        # Opened anew: a handle kept open could not be handed to loader processes.
        with parquet.ParquetFile(self.path, metadata=self._meta) as file:
            table = file.read_row_group(block, columns=list(columns), use_threads=False)
        return {name: _from_arrow(table.column(name)) for name in columns}


def _from_arrow(chunked: Any) -> Column:
    import pyarrow as pa

    null = np.asarray(chunked.is_null().to_numpy(), np.bool_)
    kind = chunked.type
    if pa.types.is_dictionary(kind):
        chunked, kind = chunked.cast(kind.value_type), kind.value_type
    if pa.types.is_timestamp(kind):
        chunked, kind = chunked.cast(pa.timestamp("us")).cast(pa.int64()), pa.int64()
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        filled = chunked.fill_null(False if pa.types.is_boolean(kind) else 0)
        return Column(filled.to_numpy().astype(np.int64 if pa.types.is_integer(kind) else np.float64), null)
    values = np.empty(len(null), object)
    empty: Any = [] if pa.types.is_list(kind) or pa.types.is_large_list(kind) else ""
    values[:] = [empty if value is None else value for value in chunked.to_pylist()]
    return Column(values, null)


class CsvBlocks(BlockFile):
    """A text file with a header; a block is ``rows`` records, found again by their place in the file.

    Quoted fields may hold line ends. An empty field is missing.

    Args:
        path: the file.
        rows: records per block.
        delimiter: what separates fields.

    Raises:
        TableError: an empty file.
    """

    def __init__(self, path: Path, rows: int = 16_384, delimiter: str = ",") -> None:
        super().__init__(path)
        self.rows, self.delimiter = rows, delimiter
        self._index: tuple[list[int], list[int]] | None = None

    @cached_property
    def columns(self) -> list[str]:
        """Names in the header."""
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter=self.delimiter), None)
        if not header:
            raise TableError(f"{self.path} is empty; a header line with column names is needed")
        return header

    @property
    def sizes(self) -> list[int]:
        """Records of each block; the first call reads through the file once, in constant memory."""
        return self._places()[1]

    def _places(self) -> tuple[list[int], list[int]]:
        """Where each block begins (and the last ends), and its records: a line ends one if quotes are balanced."""
        if self._index is None:
            starts: list[int] = []
            count, place, quotes, records = 0, 0, 0, -1  # the header is record -1
            with open(self.path, "rb") as file:
                for line in file:
                    place += len(line)
                    quotes += line.count(b'"')
                    if quotes % 2 == 0 and line.strip():
                        records += 1
                        if records % self.rows == 0:
                            starts.append(place)
                            count = records
            # Where the last block is full, its end was noted as the start of one more.
            full = max(len(starts) - 1, 0)
            rest = max(records, 0) - count
            sizes = [self.rows] * full + ([rest] if rest else [])
            self._index = ([*starts, place] if rest else starts, sizes)
        return self._index

    def read(self, block: int, columns: Sequence[str]) -> dict[str, Column]:
        """Return the named columns of one block, as text."""
        self.require(columns)
        starts, sizes = self._places()
        with open(self.path, "rb") as file:
            file.seek(starts[block])
            text = file.read(starts[block + 1] - starts[block]).decode()
        records = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter) if row]
        first = sum(sizes[:block])
        for k, row in enumerate(records):
            if len(row) != len(self.columns):
                raise TableError(
                    f"{self.path}: record {first + k + 1} has {len(row)} fields, the header {len(self.columns)}"
                )
        found = {}
        for name in columns:
            place = self.columns.index(name)
            values = np.empty(len(records), object)
            values[:] = [row[place] for row in records]
            found[name] = Column(values, values == "")
        return found


def write_table(path: Path, columns: dict[str, Sequence[Any]], rows_per_block: int = 16_384) -> None:
    """Write columns as .parquet (pyarrow), .csv or .tsv: what tests and small exports need.

    Args:
        path: file to write; whole or not at all.
        columns: name -> values, all of one length; None is a missing value, a list a multi-valued one.
        rows_per_block: rows per row group of Parquet.

    Raises:
        TableError: columns of different lengths, or an unknown ending.
    """
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise TableError(f"columns of different lengths: {lengths}")
    if path.suffix not in (".parquet", ".csv", ".tsv"):
        raise TableError(f"{path}: ending {path.suffix!r} is unknown; allowed are .parquet, .csv and .tsv")
    with WholeFile(path) as temporary:
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as parquet

            plain = {name: pa.array(_plain(values)) for name, values in columns.items()}
            parquet.write_table(pa.table(plain), temporary, row_group_size=rows_per_block)
            return
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(columns)
            writer.writerows([_text(value) for value in row] for row in zip(*columns.values(), strict=True))


def _plain(values: Sequence[Any]) -> Any:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ",".join(str(part) for part in value)
    return repr(float(value)) if isinstance(value, float | np.floating) else str(value)
