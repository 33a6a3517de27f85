# SPDX-License-Identifier: Apache-2.0
"""What a scan must be for everything after its reader to work, checked in one place when the scan is read.

A curve numbers `MAX_CELLS` voxels along each axis, and the voxeliser as many. A scan may be half as wide, since
training turns and stretches it (by sqrt(2) and up to 1.4). The reader alone, which knows no voxel, refuses what no
voxel up to 3 m could hold.
"""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tasks.point_cloud.nets.serialization import MAX_DEPTH

log = logging.getLogger("moeapps")

MAX_CELLS = 2**MAX_DEPTH
"""Voxels along one axis that the curve can number."""
MAX_SCAN_CELLS = MAX_CELLS // 2
"""Voxels along one axis of a scan as it is read."""
MAX_EXTENT = 3.0 * MAX_SCAN_CELLS
"""Largest side of a scan in metres (98 km); beyond it a coordinate is taken for damage, not for a measurement."""
FAR = 10_000.0
"""Coordinates beyond this many metres are stored relative to an origin: float32 keeps 1 mm only up to about 16 km."""

_STEPS_PER_VOXEL = 8  # coarser coordinates than this are seen in the channel of offsets inside the voxel
_CORE, _STRAY = 0.001, 10.0  # strays: the few points without which the scan would be this many times smaller
_STEEP = 500.0  # a tower is no 500 times as high as wide; a street in degrees is
_MANY_POINTS, _POINTS_PER_VOXEL = 1000, 100


class ScanError(ValueError):
    """A scan cannot be worked with as it is."""


def coarse_step(xyz: NDArray[np.floating]) -> float:
    """Return the step of coordinates that have too few digits for their size, in their own unit; 0 if they have not.

    An axis of float16 always counts; another one that went through float32 far from zero: if float32 can hold all its
    numbers, and neighbours among them are as close as float32 allows.
    """
    found = 0.0
    for axis in range(3 if len(xyz) else 0):
        column = xyz[:, axis]
        top = max(abs(float(column.min())), abs(float(column.max())))
        if column.dtype == np.float16:
            found = max(found, float(np.spacing(np.float16(top))))
            continue
        step = float(np.spacing(np.float32(top)))
        if top < 2**14 or step <= found or not np.array_equal(column[:1000], column[:1000].astype(np.float32)):
            continue
        if np.array_equal(column, column.astype(np.float32)):
            gaps = np.diff(np.sort(column))
            gaps = gaps[gaps > 0]
            found = step if len(gaps) and float(gaps.min()) <= step else found
    return found


def check_scan(pos: NDArray[np.floating], voxel: float, step: float, scan: str, domain: str, remedy: str) -> None:
    """Refuse a scan that voxels, curves or features cannot hold.

    Args:
        pos: [R, 3] metres.
        voxel: edge of a voxel, metres.
        step: of coordinates that lost digits before they were read, metres; 0 for none.
        scan: its name.
        domain: the domain's name.
        remedy: how the caller's user gives another unit.

    Raises:
        ScanError: too wide, in degrees, or with too few digits; it names scan, domain and what to do.
    """
    if not len(pos):
        return
    who = f"scan {scan} of domain {domain!r}"
    low, high = pos.min(0).astype(np.float64), pos.max(0).astype(np.float64)
    side, height = float((high - low)[:2].max()), float(high[2] - low[2])
    if float((high - low).max()) / voxel > MAX_SCAN_CELLS:
        raise ScanError(
            f"{who} is {float((high - low).max()):.6g} m wide, {float((high - low).max()) / voxel:,.0f} voxels of "
            f"{voxel:g} m; at most {MAX_SCAN_CELLS:,} fit. {_strays(pos)}If the unit is not metres, {remedy}; else "
            "remove strays, use a larger `voxel` or cut the file into parts"
        )
    if step > voxel / _STEPS_PER_VOXEL:
        raise ScanError(
            f"{who} has coordinates in steps of {step:g} m: they were kept as float32 far from zero, or as float16; "
            f"voxels of {voxel:g} m need {voxel / _STEPS_PER_VOXEL:g} m. Export the file again with double "
            "coordinates, or with an offset subtracted"
        )
    if len(pos) >= _MANY_POINTS and height > _STEEP * side > 0:
        raise ScanError(
            f"{who} is {side:.3g} wide and {height:.3g} high: x and y look like degrees, not metres. Project the file "
            "to metres, e.g. to UTM"
        )
    if side / voxel > MAX_SCAN_CELLS / 8 and (text := _strays(pos)):
        log.warning("%s is %.6g m wide. %sRemove them if they are noise", who, side, text)


@cache  # each scan once, however often it is read
def check_density(points: int, cells: int, voxel: float, scan: str, domain: str) -> None:
    """Warn where many points share few voxels: then the unit is wrong or the voxel too large."""
    if points >= _MANY_POINTS and points > _POINTS_PER_VOXEL * cells:
        log.warning(
            "scan %s of domain %r: its %d points fall into %d voxels of %g m; if its unit is not metres, set `unit` "
            "(degrees must be projected to metres); else a smaller `voxel` would show more",
            *(scan, domain, points, cells, voxel),
        )


def _strays(pos: NDArray[np.floating]) -> str:
    """Say which points lie far from all others, or nothing."""
    count = max(1, int(len(pos) * _CORE))
    if len(pos) <= 2 * count + 1:
        return ""
    ordered = np.partition(pos, (count, len(pos) - 1 - count), axis=0)
    low, high = ordered[count].astype(np.float64), ordered[-1 - count].astype(np.float64)
    reach = (high - low).max()
    outside = (pos < low - reach) | (pos > high + reach)
    rows = np.flatnonzero(outside.any(1))
    whole = float((pos.max(0) - pos.min(0)).max())
    if not len(rows) or whole < _STRAY * max(reach, 1e-9):
        return ""
    return f"{len(rows)} of its {len(pos)} points lie far from all others (the first in row {int(rows[0])}). "
