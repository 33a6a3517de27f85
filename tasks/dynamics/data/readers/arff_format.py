# SPDX-License-Identifier: Apache-2.0
"""The ARFF format of the UCR and UEA archives, by scipy.

One row is one series: an attribute per sample, or one relational attribute with a row per channel; the last attribute
is the class (nominal), or the number to predict where it is called ``target``.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import arff

from moeapps.files import place_of
from tasks.dynamics.data.readers.ts_format import LabelledSeries, SeriesFormatError, check_room, count_lines, text_of
from tasks.dynamics.data.source import Floats

_ROW_BYTES, _VALUE_BYTES = 250, 60
"""Most memory of a row and of a value while scipy reads them."""


def read_arff(path: Path) -> LabelledSeries:
    """Read an .arff file.

    Raises:
        SeriesFormatError: no series, something that is no number, attributes of another kind, channels of different
            lengths. The text names the line where the file has one that cannot be read.
    """
    text = text_of(path)
    lines = count_lines(text)
    held = sys.getsizeof(text) + 4 * len(text)  # scipy reads a stream, which holds each sign in four bytes
    values = (text.count(",") + text.count("\\n") + lines, _VALUE_BYTES)
    check_room(path, held, lines=(lines, _ROW_BYTES), values=values)
    try:
        rows, about = _load(text)
    # scipy's reader answers damage with nearly any error.
    except Exception as error:
        raise SeriesFormatError(
            f"{place_of(path)}{_line(text)} cannot be read ({error}); correct or remove it"
        ) from error
    if not len(rows) or not about.names():
        raise SeriesFormatError(f"{place_of(path)} holds no series; is it an .arff file with an @data line?")
    names, kinds = about.names(), about.types()
    labelled = kinds[-1] == "nominal"
    regression = kinds[-1] == "numeric" and names[-1].lower() == "target"
    values = names[:-1] if labelled or regression else names
    if not values or {about[name][0] for name in values} not in ({"numeric"}, {"relational"}):
        raise SeriesFormatError(
            f"{place_of(path)} has attributes of the kinds {', '.join(sorted(set(kinds)))}; give numbers, or one "
            "relational attribute, and last a nominal class or a numeric target"
        )
    series = [_series(row, values, f"{place_of(path)}, series {place + 1}") for place, row in enumerate(rows)]
    if len({x.shape[1] for x in series}) > 1:
        raise SeriesFormatError(f"{place_of(path)}: series have different numbers of channels; all must have the same")
    last = [row[names[-1]] for row in rows]
    return LabelledSeries(
        series,
        [label.decode("utf-8", errors="replace") for label in last] if labelled else None,
        [float(target) for target in last] if regression else None,
    )


def _load(text: str) -> tuple[Any, Any]:
    bound = csv.field_size_limit()
    try:
        rows, about = arff.loadarff(io.StringIO(text))
    finally:
        csv.field_size_limit(bound)  # scipy lifts this bound on cells for the whole process
    return rows, about


def _series(row: Any, names: list[str], where: str) -> Floats:
    """One series [T, D] of a row."""
    first = row[names[0]]
    if isinstance(first, np.ndarray) and first.dtype.names:  # relational: a row per channel, a field per sample
        values = np.stack([first[field].astype(np.float64) for field in first.dtype.names])
    else:
        values = np.array([[row[name]] for name in names], dtype=np.float64)
    if np.isinf(values).any():
        raise SeriesFormatError(f"{where}: an infinite value; write ? where it is missing")
    return values


def _line(text: str) -> str:
    """Name the first line of data that cannot be read, if there is one."""
    lines = text.splitlines()
    start = next((place for place, line in enumerate(lines) if line.strip().lower().startswith("@data")), len(lines))
    head, first, end = lines[: start + 1], start + 1, len(lines)
    if not _fails(head, lines[first:end]):
        return ""
    while end - first > 1:  # halves: all lines are read about twice, not once each with the head before it
        middle = (first + end) // 2
        first, end = (first, middle) if _fails(head, lines[first:middle]) else (middle, end)
    return f", line {first + 1}" if first < end else ""


def _fails(head: list[str], lines: list[str]) -> bool:
    try:
        _load("\n".join([*head, *lines, ""]))
    except Exception:
        return True
    return False
