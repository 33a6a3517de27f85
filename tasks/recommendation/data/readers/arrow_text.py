# SPDX-License-Identifier: Apache-2.0
"""Published text files as pyarrow tables, a few megabytes at a time; what is wrong is told with what was expected.

Columns have the types that a reader names, so 64-bit ids stay exact. Files whose names end in .gz, .bz2 or .zst are
unpacked on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
from numpy.typing import NDArray

from tasks.recommendation.data.readers.hashing import hash_bytes
from tasks.recommendation.data.readers.values import TableError, text_buffers

BLOCK = 8 << 20  # bytes of text per table
Types = dict[str, Any]  # name -> pyarrow type


def first_line(path: Path, encoding: str = "utf-8") -> str:
    """Return the first line of a file, at most 64 kB of it."""
    with pa.input_stream(str(path), compression="detect") as file:
        head: bytes = file.read(1 << 16)
    return head.split(b"\n")[0].decode(encoding).lstrip("\ufeff").rstrip("\r")


def read_csv(
    path: Path,
    types: Types,
    *,
    names: Sequence[str] | None = None,
    delimiter: str = ",",
    missing: Sequence[str] = ("",),
    block: int = BLOCK,
) -> Iterator[pa.Table]:
    """Yield the named columns of a text file.

    Args:
        path: the file.
        types: column -> type of the columns that are wanted.
        names: names of ALL columns where the file has no header; None: the first line is the header.
        delimiter: one character.
        missing: spellings of a missing value.
        block: bytes per table.

    Raises:
        TableError: a header that lacks a column, another number of fields, or a value of another type.
    """
    found = first_line(path).split(delimiter)
    if names is None:
        lacking = [name for name in types if name not in (word.strip('"') for word in found)]
        if lacking:
            raise TableError(
                f"{path}: the header has no {', '.join(lacking)}; it reads {delimiter.join(found)[:500]!r}, "
                f"expected are: {', '.join(types)}"
            )
    elif len(found) != len(names):
        raise TableError(
            f"{path}: the first line has {len(found)} fields, {len(names)} are expected ({', '.join(names)}); "
            f"it reads {delimiter.join(found)[:200]!r}"
        )
    try:
        with pyarrow.csv.open_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=block, column_names=names),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=types, include_columns=list(types), null_values=list(missing), strings_can_be_null=True
            ),
        ) as file:
            for batch in file:
                yield pa.Table.from_batches([batch])
    except pa.ArrowInvalid as error:
        raise TableError(f"{path}: {error}; expected are: {_typed(types)}") from error


def read_lines(
    path: Path, pattern: str, *, encoding: str = "utf-8", expected: str, block: int = BLOCK
) -> Iterator[pa.Table]:
    """Yield the named groups of a regular expression, as text, for each line of a file.

    Args:
        path: the file.
        pattern: with groups ``(?P<name>...)``; every line must match it.
        encoding: of the file.
        expected: how a line should look, for errors.
        block: bytes per table.

    Raises:
        TableError: a line that does not match, a file without one, or bytes of another encoding.
    """
    try:
        yield from _matched(path, pattern, encoding, expected, block)
    except pa.ArrowInvalid as error:
        raise TableError(f"{path}: {error}; expected are lines {expected} in {encoding}") from error


def _matched(path: Path, pattern: str, encoding: str, expected: str, block: int) -> Iterator[pa.Table]:
    with pyarrow.csv.open_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(
            use_threads=False, block_size=block, column_names=["line"], encoding=encoding
        ),
        # A character that text does not hold: the whole line is one field.
        parse_options=pyarrow.csv.ParseOptions(delimiter="\x01", quote_char=False),
        convert_options=pyarrow.csv.ConvertOptions(column_types={"line": pa.string()}),
    ) as file:
        for batch in file:
            lines = batch.column("line")
            groups = pc.extract_regex(lines, pattern)
            if groups.null_count:
                wrong = lines.filter(groups.is_null())[0].as_py()
                raise TableError(f"{path}: the line {wrong[:200]!r} is not {expected}")
            yield pa.Table.from_struct_array(groups)


def whole(tables: Iterator[pa.Table], path: Path) -> pa.Table:
    """Join all tables of a file.

    Raises:
        TableError: there is none.
    """
    parts = list(tables)
    if not parts:
        raise TableError(f"{path}: the file has a header and nothing else; is it cut off?")
    return pa.concat_tables(parts)


def read_json(path: Path, types: Types, *, required: Sequence[str] = (), block: int = BLOCK) -> Iterator[pa.Table]:
    """Yield the named fields of a file of JSON lines; fields that a line lacks are missing.

    Raises:
        TableError: text that is not JSON, a value of another type, or a required field that a line lacks.
    """
    options = pyarrow.json.ParseOptions(explicit_schema=pa.schema(types), unexpected_field_behavior="ignore")
    try:
        reader = pyarrow.json.open_json(
            path, read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=block), parse_options=options
        )
        for batch in reader:
            for name in required:
                if batch.column(name).null_count:
                    raise TableError(
                        f"{path}: {batch.column(name).null_count} lines have no {name!r}; the first line reads "
                        f"{first_line(path)[:300]!r}, expected are: {_typed(types)}"
                    )
            yield pa.Table.from_batches([batch])
    except pa.ArrowInvalid as error:
        raise TableError(f"{path}: {error}; expected are JSON lines with {_typed(types)}") from error


def _typed(types: Types) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in types.items())


class Lookup:
    """A table held whole, of which rows are found by their key.

    Args:
        tables: its parts.
        key: column of the key; of rows with one key the first counts.
        what: what it is, for the error that there are none.

    Raises:
        TableError: no row at all.
    """

    def __init__(self, tables: Iterator[pa.Table], key: str, what: str) -> None:
        parts = list(tables)
        if not parts:
            raise TableError(f"{what} holds no row")
        whole = pa.concat_tables(parts).combine_chunks()
        codes = whole[key].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
        whole = whole.take(pa.array(np.sort(np.unique(codes, return_index=True)[1])))
        self.sorted = pa.types.is_integer(whole.schema.field(key).type)
        if self.sorted:
            whole = whole.sort_by(key)
        self.keys, self.rest = whole[key].combine_chunks(), whole.drop_columns([key])

    def without(self, keys: pa.Array) -> Lookup:
        """Return the rows whose key is not among others."""
        kept = Lookup.__new__(Lookup)
        free = pc.invert(pc.is_in(self.keys, value_set=keys))
        kept.sorted, kept.keys, kept.rest = self.sorted, self.keys.filter(free), self.rest.filter(free)
        return kept

    def add(self, table: pa.Table, key: str, *, inner: bool = False) -> pa.Table:
        """Add the columns found for each row; ``inner`` drops rows that have none, else they are missing there."""
        place = self._places(table[key].combine_chunks())
        if inner:
            known = pc.is_valid(place)
            table, place = table.filter(known), place.filter(known)
        found = self.rest.take(place)
        for name in found.column_names:
            table = table.append_column(name, found[name])
        return table

    def _places(self, wanted: pa.Array) -> pa.Array:
        if not self.sorted:
            return pc.index_in(wanted, value_set=self.keys)
        # Sorted once: index_in would build its table anew for each part of the log.
        keys = self.keys.to_numpy(zero_copy_only=False)
        values = wanted.fill_null(0).to_numpy(zero_copy_only=False)
        place = np.minimum(np.searchsorted(keys, values), max(len(keys) - 1, 0))
        hit = (keys[place] == values) & wanted.is_valid().to_numpy(zero_copy_only=False) if len(keys) else place < 0
        return pa.array(place, mask=~hit)


def hash_text(words: pa.Array | pa.ChunkedArray, seed: int = 0) -> NDArray[np.uint64]:
    """Return a seeded hash of each text, the same on every machine; a missing one hashes as the empty one."""
    joined = words.combine_chunks() if isinstance(words, pa.ChunkedArray) else words
    return hash_bytes(*text_buffers(joined.fill_null("")), seed)


def share_of(words: pa.ChunkedArray, seed: int = 0) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each text, the same for equal ones."""
    return np.asarray((hash_text(words, seed) >> np.uint64(11)) / float(1 << 53))
