# SPDX-License-Identifier: Apache-2.0
"""Towns seen from above: houses with gabled, flat and low roofs, tall ragged trees, bushes, cars, power lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tasks.point_cloud.data.scene import Floats, Frame, Scene, SceneBuilder
from tasks.point_cloud.data.streets import car


@dataclass(frozen=True)
class TownWorld:
    """What a family of tiles looks like.

    Attributes:
        points: pulses per tile; tiles of dense surveys are therefore small.
        density: lowest and highest pulses per square metre, drawn log-uniformly.
        relief: height of the gentle undulation, metres.
        slope: largest slope, metres per metre.
        crowns: trees per square metre.
    """

    points: int = 10000
    density: tuple[float, float] = (6.0, 70.0)
    relief: float = 0.15
    slope: float = 0.06
    crowns: float = 0.012


def build_town(world: TownWorld, rng: np.random.Generator) -> tuple[Scene, float]:
    """Build one tile; return it with its pulse density."""
    density = float(np.exp(rng.uniform(*np.log(world.density))))
    side = float(np.sqrt(world.points / density))
    aspect = float(rng.uniform(0.7, 1.4))
    width, depth = side * aspect**0.5, side / aspect**0.5
    builder = SceneBuilder("terrain", float(rng.uniform(0.45, 0.75)), (0.0, 0.0, width, depth), 40.0)
    taken: list[tuple[float, float, float]] = []
    margin = 10.0
    if rng.random() < 0.6:
        yaw = float(rng.uniform(-0.3, 0.3))
        y = float(rng.uniform(0, depth))
        builder.zone("road", width / 2, y, (4 * side, 6.0), yaw, albedo=float(rng.uniform(0.3, 0.6)))
        for x in rng.uniform(0, width, 2 + int(side / 12)):
            at = (float(x), y + float((x - width / 2) * np.tan(yaw)) + float(rng.choice([-1.6, 1.6])))
            if _free(taken, *at, 2.6):
                taken.append((*at, 2.6))
                car(builder.at(*at, yaw), rng)
    area = (width + margin) * (depth + margin)
    for _ in range(max(1, int(rng.poisson(area / 320)))):
        _place_house(builder, rng, taken, (width, depth), margin / 2)
    for _ in range(int(rng.poisson(area / 220))):
        x, y = float(rng.uniform(0, width)), float(rng.uniform(0, depth))
        if _free(taken, x, y, 2.4):
            taken.append((x, y, 2.4))
            car(builder.at(x, y, float(rng.uniform(0, 6))), rng)
    for _ in range(max(1, int(rng.poisson(area * world.crowns)))):
        x, y = float(rng.uniform(-4, width + 4)), float(rng.uniform(-4, depth + 4))
        # Crowns overhang roofs and each other; only the trunk needs ground of its own.
        ragged_tree(builder.at(x, y), rng, float(rng.uniform(5, 16)), rooted=_free(taken, x, y, 0.3))
    for _ in range(int(rng.poisson(area / 60))):
        bush(builder.at(float(rng.uniform(0, width)), float(rng.uniform(0, depth))), rng)
    _power_line(builder, rng, (width, depth))
    return builder.build(), density


def _free(taken: list[tuple[float, float, float]], x: float, y: float, radius: float) -> bool:
    return all(np.hypot(x - ox, y - oy) > radius + other for ox, oy, other in taken)


def _place_house(
    builder: SceneBuilder,
    rng: np.random.Generator,
    taken: list[tuple[float, float, float]],
    size: tuple[float, float],
    margin: float,
) -> None:
    for _ in range(12):
        x, y = float(rng.uniform(-margin, size[0] + margin)), float(rng.uniform(-margin, size[1] + margin))
        w, d = float(rng.uniform(7, 13)), float(rng.uniform(6, 9))
        if _free(taken, x, y, 0.42 * (w + d)):
            taken.append((x, y, 0.42 * (w + d)))
            house(builder.at(x, y, float(rng.uniform(0, np.pi))), rng, w, d)
            return


def house(frame: Frame, rng: np.random.Generator, width: float, depth: float) -> None:
    """Walls under a roof with eaves: low gable, steep gable or flat; often an extension."""
    wall = float(rng.uniform(2.6, 6.0))
    tint = float(rng.uniform(0.15, 0.7))
    frame.box("building", (0, 0, 0), (width, depth, wall), albedo=0.5)
    kind = rng.random()
    eave = float(rng.uniform(0.3, 0.8))
    if kind < 0.8:
        rise = depth / 2 * float(rng.uniform(0.15, 0.4) if kind < 0.5 else rng.uniform(0.5, 1.0))
        frame.gable("building", (0, 0, wall - 0.1), (width + 2 * eave, depth + 2 * eave, rise), albedo=tint)
    else:
        frame.box("building", (0, 0, wall), (width + 0.3, depth + 0.3, 0.3), albedo=tint)
    if rng.random() < 0.4:
        frame.box("building", (width / 2 + 1.4, 0, 0), (2.8, depth * 0.6, wall * 0.75), albedo=tint)
    if rng.random() < 0.6:
        x, y = float(rng.uniform(-0.3, 0.3)) * width, float(rng.uniform(-0.2, 0.2)) * depth
        frame.box("building", (x, y, wall), (0.6, 0.6, 2.5), albedo=0.4)


def ragged_tree(frame: Frame, rng: np.random.Generator, height: float, *, rooted: bool = True) -> None:
    """A tall tree with a crown of many small flat clumps and holes between them."""
    if rooted:
        frame.cylinder("trunk", (0, 0, 0), float(rng.uniform(0.1, 0.25)), 0.5 * height, albedo=0.3)
    low = float(rng.uniform(0.15, 0.4)) * height
    radius = float(rng.uniform(0.18, 0.32)) * height
    for _ in range(int(rng.integers(14, 30))):
        level = float(rng.uniform(low, height))
        wide = radius * float(np.sqrt(np.clip(1.15 - ((level - 0.55 * height) / (0.55 * height)) ** 2, 0.1, 1)))
        angle, out = float(rng.uniform(0, 2 * np.pi)), wide * float(np.sqrt(rng.random()))
        size = float(rng.uniform(0.5, 1.4)) * (0.5 + height / 20)
        center = (out * float(np.cos(angle)), out * float(np.sin(angle)), level)
        radii = (size, size * float(rng.uniform(0.6, 1.2)), size * float(rng.uniform(0.25, 0.6)))
        light = float(rng.uniform(0.12, 0.3))
        frame.ellipsoid("vegetation", center, radii, albedo=light, yaw=angle, density=float(rng.uniform(0.3, 1.0)))


def bush(frame: Frame, rng: np.random.Generator) -> None:
    """A bush or a piece of hedge, knee to head high."""
    for _ in range(int(rng.integers(1, 5))):
        tall = float(rng.uniform(0.4, 1.1))
        center = (float(rng.normal(0, 0.8)), float(rng.normal(0, 0.4)), tall * 0.9)
        radii = (float(rng.uniform(0.4, 0.9)), float(rng.uniform(0.4, 0.9)), tall)
        frame.ellipsoid("vegetation", center, radii, albedo=float(rng.uniform(0.12, 0.3)), density=2.0)


def _power_line(builder: SceneBuilder, rng: np.random.Generator, size: tuple[float, float]) -> None:
    """Poles with cross arms and sagging wires; a wire is as thick as the laser's footprint makes it."""
    if rng.random() < 0.25:
        return
    yaw = float(rng.choice([0.0, np.pi / 2]) + rng.uniform(-0.4, 0.4))
    frame = builder.at(size[0] * float(rng.uniform(0.2, 0.8)), size[1] * float(rng.uniform(0.2, 0.8)), yaw)
    top, span = float(rng.uniform(8, 11)), float(rng.uniform(16, 28))
    first = -float(rng.uniform(0.2, 0.8)) * span
    for pole in range(-1, 3):
        x = first + pole * span
        frame.cylinder("power line", (x, 0, 0), 0.2, top, albedo=0.35)
        frame.box("power line", (x, 0, top - 0.3), (0.25, 2.4, 0.25), albedo=0.35)
        for y in (-1.0, 0.0, 1.0):
            for part in range(8):
                middle = (part + 0.5) / 8
                sag = 4 * 0.9 * middle * (1 - middle)
                center = (x + middle * span, y, top - sag)
                frame.box("power line", center, (span / 8, 0.12, 0.12), albedo=0.3)


def relief(world: TownWorld, rng: np.random.Generator) -> Callable[[Floats], Floats]:
    """Draw a gentle terrain: from points [N, 3] to the height of the ground below them.

    Points are lifted by it after casting: exact for vertical rays, off by tilt times slope (under 0.02) for ours.
    """
    steep, heading = rng.uniform(0, world.slope), rng.uniform(0, 2 * np.pi)
    wave = (2 * np.pi / rng.uniform(8, 30, 2)).tolist()
    slope = float(steep * np.cos(heading)), float(steep * np.sin(heading))
    phase = float(rng.uniform(0, 6)), float(rng.uniform(0, 6))
    amplitude = world.relief * float(rng.uniform(0, 1))

    def height(pos: Floats) -> Floats:
        bumps = np.sin(wave[0] * pos[:, 0] + phase[0]) * np.sin(wave[1] * pos[:, 1] + phase[1])
        return np.asarray(slope[0] * pos[:, 0] + slope[1] * pos[:, 1] + amplitude * bumps, np.float32)

    return height
