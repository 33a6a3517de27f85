# SPDX-License-Identifier: Apache-2.0
"""The cells of a table of text, by pyarrow, and what they say: numbers, missing values, times. Errors name the line."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from moeapps.files import place_of
from tasks.dynamics.data.readers.ts_format import SeriesFormatError, check_room, count_lines, lines_of, text_of
from tasks.dynamics.data.source import Floats

MISSING = ("", "nan", "na", "n/a", "#n/a", "null", "none", "?")
"""What stands for a missing value, in small letters."""
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
"""What a number looks like."""
_WITH_COMMA = r"^[+-]?\d*,\d+([eE][+-]?\d+)?$"
_DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,9})?)?)?(Z|[+-][0-9]{2}(:?[0-9]{2})?)?$"
_ZONE = r"[0-9]{2}:[0-9]{2}[^+-]*(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"
_SEPARATORS = (";", "\t", ",")
_BLOCK = 50_000
"""Lines that are Python's at one time: as such they take fifty times their bytes."""
_ROW_BYTES, _CELL_BYTES = 40, 60
"""Most memory of a row and of a cell beyond their text."""


@dataclass(frozen=True)
class Cells:
    """The cells of a file below the line of names.

    Attributes:
        file: name of the file, for messages.
        names: one per column, as written but for blanks around them.
        columns: a pyarrow array of strings per column, blanks around them taken away.
        lines: number of the line of each row, the first line of the file being 1, int64 [R].
        first: number of the line of names.
    """

    file: str
    names: tuple[str, ...]
    columns: tuple[Any, ...]
    lines: npt.NDArray[np.int64]
    first: int

    def where(self, row: int) -> str:
        """Name the file and the line of a row."""
        return f"{self.file}, line {self.lines[row]}"


def read_cells(path: Path) -> Cells:
    """Read a table whose columns are divided by commas, semicolons or tabs.

    UTF-8 and UTF-16 (told by its mark) are known; what is neither is read as Latin-1. Blank lines are passed over, but
    in a table of one column they are missing values. Rows of separators alone at the end, which spreadsheets leave,
    are no rows; a last column without name and content neither.

    Raises:
        SeriesFormatError: nothing there, a row of another length, a quote without end.
    """
    text = text_of(path)
    kept = len(text.rstrip("\"' \t,;\r\n"))
    end = min((place for mark in "\r\n" if (place := text.find(mark, kept)) >= 0), default=len(text)) if kept else 0
    numbered = lines_of(text, end)
    first, head = next(
        ((n, line) for n, line in numbered if line.strip() and not line.lower().startswith("sep=")), (0, "")
    )
    separator = next((mark for mark in _SEPARATORS if mark in re.sub('"[^"]*"', "", head)), ",")
    if next(numbered, None) is None:
        raise SeriesFormatError(f"{place_of(path)}: needs a line of column names and at least one row")
    lines = count_lines(text)
    cells = (lines + text.count(separator), _CELL_BYTES)
    check_room(path, sys.getsizeof(text), lines=(lines, _ROW_BYTES), cells=cells)
    for number, line in lines_of(text, end) if '"' in text else ():
        if number >= first and line.count('"') % 2:
            raise SeriesFormatError(
                f"{place_of(path)}, line {number}: a quote is opened and not closed; close or remove it"
            )
    head_cells = _columns(place_of(path), [(first, head)], separator, 0)
    names = [cell[0].as_py().lstrip("#").strip() for cell in head_cells]
    # A line of tabs alone is a row of missing values where tabs divide the columns.
    rows = (
        (n, line)
        for n, line in lines_of(text, end)
        if n > first and (line.strip() or separator in line or len(names) == 1)
    )
    blocks: list[list[Any]] = []
    places: list[npt.NDArray[np.int64]] = []
    while block := list(islice(rows, _BLOCK)):
        blocks.append(_columns(place_of(path), block, separator, len(names)))
        places.append(np.array([n for n, _ in block]))
    if not blocks:
        raise SeriesFormatError(f"{place_of(path)}: needs at least one row below its column names")
    columns = [pa.concat_arrays(parts) for parts in zip(*blocks, strict=True)]
    if len(names) > 1 and not names[-1] and pc.all(pc.equal(columns[-1], "")).as_py():
        names, columns = names[:-1], columns[:-1]
    return Cells(place_of(path), tuple(names), tuple(columns), np.concatenate(places), first)


def _columns(file: str, rows: list[tuple[int, str]], separator: str, count: int) -> list[Any]:
    """Split lines into columns of trimmed strings; ``count`` columns are expected, 0 for any number."""
    wrong: list[Any] = []

    def keep(row: Any) -> str:
        wrong.append(row)
        return "skip"

    # The names make pyarrow leave every cell as it is; a guess of types would depend on the rows it looks at.
    names = [f"f{i}" for i in range(count or len(rows[0][1]) + 1)]
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO("".join(f"{line}\n" for _, line in rows).encode()),
            read_options=pyarrow.csv.ReadOptions(use_threads=False, autogenerate_column_names=True),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=separator, ignore_empty_lines=False, invalid_row_handler=keep
            ),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except pa.ArrowInvalid as error:
        raise SeriesFormatError(f"{file}: {error}; write the table again") from error
    found = table.num_columns
    if count and (wrong or found != count):
        number, cells = (
            (rows[wrong[0].number - 1][0], wrong[0].actual_columns) if found == count else (rows[0][0], found)
        )
        hint = "; decimal commas need ; between the columns" if separator == "," and cells == 2 * count else ""
        raise SeriesFormatError(f"{file}, line {number}: {cells} cells, but {count} columns are named{hint}")
    return [pc.utf8_trim_whitespace(column.combine_chunks()) for column in table.columns]


