# SPDX-License-Identifier: Apache-2.0
"""Series of one environment as a CSV file: which columns are times, trajectories and channels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks.dynamics.data.readers.cells import MISSING, NUMBER, Cells, is_value, numbers, read_cells, seconds
from tasks.dynamics.data.readers.ts_format import SeriesFormatError, check_room
from tasks.dynamics.data.source import Floats

TRAJECTORY = "trajectory"
TIMES = ("time", "t", "timestamp", "date", "datetime", "date_time", "datetime_utc", "datetime_gmt")
"""Names of a time column, in small letters; a unit may follow, as in ``time (ms)``."""
INDEX = ("", "unnamed: 0", "index")
"""Names of a column that counts rows, or holds times, where a program wrote its index without a name."""
UNITS = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0}
_TRAJECTORY_BYTES = 500
"""Most memory of a trajectory beside its numbers."""
_EVEN = 1e-2
"""Largest relative difference of a time step from the median one."""


@dataclass(frozen=True)
class CsvFile:
    """One file.

    Attributes:
        series: one [T, D] array per trajectory, nan where a cell is empty.
        channels: names of the columns.
        dt: seconds between samples.
        time: name of the time column, or None.
    """

    series: list[Floats]
    channels: tuple[str, ...]
    dt: float
    time: str | None = None


def read_csv(path: Path, dt: float = 1.0) -> CsvFile:
    """Read the trajectories of one environment.

    Args:
        path: file with a line of column names (see `read_cells`). A time column (see `TIMES`) and ``trajectory`` are
            special in any spelling, a column that counts the rows (see `INDEX`) is left out, the others are channels.
        dt: seconds between samples where there is no time column.

    Raises:
        SeriesFormatError: no names, no channel, no row, a row of another length, a cell that is no number, times that
            are missing, do not rise or are not evenly spaced. The text names the line.
    """
    cells = read_cells(path)
    _check_names(cells)
    groups = [i for i, name in enumerate(cells.names) if name.lower() == TRAJECTORY]
    counting = [i for i, name in enumerate(cells.names) if name.lower() in INDEX and _counts_rows(cells, i)]
    clocks = [
        i for i, name in enumerate(cells.names) if _unit(name) or (name.lower() in INDEX[:2] and i not in counting)
    ]
    if len(clocks) > 1:  # beside a time, t_min is a least temperature, not a time in minutes
        clocks = [i for i in clocks if not re.fullmatch(r"t[_ ]min", cells.names[i].lower())]
    if len(clocks) > 1:
        shown = " and ".join(repr(cells.names[i]) for i in clocks)
        raise SeriesFormatError(
            f"{cells.file}, line {cells.first}: {shown} are both times; keep one, with date and time of day in one cell"
        )
    places = [i for i in range(len(cells.names)) if i not in (*groups, *counting, *clocks)]
    if not places:
        raise SeriesFormatError(f"{cells.file}: columns {list(cells.names)} hold no channel beside time and trajectory")
    values, rows = numbers(cells, places), _trajectories(path, cells, groups)
    if clocks:
        times = seconds(cells, clocks[0], _unit(cells.names[clocks[0]]) or 1.0)
        dt = _step(cells, times, rows, cells.names[clocks[0]])
    channels = tuple(cells.names[i] for i in places)
    return CsvFile([values[part] for part in rows], channels, dt, cells.names[clocks[0]] if clocks else None)


def _check_names(cells: Cells) -> None:
    """Raise SeriesFormatError unless the first line holds names."""
    names, where = cells.names, f"{cells.file}, line {cells.first}"
    # A table that was written with an index and without names of its own counts its columns.
    counted = names[0] == "" and names[1:] == tuple(str(i) for i in range(len(names) - 1)) and len(names) > 1
    known = any(name.lower() in (*INDEX, TRAJECTORY) or _unit(name) for name in names if name)
    values = [name for name in names if name and is_value(name)]
    if not counted and (all(is_value(name) for name in names) or (values and not known)):
        raise SeriesFormatError(
            f"{where}: {', '.join(names[:4])} holds numbers where names of columns belong; add names"
        )
    if "" in names[1:]:
        raise SeriesFormatError(f"{where}: column {names.index('', 1) + 1} has no name; give it one")
    if len(set(names)) < len(names):
        raise SeriesFormatError(f"{where}: two columns share a name in {list(names)}")
    if sum(name.lower() == TRAJECTORY for name in names) > 1:
        raise SeriesFormatError(f"{where}: two columns are called {TRAJECTORY}; keep one")


def _unit(name: str) -> float | None:
    """Seconds of one unit of a time column; None for the name of another column."""
    match = re.fullmatch(r"(.*?)\s*[\[(/]?\s*([a-z]+)\s*[\])]", name.lower()) or re.fullmatch(
        r"(.*)[_/ ]+([a-z]+)", name.lower()
    )
    if name.lower() in TIMES:
        return 1.0
    return UNITS.get(match[2]) if match and match[1] in TIMES else None


def _counts_rows(cells: Cells, place: int) -> bool:
    column = cells.columns[place]
    first = column[0].as_py()
    counted = pa.array(np.arange(len(column)) + (first == "1")).cast(pa.string())
    return first in ("0", "1") and bool(column.equals(counted))


def _trajectories(path: Path, cells: Cells, groups: list[int]) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Rows of each trajectory, in the order in which they begin; 1 and 1.0 are one."""
    if not groups:
        return [np.arange(len(cells.lines))]
    coded = cells.columns[groups[0]].dictionary_encode()  # in the order of first rows
    code, keys = coded.indices.to_numpy(), coded.dictionary.to_pylist()
    check_room(path, 100 * len(code), trajectories=(len(keys), _TRAJECTORY_BYTES))
    missing = np.flatnonzero(np.isin(code, [k for k, key in enumerate(keys) if key.lower() in MISSING]))
    if len(missing):
        raise SeriesFormatError(f"{cells.where(missing[0])}: {TRAJECTORY} is missing; fill it in")
    places: dict[str | Decimal, int] = {}
    merged = [places.setdefault(Decimal(key) if re.match(NUMBER, key) else key, len(places)) for key in keys]
    group = np.array(merged)[code]
    return np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])


def _step(cells: Cells, times: Floats, rows: list[np.ndarray[tuple[int], np.dtype[np.int64]]], name: str) -> float:
    steps = np.concatenate([np.diff(times[part]) for part in rows])
    if not len(steps):
        raise SeriesFormatError(f"{cells.file}: a trajectory needs at least two samples")
    later = np.concatenate([part[1:] for part in rows])
    step = float(np.median(steps))
    uneven = np.flatnonzero(~(np.abs(steps - step) <= _EVEN * abs(step))) if step > 0 else np.flatnonzero(steps <= 0)
    if len(uneven):
        raise SeriesFormatError(
            f"{cells.where(later[uneven[0]])}: column {name!r} is taken for the time and is not evenly spaced and "
            f"rising (steps {steps.min():.4g} to {steps.max():.4g}); resample the series and leave cells empty where "
            "samples are missing, or rename the column if it is a channel"
        )
    # Times are often rounded as they are written: the whole span knows the step better than any of its parts.
    return float(steps.mean())
