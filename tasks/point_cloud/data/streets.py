# SPDX-License-Identifier: Apache-2.0
"""Streets: a road along x with pavements, parking, verges, houses, trees, traffic and people."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from tasks.point_cloud.data.scene import Frame, Scene, SceneBuilder


@dataclass(frozen=True)
class StreetWorld:
    """What a family of streets looks like.

    Attributes:
        length: half length of the street, metres.
        curb: lowest and highest kerb, metres; the side of a kerb has a name of its own.
        parking: paint a parking strip on both sides.
        works: put barriers and traffic cones on the road.
        reach: half length of the stretch where the small objects stand, metres.
    """

    length: float = 60.0
    curb: tuple[float, float] = (0.12, 0.18)
    parking: bool = True
    works: bool = False
    reach: float = 28.0


def build_street(world: StreetWorld, rng: np.random.Generator) -> Scene:
    """Build one street; the road's middle line is the x axis, the sensor drives at the origin."""
    road = float(rng.uniform(6.5, 9.0))
    strip = 2.4 if world.parking else 0.0
    walk, verge = float(rng.uniform(1.8, 3.0)), float(rng.uniform(2.5, 6.0))
    builder = SceneBuilder("terrain", 0.35, (-world.length, -40.0, world.length, 40.0), 30.0)
    total = 2 * world.length + 80
    builder.zone("road", 0, 0, (total, road + 2 * strip), albedo=float(rng.uniform(0.12, 0.22)))
    street = _Street(builder, rng, world, road / 2)
    for side in (-1, 1):
        edge = side * (road / 2 + strip)
        if world.parking:
            builder.zone("parking", 0, edge - side * strip / 2, (total, strip), albedo=float(rng.uniform(0.26, 0.36)))
        curb = float(rng.uniform(*world.curb))
        middle = edge + side * walk / 2
        builder.at().box("curb", (0, middle, 0), (total, walk, curb), albedo=0.45, top="sidewalk")
        _pavement(street, middle, walk, curb)
        _verge(street, edge + side * (walk + verge / 2), verge)
        _houses(street, edge + side * (walk + verge), side)
        if world.parking:
            _park(street, edge - side * strip / 2)
    _traffic(street)
    return builder.build()


@dataclass(frozen=True)
class _Street:
    builder: SceneBuilder
    rng: np.random.Generator
    world: StreetWorld
    lane: float

    def slots(self, count: int, low: float = -1.0, high: float = 1.0) -> list[float]:
        """Draw ``count`` positions along the street, one per equal part, so that nothing overlaps."""
        reach = self.world.reach
        edges = np.linspace(low * reach, high * reach, count + 1)
        return [float(self.rng.uniform(a + 0.3 * (b - a), b - 0.3 * (b - a))) for a, b in itertools.pairwise(edges)]


def _pavement(street: _Street, y: float, width: float, z: float) -> None:
    """Poles, signs and people on a pavement."""
    rng = street.rng
    side = np.sign(y)
    kinds = ["pole"] * 4 + ["sign"] * 5 + ["person"] * 5
    rng.shuffle(kinds)
    for kind, x in zip(kinds, street.slots(len(kinds)), strict=True):
        at = y - side * width * (0.35 if kind != "person" else float(rng.uniform(-0.3, 0.2)))
        frame = street.builder.at(x, float(at), float(rng.uniform(-0.3, 0.3)), z)
        {"pole": pole, "sign": sign, "person": person}[kind](frame, rng)


def pole(frame: Frame, rng: np.random.Generator) -> None:
    """A lamp post with an arm."""
    height, radius = float(rng.uniform(5, 8)), float(rng.uniform(0.08, 0.14))
    frame.cylinder("pole", (0, 0, 0), radius, height, albedo=0.5)
    frame.box("pole", (0, 0.6, height - 0.15), (0.15, 1.4, 0.12), albedo=0.5)


