# SPDX-License-Identifier: Apache-2.0
"""Scenes made of labelled primitives: boxes, gabled roofs, upright cylinders, ellipsoids, and a ground plane.

All primitives are convex and share one table, so that a ray meets each of them in one interval [near, far].
Units are metres, z points up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.point_cloud.data.labels import WORLD_NAMES

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

BOX, GABLE, CYLINDER, ELLIPSOID = range(4)
NAME_ID = {name: index for index, name in enumerate(WORLD_NAMES)}


@dataclass(frozen=True)
class Scene:
    """A frozen table of P primitives over a ground plane z = 0.

    Attributes:
        kind: [P] one of BOX, GABLE, CYLINDER, ELLIPSOID.
        center: [3, P] centres.
        half: [3, P] half extents in the primitive's own frame (cylinder: radius, radius, half height).
        cos: [P] cosine of the yaw; ``sin`` likewise.
        name: [P] world name id of the sides.
        top: [P] world name id of faces that look up.
        albedo: [P] reflectance in [0, 1].
        density: [P] mean number of returns per metre of path; 0 means solid.
        instance: [P] id of the object the primitive belongs to.
        ground: world name id and albedo of the plane; None: no plane.
        zones: [Z, 7] rectangles that paint the plane: x, y, half x, half y, yaw, name id, albedo; later wins.
        extent: (x0, y0, x1, y1) of the interesting part; surface samplers stay inside.
        height: upper limit of the interesting part.
    """

    kind: npt.NDArray[np.uint8]
    center: Floats
    half: Floats
    cos: Floats
    sin: Floats
    name: Ints
    top: Ints
    albedo: Floats
    density: Floats
    instance: Ints
    ground: tuple[int, float] | None
    zones: Floats
    extent: tuple[float, float, float, float]
    height: float

    @property
    def num_primitives(self) -> int:
        """Number of primitives P."""
        return len(self.kind)

    def ground_paint(self, x: Floats, y: Floats) -> tuple[Ints, Floats]:
        """Return name ids and albedos of ground points at ``x``, ``y``."""
        assert self.ground is not None
        name = np.full(x.shape, self.ground[0], np.int64)
        albedo = np.full(x.shape, self.ground[1], np.float32)
        for cx, cy, hx, hy, yaw, zone, value in self.zones.tolist():
            u = (x - cx) * np.cos(yaw) + (y - cy) * np.sin(yaw)
            v = (y - cy) * np.cos(yaw) - (x - cx) * np.sin(yaw)
            inside = (np.abs(u) <= hx) & (np.abs(v) <= hy)
            name[inside] = int(zone)
            albedo[inside] = value
        return name, albedo

    def occupied(self, x: float, y: float, z: float, margin: float = 0.2) -> bool:
        """Tell whether a point lies inside or within ``margin`` metres of a primitive's box."""
        rx, ry, rz = x - self.center[0], y - self.center[1], z - self.center[2]
        u, v = rx * self.cos + ry * self.sin, ry * self.cos - rx * self.sin
        inside = (np.abs(u) < self.half[0] + margin) & (np.abs(v) < self.half[1] + margin)
        return bool((inside & (np.abs(rz) < self.half[2] + margin)).any())


