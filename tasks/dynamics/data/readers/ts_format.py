# SPDX-License-Identifier: Apache-2.0
"""The .ts text format of the UCR and UEA archives of time series.

``@key value`` lines, ``@data``, then one series per line: channels divided by ``:``, values by ``,``, last the label of
a class, or the number to predict where ``@targetlabel true`` says so. ``?`` and ``nan`` are missing values; lines that
begin with ``#`` or ``%`` are comments.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeapps.bounds import BoundError, check_parts, require_file
from moeapps.files import place_of
from tasks.dynamics.data.source import Floats

_LINE = re.compile(r"(?!\Z)([^\r\n]*)(?:\r\n|\r|\n|\Z)")
_SERIES_BYTES, _PARSED_BYTES = 350, 100
"""Most memory of a series and its label beside its values, and of a value while its line is read."""


class SeriesFormatError(ValueError):
    """A file of series is damaged or of a form that is not read."""


@dataclass(frozen=True)
class LabelledSeries:
    """Series of one file.

    Attributes:
        series: one [T, D] array per series, nan where missing; T may differ.
        labels: class of each series, or None.
        targets: number to predict of each series, or None.
    """

    series: list[Floats]
    labels: list[str] | None
    targets: list[float] | None = None


def text_of(path: Path) -> str:
    """Return the text of a file: UTF-8, UTF-16 told by its mark, and Latin-1 if it is neither.

    Raises:
        SeriesFormatError: it cannot be read.
    """
    try:
        require_file(path)
        data = path.read_bytes()
    except BoundError as error:
        raise SeriesFormatError(str(error)) from error
    except OSError as error:
        raise SeriesFormatError(f"{path} cannot be read ({error.strerror}); correct the path or the link") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def lines_of(text: str, end: int | None = None) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line before ``end``; never all of them at once."""
    return enumerate((found[1] for found in _LINE.finditer(text, 0, len(text) if end is None else end)), 1)


def count_lines(text: str) -> int:
    """Count lines without taking them apart."""
    return text.count("\n") + text.count("\r") - text.count("\r\n") + 1


def check_room(path: Path, held: int, **parts: tuple[int, int]) -> None:
    """Refuse a file of so many short lines that what is read of it would fill memory; see `check_parts`.

    Raises:
        SeriesFormatError: it would.
    """
    try:
        check_parts(place_of(path), path.stat().st_size, held, parts)
    except BoundError as error:
        raise SeriesFormatError(str(error)) from error


def read_ts(path: Path) -> LabelledSeries:
    """Read a .ts file.

    Raises:
        SeriesFormatError: no data, time stamps, a label that was not announced, channels of different lengths or
            numbers, infinite values, or something that is no number. The text names the line.
    """
    header: dict[str, list[str]] = {}
    series: list[Floats] = []
    last: list[str] = []
    whole = text_of(path)
    _check_lines(path, whole)
    in_data = regression = False
    for number, line in lines_of(whole):
        text = line.strip()
        if not text or text[0] in "#%":
            continue
        if in_data:
            values, label = _series(text, f"{place_of(path)}, line {number}", _classes(header), regression)
            series.append(values)
            last += [] if label is None else [label]
        elif text.lower() == "@data":
            in_data, regression = True, _says(header, "targetlabel")
            if regression and _says(header, "classlabel"):
                raise SeriesFormatError(f"{place_of(path)} announces a class and a target; a line ends in one of them")
            if _says(header, "timestamps"):
                raise SeriesFormatError(f"{place_of(path)} has time stamps, which are not read; resample it to a grid")
        else:
            key, *words = text.split()
            header[key.lstrip("@").lower()] = words
    if not series:
        raise SeriesFormatError(f"{place_of(path)} holds no series; is it a .ts file with an @data line?")
    widths = {values.shape[1] for values in series}
    if len(widths) > 1:
        raise SeriesFormatError(
            f"{place_of(path)}: series have {sorted(widths)} channels; all must have the same number"
        )
    if regression:
        return LabelledSeries(series, None, [float(number) for number in last])
    return LabelledSeries(series, last if last else None)


def _check_lines(path: Path, text: str) -> None:
    lines = count_lines(text)
    longest = max((line.count(",") for _, line in lines_of(text)), default=0) + 1
    parts = {"lines": (lines, _SERIES_BYTES), "values": (text.count(",") + lines, 8)}
    check_room(path, sys.getsizeof(text), **parts, **{"values in one line": (longest, _PARSED_BYTES)})


def _says(header: dict[str, list[str]], key: str) -> bool:
    return "".join(header.get(key, [])[:1]).lower() == "true"


def _classes(header: dict[str, list[str]]) -> list[str] | None:
    return header["classlabel"][1:] if _says(header, "classlabel") else None


def _series(text: str, where: str, classes: list[str] | None, regression: bool) -> tuple[Floats, str | None]:
    channels = text.split(":")
    label = channels.pop().strip() if classes is not None or regression else None
    if classes is not None and label not in classes:
        raise SeriesFormatError(f"{where}: label {label!r} is none of {', '.join(classes)}")
    try:
        rows = [[float("nan") if v.strip() == "?" else float(v) for v in channel.split(",")] for channel in channels]
        target = float(label) if regression and label is not None else 0.0
        if any("_" in channel for channel in channels):  # Python takes 1_0 for ten
            raise ValueError(f"{next(c for c in channels if '_' in c)!r} is no number")
    except ValueError as error:
        raise SeriesFormatError(f"{where}: {error}") from error
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise SeriesFormatError(f"{where}: channels have {sorted(lengths)} values; all must have the same number")
    values = np.array(rows).T
    if np.isinf(values).any() or not np.isfinite(target):
        raise SeriesFormatError(
            f"{where}: an infinite value, or a target that is no number; write ? for a missing value"
        )
    return values, label