def sign(frame: Frame, rng: np.random.Generator) -> None:
    """A plate on a thin post."""
    low = float(rng.uniform(0.9, 1.9))  # most beams of a roof sensor stay below two metres
    frame.cylinder("pole", (0, 0, 0), 0.05, low + 0.6, albedo=0.5)
    size = float(rng.uniform(0.8, 1.2))
    # A retroreflector saturates the receiver at almost every angle.
    frame.box("traffic sign", (0.08, 0, low), (0.05, size, size), albedo=3.0, yaw=float(rng.uniform(-0.3, 0.3)))


def person(frame: Frame, rng: np.random.Generator) -> None:
    """Legs, a body and a head."""
    height = float(rng.uniform(1.5, 1.9))
    frame.cylinder("person", (0, 0.1, 0), 0.09, height * 0.48, albedo=0.3)
    frame.cylinder("person", (0.12, -0.1, 0), 0.09, height * 0.48, albedo=0.3)
    frame.ellipsoid(
        "person", (0.03, 0, height * 0.66), (0.18, 0.26, height * 0.24), albedo=float(rng.uniform(0.2, 0.7))
    )
    frame.ellipsoid("person", (0.03, 0, height - 0.1), (0.11, 0.11, 0.13), albedo=0.6)


def _verge(street: _Street, y: float, width: float) -> None:
    """Trees and hedges on the grass, fences towards the houses."""
    rng = street.rng
    for x in street.slots(5, -1.3, 1.3):
        shift = float(rng.uniform(-0.2, 0.2)) * width
        tree(street.builder.at(x, y + shift, float(rng.uniform(0, 6))), rng, float(rng.uniform(4, 8)), trunk=0.32)
    for x in street.slots(3, -1.2, 1.2):
        frame = street.builder.at(x, y - np.sign(y) * width * 0.3)
        for dx in np.arange(-1.2, 1.3, 0.6):
            frame.ellipsoid(
                "vegetation", (float(dx), float(rng.normal(0, 0.1)), 0.5), (0.55, 0.45, 0.65), albedo=0.4, density=8.0
            )
    for x in street.slots(4, -1.3, 1.3):
        frame = street.builder.at(x, y + np.sign(y) * width * 0.47)
        long, high = float(rng.uniform(5, 9)), float(rng.uniform(1.0, 1.6))
        frame.box("fence", (0, 0, 0), (long, 0.08, high), albedo=float(rng.uniform(0.5, 0.7)))
        for dx in np.arange(-long / 2, long / 2 + 0.1, long / 4):
            frame.box("fence", (float(dx), 0, 0), (0.14, 0.16, high + 0.15), albedo=0.5)


def tree(
    frame: Frame, rng: np.random.Generator, height: float, *, trunk: float = 0.3, blobs: int = 7, density: float = 1.5
) -> None:
    """A trunk and a crown of ``blobs`` porous ellipsoids strewn irregularly."""
    clear = 0.35 * height
    frame.cylinder("trunk", (0, 0, 0), float(rng.uniform(0.12, 0.5 * trunk + 0.05)), clear + 0.5, albedo=0.25)
    spread = 0.28 * height
    for index in range(blobs):
        level = clear + (height - clear) * (index + 0.5) / blobs
        wide = spread * np.sqrt(max(0.05, 1 - (2 * (index + 0.5) / blobs - 0.8) ** 2 / 1.7))
        angle, out = rng.uniform(0, 2 * np.pi), wide * float(rng.uniform(0.2, 0.7))
        size = wide * float(rng.uniform(0.5, 0.75))
        center = (float(out * np.cos(angle)), float(out * np.sin(angle)), float(level))
        frame.ellipsoid("vegetation", center, (size, size, 0.7 * size), albedo=0.45, density=density)


