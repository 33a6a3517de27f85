# SPDX-License-Identifier: Apache-2.0
"""Voxels and the six input channels that all domains share.

Channels: offset inside the voxel / voxel size (3, in [-0.5, 0.5]); height above the 2 per cent quantile of the crop
/ 3 m (1, in [-1, 6]); light (luminance or intensity) between the 5 and 95 per cent quantiles of its own scan (1, in
[0, 1]); |z| of the surface normal from a PCA over the 27 cells around the voxel (1, in [0, 1]). No channel says
which sensor was used: same layout, same range, no unit of the sensor's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tasks.point_cloud.data.limits import MAX_CELLS
from tasks.point_cloud.data.scene import Floats, Ints

Features = Literal["common", "paper"]

IN_DIM = 6
_HEIGHT_SCALE = 3.0
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Voxels:
    """Occupied cells of R points.

    Attributes:
        grid: [N, 3] int64 cell coordinates, minimum 0, in lexicographic order (x, then y, then z).
        inverse: [R] int64 cell of every point.
        pick: [N] int64 one point of every cell.
    """

    grid: Ints
    inverse: Ints
    pick: Ints


def cell_keys(pos: npt.NDArray[np.floating], size: float) -> tuple[Ints, tuple[int, int]]:
    """Return one int64 key per point and the strides (of x, of y) between neighbouring cells.

    Raises:
        ValueError: the cloud is wider than the curves can number.
    """
    low, high = (np.floor(np.asarray(edge, np.float64) / size) for edge in (pos.min(0), pos.max(0)))
    top = (high - low).astype(np.int64) + 3  # one empty cell on each side, so that neighbour keys never wrap
    if top.max() - 2 > MAX_CELLS:
        raise ValueError(
            f"the cloud is {top.max() - 2} voxels of {size} m wide, at most {MAX_CELLS} are allowed; "
            "use a larger voxel, or remove far-away stray points"
        )
    stride_y, stride_x = int(top[2]), int(top[2] * top[1])
    keys = np.zeros(len(pos), np.int64)
    for axis, stride in enumerate((stride_x, stride_y, 1)):  # one axis at a time: scans are large
        cell = np.floor(np.asarray(pos[:, axis], np.float64) / size)
        cell -= low[axis] - 1
        keys += cell.astype(np.int64) * stride
    return keys, (stride_x, stride_y)


def count_cells(pos: npt.NDArray[np.floating], size: float) -> int:
    """Return how many cells of ``size`` metres R points occupy."""
    keys = cell_keys(pos, size)[0]
    keys.sort()  # numpy.unique would hash them, which is slower
    return int(np.count_nonzero(np.diff(keys, prepend=-1)))


def voxelise(pos: npt.NDArray[np.floating], size: float, rng: np.random.Generator | None = None) -> Voxels:
    """Group points into cubes of ``size`` metres and pick one point of each.

    Args:
        pos: [R, 3] metres, R >= 1.
        size: edge of a voxel, metres.
        rng: draws the picked point; None picks the first in file order.

    Raises:
        ValueError: the cloud is wider than the curves can number.
    """
    keys, (stride_x, stride_y) = cell_keys(pos, size)
    order = rng.permutation(len(keys)) if rng is not None else np.arange(len(keys))
    order = order[np.argsort(keys[order], kind="stable")]  # cell after cell, within one as drawn
    keys = keys[order]
    first = np.diff(keys, prepend=-1) != 0
    cells, pick = keys[first], order[first]
    inverse = keys  # not needed any more
    inverse[order] = np.cumsum(first) - 1
    del order, first
    grid = np.empty((len(cells), 3), np.int64)
    grid[:, 0], rest = np.divmod(cells, stride_x)
    grid[:, 1], grid[:, 2] = np.divmod(rest, stride_y)
    grid -= grid.min(0)
    return Voxels(grid, inverse, pick)


def normal_z(pos: npt.NDArray[np.floating], size: float) -> Floats:
    """Return [R] |z| of the normals of R points, equal within a voxel.

    The normal is the eigenvector of the smallest eigenvalue of the covariance of all points in the 27 cells around
    the voxel. Fewer than three points have none: 0. A turn about the z axis leaves the value unchanged up to the
    rounding of points into cells, so it is computed once per scan and kept.
    """
    keys, strides = cell_keys(pos, size)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    cells, starts = keys[first], np.append(first, len(pos))
    mean, up = np.asarray(pos, np.float64).mean(0), np.empty(len(cells), np.float32)
    reach = sum(strides) + 1
    # Blocks of cells keep the sums of their own and of the cells around in a processor's cache, and the memory small.
    for begin in range(0, len(cells), _BLOCK):
        end = min(begin + _BLOCK, len(cells))
        low = int(np.searchsorted(cells, cells[begin] - reach))
        high = int(np.searchsorted(cells, cells[end - 1] + reach, side="right"))
        around = np.asarray(pos[order[starts[low] : starts[high]]], np.float64) - mean
        inverse = np.repeat(np.arange(high - low), np.diff(starts[low : high + 1]))
        up[begin:end] = _block_normals(cells[low:high], around, inverse, slice(begin - low, end - low), strides)
    spread = np.empty(len(pos), np.float32)
    spread[order] = np.repeat(up, np.diff(starts))
    return spread


_BLOCK = 2**13
_PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


def _block_normals(
    cells: Ints, p: npt.NDArray[np.float64], inverse: Ints, block: slice, strides: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """Return |z| of the normals of the cells in ``block``, of ``cells`` in ascending order and the points in them."""
    columns = [np.ones(len(p)), *p.T, *(p[:, i] * p[:, j] for i, j in _PAIRS)]
    sums = np.stack([np.bincount(inverse, weights=c, minlength=len(cells)) for c in columns], axis=1)
    known = np.append(cells, -1)  # the last: no such cell
    total = np.zeros((block.stop - block.start, 10))
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            wanted = cells[block] + dx * strides[0] + dy * strides[1] - 1
            at = np.searchsorted(cells, wanted)
            for dz in range(3):  # neighbours in z follow one another in the list
                there = known[at] == wanted + dz
                rows = np.flatnonzero(there)
                total[rows] += sums[at[rows]]
                at += there
    count = total[:, 0]
    mean = total[:, 1:4] / count[:, None]
    covariance = np.empty((len(total), 3, 3))
    for index, (i, j) in enumerate(_PAIRS):
        covariance[:, i, j] = covariance[:, j, i] = total[:, 4 + index] / count - mean[:, i] * mean[:, j]
    _, vectors = np.linalg.eigh(covariance)
    return np.where(count >= 3, np.minimum(np.abs(vectors[:, 2, 0]), 1.0), 0.0)


def luminance(color: npt.NDArray[np.integer], top: int) -> Floats:
    """Return [R] luminance in [0, 1] of [R, 3] colours in 0..top."""
    return np.asarray(color @ np.array(_LUMINANCE) / top, np.float32)


def normalise_light(light: npt.NDArray[np.floating]) -> Floats:
    """Map luminance or intensity of one scan to [0, 1] by its 5 and 95 per cent quantiles; constant gives 0.5."""
    if len(light) == 0:
        return np.zeros(0, np.float32)
    low, high = np.quantile(light, (0.05, 0.95))
    if high - low < 1e-9:
        return np.full(len(light), 0.5, np.float32)
    return np.asarray(np.clip((light - low) / (high - low), 0, 1), np.float32)


def common_features(
    pos: npt.NDArray[np.floating], size: float, light: npt.NDArray[np.floating], up: npt.NDArray[np.floating]
) -> Floats:
    """Return the [N, 6] common layout for N points, one per voxel.

    Args:
        pos: [N, 3] metres.
        size: voxel edge, metres.
        light: [N] from :func:`normalise_light`.
        up: [N] from :func:`normal_z`.
    """
    offset = pos / size - np.floor(pos / size) - 0.5
    height = np.clip((pos[:, 2] - np.quantile(pos[:, 2], 0.02)) / _HEIGHT_SCALE, -1, 6)
    return np.concatenate([offset, height[:, None], light[:, None], up[:, None]], axis=1).astype(np.float32)


def paper_features(
    pos: npt.NDArray[np.floating], light: npt.NDArray[np.floating], up: npt.NDArray[np.floating], *, indoor: bool
) -> Floats:
    """Return six channels as the paper feeds them: they mean one thing indoors and another outdoors.

    Indoors colour (here grey, three times) and normal (here (0, 0, |z|)); outdoors xyz in metres and intensity three
    times. Kept to show what a domain cue in the input does.
    Source: Point-MoE release, configs/point_moe (UVA-Computer-Vision-Lab/point_moe).
    """
    grey = np.repeat(light[:, None], 3, axis=1)
    zero = np.zeros(len(pos))
    first = grey if indoor else pos - pos.mean(0)
    second = np.stack([zero, zero, up], axis=1) if indoor else grey
    return np.concatenate([first, second], axis=1).astype(np.float32)


def network_input(
    pos: npt.NDArray[np.floating],
    size: float,
    light: npt.NDArray[np.floating],
    up: npt.NDArray[np.floating],
    *,
    features: Features,
    indoor: bool,
) -> tuple[Ints, Floats]:
    """Return voxel coordinates [N, 3], minimum 0, and features [N, 6] of N points, one per voxel.

    Args:
        pos: [N, 3] metres.
        size: voxel edge, metres.
        light: [N] from :func:`normalise_light`.
        up: [N] from :func:`normal_z`.
        features: ``common`` or ``paper``.
        indoor: which of the paper's two layouts applies.
    """
    x = paper_features(pos, light, up, indoor=indoor) if features == "paper" else common_features(pos, size, light, up)
    grid = np.floor(pos.astype(np.float64) / size).astype(np.int64)
    return grid - grid.min(0), x
