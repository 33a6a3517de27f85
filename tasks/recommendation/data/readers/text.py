# SPDX-License-Identifier: Apache-2.0
"""Text files (.csv, .tsv, also compressed) read by pyarrow from top to bottom, a megabyte at a time."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as arrow_csv

from tasks.recommendation.data.readers.values import TableError, spelled_integers

DELIMITERS = {".csv": ",", ".tsv": "\t"}
COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")
CHUNK_BYTES = 1 << 20
"""Bytes read at once; no record may be longer."""


@dataclass
class TextFormat:
    """How text files are written.

    Args:
        quotes: a field that begins with a double quote ends at the next one, may hold delimiters and line ends, and
            spells a quote as two. None: so in .csv, not in .tsv, where a quote is an inch mark like any other letter.
        encoding: encoding of the text; a byte order mark is dropped.
        missing: fields that mean "no value".
    """

    quotes: bool | None = None
    encoding: str = "utf-8"
    missing: list[str] = field(default_factory=lambda: [""])

    def dialect(self, path: Path) -> tuple[str, bool]:
        """Return what separates the fields of a file, and whether quotes enclose them.

        Raises:
            TableError: an ending that is not text's.
        """
        kind = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
        if kind not in DELIMITERS:
            allowed = f".parquet, .csv and .tsv, text also with {', '.join(COMPRESSIONS)}"
            raise TableError(f"{path}: ending {path.suffix!r} is unknown; allowed are {allowed}")
        return DELIMITERS[kind], kind == ".csv" if self.quotes is None else self.quotes


def read_header(path: Path, form: TextFormat) -> list[str]:
    """Return the names of the columns.

    Raises:
        TableError: an empty file, two columns of one name, or an unknown encoding.
    """
    delimiter, quotes = form.dialect(path)
    try:
        # Python's reader: pyarrow's would guess types from a megabyte of records only to know the header.
        with pa.input_stream(str(path)) as raw:
            # A part alone: a line without end, perhaps of a compressed file, would fill the memory.
            head = codecs.getincrementaldecoder(form.encoding)().decode(raw.read(CHUNK_BYTES))
        quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        rows = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        names = [name.removeprefix("\ufeff") for name in next(rows)]
    except StopIteration:
        raise TableError(f"{path} is empty; a header line with column names is needed") from None
    except csv.Error as error:
        hint = "; is a quote left open? Then set text.quotes: false" if quotes else ""
        raise TableError(f"{path}: its first line cannot be read ({error}){hint}") from error
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise TableError(f"{path}: {_explain(str(error), [], quotes)}") from error
    if len(set(names)) < len(names):
        raise TableError(f"{path} has two columns of one name: {', '.join(names)}; rename one in its header")
    return names


def read_batches(
    path: Path, types: dict[str, pa.DataType] | None = None, form: TextFormat | None = None
) -> Iterator[pa.RecordBatch]:
    """Read a text file from top to bottom in constant memory.

    Args:
        path: the file; a first line with the columns' names is needed.
        types: the columns to read and what they hold; None: all, as text.
        form: how the file is written.

    Yields:
        Rows in the order of the file; at least one batch, empty if the file has no records.

    Raises:
        TableError: a damaged file, a record of another number of fields than the header, a value not of its type.
    """
    form, ragged, empty = form or TextFormat(), [], True
    delimiter, quotes = form.dialect(path)
    types = dict.fromkeys(read_header(path, form), pa.string()) if types is None else types

    def note(row: arrow_csv.InvalidRow) -> str:
        ragged.append(f"record {row.number - 1} has {row.actual_columns} fields, the header {row.expected_columns}")
        return "error"

    try:
        with pa.input_stream(str(path)) as file:
            for batch in arrow_csv.open_csv(
                file,
                # One thread: rows keep their order, errors their row numbers, loader processes their share of cores.
                arrow_csv.ReadOptions(use_threads=False, block_size=CHUNK_BYTES, encoding=form.encoding),
                arrow_csv.ParseOptions(
                    delimiter=delimiter,
                    quote_char='"' if quotes else False,
                    newlines_in_values=quotes,
                    invalid_row_handler=note,
                ),
                arrow_csv.ConvertOptions(
                    column_types=types,
                    include_columns=list(types),
                    null_values=form.missing,
                    strings_can_be_null=True,
                ),
            ):
                empty = False
                yield batch
    except (pa.ArrowException, OSError, UnicodeError) as error:
        # A header alone, without a line end, is "empty" to pyarrow.
        if "Empty CSV file" not in str(error):
            raise TableError(f"{path}: {_explain(str(error), ragged, quotes)}") from error
    if empty:
        yield pa.RecordBatch.from_pylist([], pa.schema(types))


def refuse_open_quote(path: Path, form: TextFormat) -> None:
    """Refuse a file whose last field is in quotes that never end: pyarrow takes all rows below as a part of it.

    Raises:
        TableError: it does.
    """
    delimiter, quotes = form.dialect(path)
    if not quotes or form.encoding.lower().startswith(("utf-16", "utf-32", "utf16", "utf32", "u16", "u32")):
        return
    with pa.input_stream(str(path)) as file:
        odd = sum(chunk.count(b'"') for chunk in iter(lambda: file.read(CHUNK_BYTES), b"")) % 2
    if odd:  # by a letter inside of a field, such as inches, too
        with pa.input_stream(str(path)) as file:
            if ends_in_quotes(file, delimiter.encode()):
                raise TableError(f"{path}: a quote is left open to the end; close it, or set text.quotes: false")


def ends_in_quotes(file: Any, delimiter: bytes) -> bool:
    """Whether a text of fields, given as a binary stream, ends inside of a field in quotes."""
    opening = re.compile(rb"[\r\n" + re.escape(delimiter) + rb']"')
    inside, before = False, b"\n"
    while chunk := file.read(CHUNK_BYTES):
        while chunk.endswith(b'"') and (more := file.read(1)):
            chunk += more
        data, at = before + chunk, 1
        while at < len(data):
            if inside:
                at = data.find(b'"', at)
                if at < 0:
                    break
                doubled = data[at + 1 : at + 2] == b'"'
                inside, at = doubled, at + (2 if doubled else 1)
            else:
                found = opening.search(data, at - 1)
                if found is None:
                    break
                inside, at = True, found.end()
        before = data[-1:]
    return inside


def _explain(error: str, ragged: list[str], quotes: bool) -> str:
    if "straddles" in error:
        return f"a record is longer than {CHUNK_BYTES:,} bytes; is a quote left open? Then set text.quotes: false"
    if ragged:
        hint = "if quotes are only letters, set" if quotes else "if quotes enclose fields, set"
        return f"{ragged[0]}; {hint} text.quotes: {str(not quotes).lower()}"
    return f"{error}; set text.encoding, for example to latin-1" if "UTF8" in error or "codec" in error else error


def typed_batches(
    path: Path, numbers: Collection[str], others: Collection[str], form: TextFormat, strict: bool
) -> Iterator[pa.RecordBatch]:
    """Read some columns as numbers, and others as integers where they hold nothing else; not strict: all as text.

    Raises:
        TableError: as `read_batches`; or strict, and only later rows show that a column is not of its type.
    """
    whole: list[str] | None = None if strict else []
    types = dict.fromkeys(numbers, pa.float64() if strict else pa.string()) | dict.fromkeys(others, pa.string())
    for batch in read_batches(path, types, form):
        if whole is None:
            whole = [name for name in others if spelled_integers(batch.column(name)) is not None]
        for name in whole:
            integers = spelled_integers(batch.column(name))
            if integers is None:
                raise TableError(f"{path}: column {name!r} holds integers first and other values later")
            batch = batch.set_column(batch.schema.get_field_index(name), name, integers)
        yield batch