def _houses(street: _Street, y: float, side: int) -> None:
    """A row of houses with gaps; some have gabled roofs, all have balconies or ledges that break the front."""
    rng, x = street.rng, -street.world.length - 10.0
    while x < street.world.length + 10:
        width, deep = float(rng.uniform(8, 18)), float(rng.uniform(8, 12))
        if rng.random() < 0.8:
            high = float(rng.uniform(4, 12))
            frame = street.builder.at(x + width / 2, y + side * (deep / 2 + float(rng.uniform(0, 2))))
            tint = float(rng.uniform(0.3, 0.7))
            frame.box("building", (0, 0, 0), (width, deep, high), albedo=tint)
            if rng.random() < 0.5:
                frame.gable("building", (0, 0, high), (width + 0.8, deep + 0.8, float(rng.uniform(2, 4))), albedo=0.3)
            for level in np.arange(2.8, high, 2.8):
                frame.box("building", (0, -side * deep / 2, float(level)), (width * 0.7, 0.5, 0.2), albedo=tint)
        x += width + float(rng.uniform(1, 8))


def car(frame: Frame, rng: np.random.Generator) -> None:
    """A body, a narrower cabin, four wheels."""
    long, wide = float(rng.uniform(3.9, 4.8)), float(rng.uniform(1.7, 1.9))
    tint = float(rng.uniform(0.15, 0.9))
    frame.box("car", (0, 0, 0.25), (long, wide, 0.6), albedo=tint)
    shift = float(rng.uniform(-0.35, 0.0))
    frame.box("car", (shift, 0, 0.85), (long * float(rng.uniform(0.45, 0.65)), wide * 0.86, 0.6), albedo=tint * 0.6)
    for x in (-0.32, 0.32):
        for y in (-0.45, 0.45):
            frame.box("car", (x * long, y * wide, 0), (0.6, 0.2, 0.6), albedo=0.1)


def truck(frame: Frame, rng: np.random.Generator) -> None:
    """A cab and a box body, with air below."""
    long, wide, high = float(rng.uniform(4, 6)), float(rng.uniform(2.2, 2.4)), float(rng.uniform(2.0, 2.5))
    tint = float(rng.uniform(0.3, 0.9))
    frame.box("truck", (-0.9, 0, 0.9), (long, wide, high), albedo=tint)
    frame.box("truck", (long / 2 + 0.15, 0, 0.5), (1.7, wide * 0.95, high * 0.8), albedo=tint * 0.7)
    for x in (-0.4, 0.45):
        for y in (-0.42, 0.42):
            frame.box("truck", (x * long, y * wide, 0), (0.9, 0.3, 0.9), albedo=0.1)


def _park(street: _Street, y: float) -> None:
    """Cars and trucks in a parking strip, some places empty."""
    rng = street.rng
    for index, x in enumerate(street.slots(8, -1.2, 1.2)):
        frame = street.builder.at(x, y, float(rng.normal(0, 0.03)) + (np.pi if rng.random() < 0.5 else 0.0))
        if index % 4 == 1:
            truck(frame, rng)
        elif rng.random() < 0.75:
            car(frame, rng)


def _traffic(street: _Street) -> None:
    """Cars and trucks on the lanes, people who cross, and road works; the sensor's own place stays free."""
    rng, lane = street.rng, street.lane
    for side in (-1, 1):
        spots = [x for x in street.slots(10, -1.8, 1.8) if abs(x) > 10]
        for index, x in enumerate(spots):
            frame = street.builder.at(x, side * lane / 2, 0.0 if side < 0 else np.pi)
            (truck if index % 3 == 1 else car)(frame, rng)
        if street.world.works:
            for x in street.slots(8):
                frame = street.builder.at(x, side * (lane - 0.4))
                if rng.random() < 0.5:
                    frame.box("barrier", (0, 0, 0), (2.0, 0.45, 0.5), albedo=0.8)
                    frame.box("barrier", (0, 0, 0.5), (2.0, 0.2, 0.5), albedo=0.8)
                else:
                    for dx in (-0.8, 0.0, 0.8):
                        for level, radius in enumerate((0.26, 0.19, 0.12)):
                            frame.cylinder("traffic cone", (dx, 0, 0.25 * level), radius, 0.25, albedo=0.9)
    for x in street.slots(5, -0.7, 0.7):
        if abs(x) > 3:
            person(street.builder.at(x, float(rng.uniform(-0.15, 0.15)), float(rng.uniform(0, 6))), rng)