def is_value(cell: str) -> bool:
    """Tell whether a cell holds a number, a missing value or a date, so that it can hardly be a name."""
    lower = cell.lower()
    return bool(lower in MISSING or any(re.match(form, cell) for form in (NUMBER, _WITH_COMMA, _DATE)))


def numbers(cells: Cells, places: list[int]) -> Floats:
    """Return columns as float64 [R, len(places)], nan where missing.

    Decimal commas are read where the columns are divided by something else and no cell has a decimal point.

    Raises:
        SeriesFormatError: a cell that is no number, or infinite; points and commas in one file.
    """
    columns = [cells.columns[place] for place in places]
    commas = [np.asarray(pc.match_substring_regex(column, _WITH_COMMA)) for column in columns]
    comma = any(found.any() for found in commas)
    if comma:
        points = [np.asarray(pc.match_substring(column, ".")) for column in columns]
        both = [np.flatnonzero(found) for found in points if found.any()]
        if both:
            raise SeriesFormatError(
                f"{cells.where(min(rows[0] for rows in both))}: a decimal point, but other cells of the file have "
                "decimal commas; write all numbers alike, without marks between thousands"
            )
    return np.stack([_numbers(cells, column, comma) for column in columns], axis=1)


def _numbers(cells: Cells, column: Any, comma: bool) -> Floats:
    missing = pc.is_in(pc.utf8_lower(column), value_set=pa.array(MISSING))
    plain = pc.replace_substring(column, ",", ".") if comma else column
    good = pc.or_(missing, pc.match_substring_regex(plain, NUMBER))
    wrong = np.flatnonzero(~np.asarray(good))
    if len(wrong):
        where, text = cells.where(wrong[0]), column[int(wrong[0])].as_py()
        if text.lower().strip("+-") in ("inf", "infinity"):
            raise SeriesFormatError(f"{where}: infinite value; leave the cell empty where it is missing")
        raise SeriesFormatError(f"{where}: {text!r} is not a number; leave missing cells empty")
    bare = pc.replace_substring_regex(pc.if_else(missing, pa.scalar(None, pa.string()), plain), r"^\+", "")
    values: Floats = pc.cast(bare, pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    if np.isinf(values).any():
        raise SeriesFormatError(
            f"{cells.where(int(np.isinf(values).argmax()))}: a number too large; leave the cell empty"
        )
    return values


def seconds(cells: Cells, place: int, unit: float) -> Floats:
    """Return a column of times as float64 [R] seconds: numbers times ``unit``, or ISO dates since the first of them.

    Raises:
        SeriesFormatError: a missing time, one that is neither, dates with and without a zone, or numbers so large that
            they can hardly be seconds.
    """
    column = cells.columns[place]
    empty = np.flatnonzero(np.asarray(pc.is_in(pc.utf8_lower(column), value_set=pa.array(MISSING))))
    if len(empty):
        raise SeriesFormatError(f"{cells.where(empty[0])}: no time, so that rows are not evenly spaced; fill it in")
    text = pc.replace_substring_regex(column, r" ?(UTC|GMT|Z)$", "Z")
    dated = np.asarray(pc.match_substring_regex(text, _DATE))
    if not dated.any():
        wrong = np.flatnonzero(~np.asarray(pc.match_substring_regex(column, f"{NUMBER}|{_WITH_COMMA}")))
        if len(wrong):
            shown = column[int(wrong[0])].as_py()
            raise SeriesFormatError(
                f"{cells.where(wrong[0])}: {shown!r} is neither seconds nor a date such as 2024-03-31T14:00:00+01:00"
            )
        values = numbers(cells, [place])[:, 0] * unit
        if np.abs(values).max() > 1e11:
            raise SeriesFormatError(
                f"{cells.where(int(np.abs(values).argmax()))}: a time of {np.abs(values).max():.4g} s is no time in "
                f"seconds; if it counts thousandths, name the column '{cells.names[place] or 'time'} (ms)'"
            )
        return values
    zoned = np.asarray(pc.match_substring_regex(text, _ZONE))
    odd = np.flatnonzero(~dated | (zoned != zoned[0]))
    if len(odd):
        shown = column[int(odd[0])].as_py()
        what = (
            "has another zone setting than the first row"
            if dated[odd[0]]
            else "is no date as 2024-03-31T14:00:00+01:00"
        )
        raise SeriesFormatError(f"{cells.where(odd[0])}: {shown!r} {what}; write all times in one form")
    kind = pa.timestamp("ns", "UTC") if zoned[0] else pa.timestamp("ns")
    try:
        ticks = pc.cast(text, kind).cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid as error:
        bad = next(row for row in range(len(text)) if not _is_date(text[row], kind))
        raise SeriesFormatError(f"{cells.where(bad)}: {column[bad].as_py()!r} is no date; correct it") from error
    since: Floats = (ticks - ticks[0]) / 1e9
    return since


def _is_date(cell: Any, kind: Any) -> bool:
    try:
        cell.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True
