# SPDX-License-Identifier: Apache-2.0
"""Random views of a scan for training and fixed tiles for testing. All random numbers come from the given generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.point_cloud.data.scene import Floats, Ints

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of one training scan. All lengths in metres, all angles in radians.

    Args:
        rotate_prob: probability of a turn about z by an angle in [-pi, pi].
        tilt: largest turn about x and about y (pi/64 in the paper).
        scale: half width of the scale range; 0.1 draws from [0.9, 1.1].
        flip_prob: probability of mirroring x, and separately y.
        jitter: sigma of the noise per coordinate, as a share of the voxel; cut at four sigma.
        dropout_prob: probability that points are dropped at all.
        dropout_ratio: share of points dropped then.
        light_jitter: half width of the random factor on luminance or intensity; 0.2 draws from [0.8, 1.2].
        elastic_prob: probability of a smooth random bend of the whole scan.
        elastic_strength: sigma of the bend's displacement.
        elastic_cell: distance of its control points.

    Raises:
        ValueError: a probability or share outside [0, 1], or a negative size.

    Source: the augmentation list of the released configurations (UVA-Computer-Vision-Lab/point_moe, configs/point_moe);
    the noise is ours in voxels, since one number in metres cannot suit both rooms and aerial scans.
    """

    rotate_prob: float = 1.0
    tilt: float = float(np.pi / 64)
    scale: float = 0.1
    flip_prob: float = 0.5
    jitter: float = 0.05
    dropout_prob: float = 0.2
    dropout_ratio: float = 0.2
    light_jitter: float = 0.2
    elastic_prob: float = 0.0
    elastic_strength: float = 0.1
    elastic_cell: float = 2.0

    def __post_init__(self) -> None:
        for name in ("rotate_prob", "flip_prob", "dropout_prob", "dropout_ratio", "elastic_prob"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is not in [0, 1]")
        for name in ("tilt", "scale", "jitter", "light_jitter", "elastic_strength"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; use 0 to switch it off")
        if self.scale >= 1 or self.elastic_cell <= 0:
            raise ValueError(f"scale={self.scale} must be below 1 and elastic_cell={self.elastic_cell} above 0")

    def keep(self, count: int, rng: np.random.Generator) -> Ints:
        """Return the indices that survive point dropout; at least one."""
        if rng.random() >= self.dropout_prob or count < 2:
            return np.arange(count)
        kept = max(1, round(count * (1 - self.dropout_ratio)))
        return np.sort(rng.permutation(count)[:kept])

    def move(self, pos: FloatArray, voxel: float, rng: np.random.Generator) -> Floats:
        """Return moved copies of [R, 3] points."""
        angles = rng.uniform(-1, 1, 3) * (np.pi, self.tilt, self.tilt)
        if rng.random() >= self.rotate_prob:
            angles[0] = 0.0
        flips = np.where(rng.random(2) < self.flip_prob, -1.0, 1.0)
        size = rng.uniform(1 - self.scale, 1 + self.scale)
        matrix = _turn(*angles) @ np.diag([flips[0], flips[1], 1.0]) * size
        moved = np.asarray(pos, np.float64) @ matrix.T
        if self.elastic_prob and rng.random() < self.elastic_prob:
            moved += _elastic(moved, self.elastic_cell, self.elastic_strength, rng)
        if self.jitter:
            moved += np.clip(rng.standard_normal(moved.shape), -4, 4) * (self.jitter * voxel)
        return np.asarray(moved, np.float32)

    def relight(self, light: FloatArray, rng: np.random.Generator) -> Floats:
        """Return normalised light times a random factor, cut to [0, 1]."""
        factor = rng.uniform(1 - self.light_jitter, 1 + self.light_jitter)
        return np.asarray(np.clip(light * factor, 0, 1), np.float32)


def _turn(z: float, x: float, y: float) -> npt.NDArray[np.float64]:
    cz, sz, cx, sx, cy, sy = np.cos(z), np.sin(z), np.cos(x), np.sin(x), np.cos(y), np.sin(y)
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return np.asarray(about_y @ about_x @ about_z)


def _elastic(
    pos: npt.NDArray[np.float64], cell: float, strength: float, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Trilinear interpolation of Gaussian displacements on a lattice of ``cell`` metres."""
    scaled = (pos - pos.min(0)) / cell
    low = np.floor(scaled).astype(np.int64)
    field = rng.standard_normal((*(low.max(0) + 2), 3)) * strength
    share = scaled - low
    total = np.zeros_like(pos)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, share, 1 - share), axis=1)
        at = low + corner
        total += weight[:, None] * field[at[:, 0], at[:, 1], at[:, 2]]
    return total


def crop_columns(pos: FloatArray, count: int, rng: np.random.Generator) -> Ints:
    """Return the ``count`` points nearest, seen from above, to a randomly drawn one (all points if there are fewer).

    Nearest in x and y: a crop keeps whole columns, so the ground stays below a roof or a crown.
    """
    if len(pos) <= count:
        return np.arange(len(pos))
    center = pos[rng.integers(len(pos)), :2]
    distance = ((pos[:, :2] - center) ** 2).sum(1)
    return np.sort(np.argpartition(distance, count - 1)[:count])


def tile_columns(pos: FloatArray, count: int) -> list[Ints]:
    """Cut N points into ceil(N / count) parts of nearly equal size by splitting the longer horizontal side.

    The parts are disjoint, cover all points, and depend on nothing but the points.
    """
    parts: list[Ints] = []
    sides = np.ascontiguousarray(pos[:, :2].T)
    stack = [(np.arange(len(pos)), max(1, -(-len(pos) // count)), (False, False))]
    while stack:
        part, number, used = stack.pop()
        if number == 1:
            parts.append(part)
            continue
        values = [side[part] for side in sides]
        axis = int(np.ptp(values[1]) > np.ptp(values[0]))
        # Points level at the cut go by the other side, if that was cut before, and then by their number.
        other = values[1 - axis] if used[1 - axis] else None
        first = number // 2
        low = _lowest(values[axis], len(part) * first // number, other)
        used = (used[0] or axis == 0, used[1] or axis == 1)
        stack.extend(((part[~low], number - first, used), (part[low], first, used)))
    return parts


def _lowest(values: FloatArray, count: int, other: FloatArray | None) -> npt.NDArray[np.bool_]:
    """Return which are the ``count`` smallest values; equal ones go by ``other`` (None: by nothing) and their place."""
    if not count:
        return np.zeros(len(values), bool)
    edge = np.partition(values, count - 1)[count - 1]
    low: npt.NDArray[np.bool_] = values < edge
    level = np.flatnonzero(values == edge)
    if other is not None:
        level = level[np.argsort(other[level], kind="stable")]
    low[level[: count - int(low.sum())]] = True
    return low
