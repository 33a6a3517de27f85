# SPDX-License-Identifier: Apache-2.0
"""Series of one environment as a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.dynamics.data.readers.ts_format import SeriesFormatError
from tasks.dynamics.data.source import Floats

TIME, TRAJECTORY = "time", "trajectory"
_EVEN = 1e-2
"""Largest relative difference of a time step from the median one."""


@dataclass(frozen=True)
class CsvFile:
    """One file.

    Attributes:
        series: one [T, D] array per trajectory, nan where a cell is empty.
        channels: names of the columns.
        dt: seconds between samples.
    """

    series: list[Floats]
    channels: tuple[str, ...]
    dt: float


def read_csv(path: Path, dt: float = 1.0) -> CsvFile:
    """Read the trajectories of one environment.

    Args:
        path: file with a line of column names; ``time`` and ``trajectory`` are special, the others are channels.
        dt: seconds between samples where there is no ``time`` column.

    Raises:
        SeriesFormatError: no channel, no row, a row of another length, a cell that is no number, times that are
            missing, do not rise or are not evenly spaced. The text names the line.
    """
    with open(path, newline="", encoding="utf-8-sig") as handle:
        rows = [(number, row) for number, row in enumerate(csv.reader(handle), 1) if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise SeriesFormatError(f"{path.name}: needs a line of column names and at least one row")
    names = [cell.strip() for cell in rows[0][1]]
    if len(set(names)) < len(names):
        raise SeriesFormatError(f"{path.name}: two columns share a name in {names}")
    channels = tuple(name for name in names if name not in (TIME, TRAJECTORY))
    if not channels:
        raise SeriesFormatError(f"{path.name}: columns {names} hold no channel beside time and trajectory")
    groups: dict[str, list[list[float]]] = {}
    times: dict[str, list[float]] = {}
    for number, row in rows[1:]:
        where = f"{path.name}, line {number}"
        if len(row) != len(names):
            raise SeriesFormatError(f"{where}: {len(row)} cells, but {len(names)} columns are named")
        cells = dict(zip(names, row, strict=True))
        key = cells.get(TRAJECTORY, "").strip()
        groups.setdefault(key, []).append([_number(cells[name], where) for name in channels])
        if TIME in cells:
            times.setdefault(key, []).append(_number(cells[TIME], where))
    if times:
        dt = _step(list(times.values()), path.name)
    return CsvFile([np.array(group) for group in groups.values()], channels, dt)


def _number(cell: str, where: str) -> float:
    text = cell.strip()
    try:
        value = float(text) if text else float("nan")
    except ValueError as error:
        raise SeriesFormatError(f"{where}: {text!r} is not a number; leave missing cells empty") from error
    if np.isinf(value):
        raise SeriesFormatError(f"{where}: infinite value; leave the cell empty where it is missing")
    return value


def _step(times: Sequence[Sequence[float]], name: str) -> float:
    steps = np.concatenate([np.diff(values) for values in times])
    step = float(np.median(steps)) if len(steps) else float("nan")
    if not step > 0 or not (np.abs(steps - step) <= _EVEN * step).all():
        raise SeriesFormatError(
            f"{name}: the time column is not evenly spaced and rising (steps {steps.min():.4g} to {steps.max():.4g}); "
            "resample the series, and leave cells empty where samples are missing"
            if len(steps)
            else f"{name}: a trajectory needs at least two samples"
        )
    return step
