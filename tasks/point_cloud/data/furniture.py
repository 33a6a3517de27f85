# SPDX-License-Identifier: Apache-2.0
"""Furniture: each function adds one object to a frame whose local y axis points away from the wall behind it.

The frame stands on the floor below the middle of the object.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tasks.point_cloud.data.scene import Frame

Maker = Callable[[Frame, np.random.Generator, tuple[float, float]], None]


def chair(frame: Frame, rng: np.random.Generator, size: tuple[float, float]) -> None:
    """A seat, a back, and four legs or a column with a foot."""
    w, d = size
    seat, tint = rng.uniform(0.42, 0.48), rng.uniform(0.1, 0.6)
    frame.box("chair", (0, 0, seat - 0.05), (w, d, 0.06), albedo=tint)
    frame.box("chair", (0, -d / 2 + 0.03, seat), (w * 0.9, 0.05, rng.uniform(0.38, 0.55)), albedo=tint)
    if rng.random() < 0.5:
        for x in (-1, 1):
            for y in (-1, 1):
                frame.box("chair", (x * (w / 2 - 0.03), y * (d / 2 - 0.03), 0), (0.05, 0.05, seat - 0.05), albedo=0.3)
    else:
        frame.cylinder("chair", (0, 0, 0.06), 0.04, seat - 0.1, albedo=0.3)
        frame.cylinder("chair", (0, 0, 0), 0.8 * w / 2, 0.07, albedo=0.3)


def table(frame: Frame, rng: np.random.Generator, size: tuple[float, float]) -> None:
    """A top and four legs; some tops are round."""
    w, d = size
    height, tint = rng.uniform(0.7, 0.78), rng.uniform(0.3, 0.7)
    if rng.random() < 0.25:
        frame.cylinder("table", (0, 0, height - 0.05), d / 2, 0.05, albedo=tint)
        frame.cylinder("table", (0, 0, 0), 0.06, height - 0.05, albedo=tint)
        return
    frame.box("table", (0, 0, height - 0.05), (w, d, 0.05), albedo=tint)
    for x in (-1, 1):
        for y in (-1, 1):
            frame.box("table", (x * (w / 2 - 0.06), y * (d / 2 - 0.06), 0), (0.06, 0.06, height - 0.05), albedo=tint)


def cabinet(frame: Frame, rng: np.random.Generator, size: tuple[float, float]) -> None:
    """A closed box as high as a sideboard or a wardrobe."""
    height = rng.uniform(0.8, 1.2) if rng.random() < 0.5 else rng.uniform(1.6, 2.1)
    frame.box("cabinet", (0, 0, 0), (size[0], size[1], height), albedo=rng.uniform(0.25, 0.75))


def shelves(frame: Frame, rng: np.random.Generator, size: tuple[float, float]) -> None:
    """Open boards between two sides, with gaps between them."""
    w, d = size
    height, tint = rng.uniform(1.5, 2.0), rng.uniform(0.2, 0.5)
    for x in (-1, 1):
        frame.box("shelves", (x * (w / 2 - 0.015), 0, 0), (0.03, d, height), albedo=tint)
    for z in np.linspace(0.05, height - 0.03, 5):
        frame.box("shelves", (0, 0, float(z)), (w - 0.06, d, 0.03), albedo=tint)
        if rng.random() < 0.6:
            frame.box("shelves", (rng.uniform(-0.2, 0.2) * w, 0, float(z) + 0.03), (0.4 * w, d * 0.7, 0.22), albedo=0.5)


def bed(frame: Frame, rng: np.random.Generator, size: tuple[float, float]) -> None:
    """A mattress, a headboard against the wall, and pillows."""
    w, d = size
    frame.box("bed", (0, 0, 0), (w, d, rng.uniform(0.38, 0.55)), albedo=rng.uniform(0.5, 0.9))
    frame.box("bed", (0, -d / 2 + 0.04, 0), (w, 0.08, rng.uniform(0.8, 1.1)), albedo=rng.uniform(0.2, 0.5))
    for x in (-0.22, 0.22):
        frame.ellipsoid("bed", (x * w, -d / 2 + 0.3, 0.5), (0.2 * w, 0.2, 0.12), albedo=0.9)


def sofa(frame: Frame, rng: np.random.Generator, size: tuple[float, float]) -> None:
    """A low seat with a back and two arms."""
    w, d = size
    tint = rng.uniform(0.15, 0.6)
    frame.box("sofa", (0, 0, 0), (w, d, rng.uniform(0.4, 0.45)), albedo=tint)
    frame.box("sofa", (0, -d / 2 + 0.12, 0.4), (w, 0.24, rng.uniform(0.35, 0.5)), albedo=tint)
    for x in (-1, 1):
        frame.box("sofa", (x * (w / 2 - 0.1), 0, 0.4), (0.2, d, 0.2), albedo=tint)


def lamp(frame: Frame, rng: np.random.Generator, size: tuple[float, float]) -> None:
    """A floor lamp: a rod with a wide shade."""
    height = rng.uniform(1.4, 1.8)
    frame.cylinder("lamp", (0, 0, 0), 0.14, 0.04, albedo=0.3)
    frame.cylinder("lamp", (0, 0, 0), 0.03, height - 0.3, albedo=0.3)
    frame.cylinder("lamp", (0, 0, height - 0.3), size[0] / 2, 0.3, albedo=0.95)


def nightstand(frame: Frame, rng: np.random.Generator, size: tuple[float, float]) -> None:
    """A knee-high box."""
    frame.box("nightstand", (0, 0, 0), (size[0], size[1], rng.uniform(0.4, 0.55)), albedo=rng.uniform(0.2, 0.6))


def clutter(frame: Frame, rng: np.random.Generator, size: tuple[float, float]) -> None:
    """Boxes and bins that stand about."""
    if rng.random() < 0.4:
        frame.cylinder("clutter", (0, 0, 0), size[0] / 2, rng.uniform(0.3, 0.6), albedo=rng.uniform(0.1, 0.9))
        return
    low = rng.uniform(0.2, 0.4)
    frame.box("clutter", (0, 0, 0), (size[0], size[1], low), albedo=rng.uniform(0.1, 0.9), yaw=rng.uniform(0, 1))
    if rng.random() < 0.6:
        frame.box("clutter", (0.03, 0, low), (size[0] * 0.7, size[1] * 0.7, 0.25), albedo=0.6, yaw=rng.uniform(0, 1))


# maker, footprint ranges (width low, high, depth low, high) in metres, stands against a wall
CATALOGUE: dict[str, tuple[Maker, tuple[float, float, float, float], bool]] = {
    "bed": (bed, (1.3, 1.8, 1.9, 2.1), True),
    "sofa": (sofa, (1.6, 2.2, 0.8, 0.95), True),
    "cabinet": (cabinet, (0.7, 1.3, 0.4, 0.6), True),
    "shelves": (shelves, (0.8, 1.2, 0.28, 0.38), True),
    "nightstand": (nightstand, (0.4, 0.5, 0.35, 0.45), True),
    "table": (table, (1.0, 1.6, 0.7, 0.9), False),
    "chair": (chair, (0.42, 0.52, 0.42, 0.52), False),
    "lamp": (lamp, (0.35, 0.5, 0.35, 0.5), False),
    "clutter": (clutter, (0.3, 0.5, 0.3, 0.5), False),
}
