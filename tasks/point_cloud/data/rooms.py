# SPDX-License-Identifier: Apache-2.0
"""Rooms: four walls, doors, windows, furniture on a floor plan without overlaps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tasks.point_cloud.data.furniture import CATALOGUE
from tasks.point_cloud.data.scene import Floats, Scene, SceneBuilder

_WALL = 0.12


@dataclass(frozen=True)
class RoomWorld:
    """What a family of rooms looks like.

    Attributes:
        side: shortest and longest wall, metres.
        height: lowest and highest ceiling, metres.
        furniture: objects per room by name; big things first, so that they find a place.
        doors: number of doors; ``windows`` and ``boards`` likewise.
        beams: number of beams below the ceiling; ``columns`` on the floor.
        ajar: probability that a door stands open.
    """

    side: tuple[float, float] = (3.5, 6.0)
    height: tuple[float, float] = (2.4, 2.8)
    furniture: dict[str, int] = field(default_factory=dict)
    doors: int = 2
    windows: int = 0
    boards: int = 0
    beams: int = 0
    columns: int = 0
    ajar: float = 0.3


def build_room(world: RoomWorld, rng: np.random.Generator) -> Scene:
    """Build one room; its corner is at the origin and its walls follow the axes."""
    width, depth = rng.uniform(*world.side, 2)
    height = rng.uniform(*world.height)
    builder = SceneBuilder("floor", float(rng.uniform(0.2, 0.55)), (0.0, 0.0, width, depth), height)
    tint = rng.uniform(0.6, 0.9)
    for x, y, sx, sy in (
        (width / 2, -_WALL / 2, width + 2 * _WALL, _WALL),
        (width / 2, depth + _WALL / 2, width + 2 * _WALL, _WALL),
        (-_WALL / 2, depth / 2, _WALL, depth),
        (width + _WALL / 2, depth / 2, _WALL, depth),
    ):
        builder.at().box("wall", (x, y, 0), (sx, sy, height), albedo=tint * rng.uniform(0.9, 1.1))
    builder.at().box("ceiling", (width / 2, depth / 2, height), (width, depth, 0.1), albedo=0.9)
    plan = _FloorPlan(builder, rng, float(width), float(depth))
    _openings(plan, world, float(height))
    _structure(plan, world, float(height))
    for name, count in world.furniture.items():
        for _ in range(count):
            plan.put(name)
    return builder.build()


class _FloorPlan:
    """A floor plan that remembers which rectangles are taken."""

    def __init__(self, builder: SceneBuilder, rng: np.random.Generator, width: float, depth: float) -> None:
        self.builder, self.rng, self.width, self.depth = builder, rng, width, depth
        self.taken: list[tuple[float, float, float, float]] = []
        self.on_wall: list[list[tuple[float, float]]] = [[], [], [], []]

    def wall_spot(self, along: float, offset: float) -> tuple[float, float, float, int, float]:
        """Draw a place on a wall: x, y, yaw (local y points into the room), wall number, position along it."""
        wall = int(self.rng.integers(4))
        length = self.width if wall < 2 else self.depth
        low = along / 2 + 0.05
        at = float(self.rng.uniform(low, max(length - low, low + 1e-3)))
        x, y, yaw = (
            (at, offset, 0.0),
            (at, self.depth - offset, np.pi),
            (offset, at, -np.pi / 2),
            (self.width - offset, at, np.pi / 2),
        )[wall]
        return x, y, yaw, wall, at

    def free(self, x: float, y: float, hx: float, hy: float, gap: float) -> bool:
        """Tell whether a rectangle is inside the room and off every other one."""
        if x - hx < -1e-6 or y - hy < -1e-6 or x + hx > self.width + 1e-6 or y + hy > self.depth + 1e-6:
            return False
        return all(abs(x - ox) > hx + ohx + gap or abs(y - oy) > hy + ohy + gap for ox, oy, ohx, ohy in self.taken)

    def put(self, name: str) -> bool:
        """Place one object of the catalogue; False when no place was found in 30 tries."""
        maker, (w0, w1, d0, d1), at_wall = CATALOGUE[name]
        rng = self.rng
        w, d = float(rng.uniform(w0, w1)), float(rng.uniform(d0, d1))
        for _ in range(30):
            if at_wall:
                x, y, yaw, wall, _at = self.wall_spot(w, d / 2 + float(rng.uniform(0.01, 0.08)))
                hx, hy = (w / 2, d / 2) if wall < 2 else (d / 2, w / 2)
            else:
                x, y = float(rng.uniform(0, self.width)), float(rng.uniform(0, self.depth))
                yaw = float(rng.uniform(-np.pi, np.pi)) if name in ("chair", "lamp", "clutter") else 0.0
                hx, hy = (w / 2, d / 2) if yaw == 0.0 else (max(w, d) * 0.6, max(w, d) * 0.6)
            if self.free(x, y, hx, hy, 0.06):
                self.taken.append((x, y, hx, hy))
                maker(self.builder.at(x, y, yaw), rng, (w, d))
                return True
        return False


def _openings(plan: _FloorPlan, world: RoomWorld, height: float) -> None:
    """Hang doors, windows and boards on the walls without overlap."""
    for kind, count in (("door", world.doors), ("window", world.windows), ("board", world.boards)):
        for _ in range(count):
            size = {"door": 0.9, "window": 1.3, "board": 1.8}[kind]
            for _try in range(20):
                x, y, yaw, wall, at = plan.wall_spot(size, 0.0)
                if all(abs(at - other) > (size + taken) / 2 + 0.1 for other, taken in plan.on_wall[wall]):
                    plan.on_wall[wall].append((at, size))
                    _hang(plan, kind, (x, y, yaw, wall), world.ajar, height)
                    break


def _hang(plan: _FloorPlan, kind: str, place: tuple[float, float, float, int], ajar: float, height: float) -> None:
    x, y, yaw, wall = place
    rng = plan.rng
    frame = plan.builder.at(x, y, yaw)
    if kind == "window":
        low, tall = 0.9, min(1.3, height - 1.2)
        frame.box("window", (0, 0.02, low), (1.3, 0.04, tall), albedo=0.05)
        frame.box("window", (0, 0.06, low - 0.04), (1.4, 0.14, 0.05), albedo=0.95)
        return
    if kind == "board":
        frame.box("board", (0, 0.03, 0.9), (1.8, 0.06, 1.2), albedo=0.98)
        return
    tint = float(rng.uniform(0.1, 0.35))
    clear = 0.45 if wall < 2 else 0.35
    if rng.random() < ajar:
        # An open leaf stands out from the wall; what would block it is kept away.
        swing = float(rng.uniform(0.5, 1.5))
        leaf = plan.builder.at(*_turn(x, y, yaw, -0.43, 0.03), yaw + swing)
        leaf.box("door", (0.42, 0, 0), (0.84, 0.05, 2.02), albedo=tint)
        clear = 0.9
    frame.box("door", (0, 0.015, 0), (0.88, 0.05, 2.03), albedo=tint)
    for side in (-0.48, 0.48):
        frame.box("door", (side, 0.03, 0), (0.09, 0.08, 2.1), albedo=tint * 0.7)
    hx, hy = (0.5, clear) if wall < 2 else (clear, 0.5)
    dx, dy = _turn(0, 0, yaw, 0, clear)
    plan.taken.append((x + dx, y + dy, hx, hy))


def _turn(x: float, y: float, yaw: float, u: float, v: float) -> tuple[float, float]:
    c, s = float(np.cos(yaw)), float(np.sin(yaw))
    return x + c * u - s * v, y + s * u + c * v


def _structure(plan: _FloorPlan, world: RoomWorld, height: float) -> None:
    """Beams across the ceiling and columns on the floor."""
    rng = plan.rng
    for index in range(world.beams):
        x = plan.width * (index + 0.5 + float(rng.uniform(-0.2, 0.2))) / world.beams
        drop = float(rng.uniform(0.25, 0.4))
        center = (x, plan.depth / 2, height - drop)
        plan.builder.at().box("beam", center, (0.3, plan.depth, drop), albedo=float(rng.uniform(0.35, 0.6)))
    for _ in range(world.columns):
        for _try in range(20):
            x, y = float(rng.uniform(0.3, plan.width - 0.3)), float(rng.uniform(0.3, plan.depth - 0.3))
            if plan.free(x, y, 0.25, 0.25, 0.3):
                plan.taken.append((x, y, 0.25, 0.25))
                frame = plan.builder.at(x, y)
                if rng.random() < 0.5:
                    frame.cylinder("column", (0, 0, 0), 0.2, height, albedo=0.5)
                else:
                    frame.box("column", (0, 0, 0), (0.4, 0.4, height), albedo=0.5)
                break


def camera_views(scene: Scene, count: int, rng: np.random.Generator) -> list[tuple[Floats, float, float]]:
    """Draw handheld poses: eye height, in free space, looking across the room and slightly down."""
    x0, y0, x1, y1 = scene.extent
    views = []
    turn = rng.uniform(0, 2 * np.pi)
    for index in range(count):
        yaw = float(turn + 2 * np.pi * index / count + rng.uniform(-0.3, 0.3))
        position = _free_point(scene, rng, float(rng.uniform(1.2, 1.7)), 0.25)
        # Step back from the wall that is looked at, as one does to get things into view.
        middle = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
        back = middle - 0.28 * np.array([np.cos(yaw) * (x1 - x0), np.sin(yaw) * (y1 - y0)])
        candidate = np.array([back[0], back[1], position[2]], np.float32)
        if not scene.occupied(float(back[0]), float(back[1]), float(position[2]), 0.2):
            position = candidate
        views.append((position, yaw, float(rng.uniform(-0.45, -0.15))))
    return views


def stations(scene: Scene, count: int, rng: np.random.Generator) -> list[Floats]:
    """Draw tripod positions in free space, 1.5 m above the floor."""
    return [_free_point(scene, rng, 1.5, 0.4) for _ in range(count)]


def _free_point(scene: Scene, rng: np.random.Generator, z: float, margin: float) -> Floats:
    x0, y0, x1, y1 = scene.extent
    for _ in range(50):
        x, y = rng.uniform(x0 + 0.4, x1 - 0.4), rng.uniform(y0 + 0.4, y1 - 0.4)
        if not scene.occupied(x, y, z, margin):
            return np.array([x, y, z], np.float32)
    return np.array([(x0 + x1) / 2, (y0 + y1) / 2, z], np.float32)