@dataclass
class SceneBuilder:
    """Collect primitives, then :meth:`build` a scene.

    Args:
        ground: world name of the plane z = 0, or None for no plane.
        ground_albedo: its reflectance.
        extent: (x0, y0, x1, y1) of the interesting part.
        height: upper limit of the interesting part.
    """

    ground: str | None = None
    ground_albedo: float = 0.4
    extent: tuple[float, float, float, float] = (-50.0, -50.0, 50.0, 50.0)
    height: float = 100.0
    _rows: list[tuple[Any, ...]] = field(default_factory=list)
    _zones: list[tuple[float, ...]] = field(default_factory=list)
    _instances: int = 0

    def at(self, x: float = 0.0, y: float = 0.0, yaw: float = 0.0, z: float = 0.0) -> Frame:
        """Open a new object whose local frame stands at (x, y, z) and is turned by ``yaw``."""
        self._instances += 1
        return Frame(self, x, y, z, yaw, self._instances)

    def zone(
        self, name: str, x: float, y: float, size: tuple[float, float], yaw: float = 0.0, albedo: float = 0.3
    ) -> None:
        """Paint a rectangle of full ``size`` on the ground."""
        self._zones.append((x, y, size[0] / 2, size[1] / 2, yaw, NAME_ID[name], albedo))

    def add(self, row: tuple[Any, ...]) -> None:
        """Append one primitive (kind, center, half, yaw, name, top, albedo, density, instance)."""
        self._rows.append(row)

    def build(self) -> Scene:
        """Freeze the table."""
        rows = self._rows
        column = [np.array([row[i] for row in rows], np.float32) for i in range(9)]
        center, half = (np.ascontiguousarray(column[i].reshape(-1, 3).T) for i in (1, 2))
        return Scene(
            kind=column[0].astype(np.uint8),
            center=center,
            half=half,
            cos=np.cos(column[3]),
            sin=np.sin(column[3]),
            name=column[4].astype(np.int64),
            top=column[5].astype(np.int64),
            albedo=column[6],
            density=column[7],
            instance=column[8].astype(np.int64),
            ground=None if self.ground is None else (NAME_ID[self.ground], self.ground_albedo),
            zones=np.array(self._zones, np.float32).reshape(-1, 7),
            extent=self.extent,
            height=self.height,
        )


@dataclass(frozen=True)
class Frame:
    """Local frame of one object; every primitive added through it belongs to the same instance."""

    builder: SceneBuilder
    x: float
    y: float
    z: float
    yaw: float
    instance: int

    def _add(
        self,
        kind: int,
        center: Point,
        half: Point,
        yaw: float,
        name: str,
        top: str | None,
        albedo: float,
        density: float,
    ) -> None:
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        moved = (self.x + c * center[0] - s * center[1], self.y + s * center[0] + c * center[1], self.z + center[2])
        ids = NAME_ID[name], NAME_ID[top or name]
        self.builder.add((kind, moved, half, self.yaw + yaw, *ids, albedo, density, self.instance))

    def box(
        self, name: str, center: Point, size: Point, *, albedo: float = 0.5, yaw: float = 0.0, top: str | None = None
    ) -> None:
        """Add a box of full ``size`` whose BOTTOM centre is at ``center``."""
        half = (size[0] / 2, size[1] / 2, size[2] / 2)
        self._add(BOX, (center[0], center[1], center[2] + half[2]), half, yaw, name, top, albedo, 0.0)

    def gable(self, name: str, center: Point, size: Point, *, albedo: float = 0.5, yaw: float = 0.0) -> None:
        """Add a gabled roof (ridge along local x) of full ``size`` whose bottom centre is at ``center``."""
        half = (size[0] / 2, size[1] / 2, size[2] / 2)
        self._add(GABLE, (center[0], center[1], center[2] + half[2]), half, yaw, name, None, albedo, 0.0)

    def cylinder(self, name: str, center: Point, radius: float, height: float, *, albedo: float = 0.5) -> None:
        """Add an upright capped cylinder whose bottom centre is at ``center``."""
        half = (radius, radius, height / 2)
        self._add(CYLINDER, (center[0], center[1], center[2] + height / 2), half, 0.0, name, None, albedo, 0.0)

    def ellipsoid(
        self, name: str, center: Point, radii: Point, *, albedo: float = 0.5, yaw: float = 0.0, density: float = 0.0
    ) -> None:
        """Add an ellipsoid around ``center``; ``density`` > 0 makes it a porous volume (returns per metre of path)."""
        self._add(ELLIPSOID, center, radii, yaw, name, None, albedo, density)


Point = tuple[float, float, float]
