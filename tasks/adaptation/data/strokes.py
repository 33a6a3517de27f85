# SPDX-License-Identifier: Apache-2.0
"""Four ways to write the ten digits, as strokes: round, of seven segments, by pen, and with cut corners."""

from __future__ import annotations

import math

from moeapps.data.images.drawing import Hand, Point, Sketch, arc

Line = list[Point]


def _sketch(radius: float, *lines: Line) -> Sketch:
    sketch = Sketch()
    for line in lines:
        sketch.stroke(line, radius)
    return sketch


def _circle(cx: float, cy: float, rx: float, ry: float) -> Line:
    return arc(cx, cy, rx, ry, 0, 360, 15)


ROUND: tuple[tuple[Line, ...], ...] = (
    (_circle(0, 0, 0.42, 0.7),),
    ([(-0.24, -0.45), (0.05, -0.7), (0.05, 0.7)],),
    ([*arc(0, -0.3, 0.4, 0.4, 190, 395, 9), (-0.42, 0.7), (0.46, 0.7)],),
    ([*arc(-0.02, -0.35, 0.36, 0.35, 210, 450, 9), *arc(-0.02, 0.33, 0.42, 0.37, -90, 150, 9)],),
    ([(0.2, 0.7), (0.2, -0.7), (-0.46, 0.25), (0.46, 0.25)],),
    ([(0.36, -0.7), (-0.3, -0.7), (-0.35, -0.1), *arc(-0.02, 0.24, 0.42, 0.44, -125, 150, 10)],),
    ([(0.28, -0.68), (-0.14, -0.4), (-0.38, 0.2)], _circle(0, 0.3, 0.38, 0.4)),
    ([(-0.42, -0.7), (0.42, -0.7), (-0.12, 0.7)],),
    (_circle(0, -0.36, 0.32, 0.34), _circle(0, 0.34, 0.4, 0.37)),
    (_circle(0, -0.3, 0.38, 0.4), [(0.38, -0.2), (0.26, 0.3), (-0.1, 0.7)]),
)
"""Lines of each digit as people print it."""

_A, _B, _C, _D, _E, _F = (-0.38, -0.7), (0.38, -0.7), (-0.38, 0.0), (0.38, 0.0), (-0.38, 0.7), (0.38, 0.7)
SEGMENTS: tuple[tuple[Line, ...], ...] = (
    ([_A, _B, _F, _E, _A],),
    ([_B, _D, _F],),
    ([_A, _B, _D, _C, _E, _F],),
    ([_A, _B, _F, _E], [_C, _D]),
    ([_A, _C, _D], [_B, _F]),
    ([_B, _A, _C, _D, _F, _E],),
    ([_B, _A, _E, _F, _D, _C],),
    ([_A, _B, _F],),
    ([_A, _B, _F, _E, _A], [_C, _D]),
    ([_D, _C, _A, _B, _F, _E],),
)
"""Lines of each digit as a display of seven segments shows it."""

PEN: tuple[tuple[Line, ...], ...] = (
    ([*arc(0, 0, 0.34, 0.72, -70, 300, 15), (0.1, -0.45)],),
    ([(0.0, -0.72), (0.0, 0.66)], [(-0.28, 0.68), (0.28, 0.68)]),
    ([*arc(0, -0.34, 0.36, 0.36, 200, 400, 8), (-0.1, 0.5), *arc(-0.22, 0.52, 0.14, 0.14, 0, -270, 6), (0.46, 0.66)],),
    ([(-0.36, -0.7), (0.34, -0.7), (-0.04, -0.12), *arc(-0.04, 0.3, 0.4, 0.4, -80, 150, 9)],),
    ([(-0.2, -0.7), (-0.4, 0.08), (0.42, 0.08)], [(0.22, -0.36), (0.12, 0.72)]),
    ([(-0.26, -0.66), (-0.3, -0.1), *arc(-0.04, 0.26, 0.38, 0.42, -130, 150, 10)], [(-0.26, -0.68), (0.38, -0.74)]),
    ([(0.16, -0.74), (-0.2, -0.3), *arc(0, 0.32, 0.32, 0.36, 180, -140, 12)],),
    ([(-0.42, -0.62), (0.4, -0.68), (0.0, 0.7)], [(-0.24, 0.02), (0.34, -0.02)]),
    ([*arc(0, -0.36, 0.3, 0.32, -30, -270, 8), *arc(0, 0.32, 0.34, 0.36, -90, 250, 12), (0.28, -0.52)],),
    ([*arc(0.02, -0.36, 0.32, 0.34, 20, 360, 12), (0.3, 0.3), *arc(-0.02, 0.36, 0.32, 0.34, 20, 140, 6)],),
)
"""Lines of each digit as one writes with a pen: slanted, 1 with a foot, 7 with a bar, 4 open, 9 with a hook."""


def _octagon(cy: float, ry: float, first: int = 0, last: int = 8, rx: float = 0.4) -> Line:
    """Corners ``first`` to ``last`` of an octagon: 0 is right of the top, then clockwise; 8 is 0 again."""
    angles = [math.radians(-67.5 + 45 * corner) for corner in range(first, last + 1)]
    return [(1.08 * rx * math.cos(a), cy + 1.08 * ry * math.sin(a)) for a in angles]


CORNERS: tuple[tuple[Line, ...], ...] = (
    (_octagon(0, 0.68),),
    ([(-0.26, -0.5), (0.0, -0.7), (0.0, 0.7)], [(-0.3, 0.7), (0.3, 0.7)]),
    ([*_octagon(-0.32, 0.36, -3, 2), (-0.4, 0.5), (-0.4, 0.7), (0.42, 0.7)],),
    (_octagon(-0.34, 0.34, -3, 3), _octagon(0.34, 0.36, 0, 6), [(-0.1, 0.0), (0.15, 0.0)]),
    ([(0.24, 0.7), (0.24, -0.7), (0.04, -0.7), (-0.42, 0.15), (-0.42, 0.3), (0.44, 0.3)],),
    ([(0.38, -0.7), (-0.38, -0.7), (-0.38, -0.06), (0.2, -0.06), *_octagon(0.31, 0.37, 1, 6)],),
    ([(0.38, -0.42), (0.16, -0.7), (-0.16, -0.7), (-0.4, -0.4), (-0.4, 0.3)], _octagon(0.32, 0.36)),
    ([(-0.4, -0.45), (-0.4, -0.7), (0.42, -0.7), (0.42, -0.5), (-0.1, 0.2), (-0.1, 0.7)],),
    (_octagon(-0.36, 0.32, rx=0.34), _octagon(0.33, 0.36)),
    (_octagon(-0.32, 0.36), [(0.4, -0.4), (0.4, 0.42), (0.2, 0.68), (-0.34, 0.7)]),
)
"""Lines of each digit with cut corners, as on a jersey."""


def _slanted(lines: tuple[Line, ...], slope: float) -> tuple[Line, ...]:
    return tuple([(x - slope * y, y) for x, y in line] for line in lines)


FONTS: dict[str, tuple[Sketch, ...]] = {
    "round": tuple(_sketch(0.1, *lines) for lines in ROUND),
    "segments": tuple(_sketch(0.09, *lines) for lines in SEGMENTS),
    "pen": tuple(_sketch(0.055, *_slanted(lines, 0.22)) for lines in PEN),
    "marker": tuple(_sketch(0.12, *_slanted(lines, 0.22)) for lines in PEN),
    "corners": tuple(_sketch(0.15, *lines) for lines in CORNERS),
}
"""Font -> the drawing of each digit."""

HANDS: dict[str, Hand] = {
    "round": Hand(jitter=0.045, rotation=0.12, shear=0.16, scale=0.14, thickness=0.4),
    "segments": Hand(jitter=0.02, rotation=0.1, shear=0.1, scale=0.16, thickness=0.35),
    "pen": Hand(jitter=0.05, rotation=0.12, shear=0.14, scale=0.14, thickness=0.3),
    "marker": Hand(jitter=0.05, rotation=0.12, shear=0.14, scale=0.14, thickness=0.25),
    "corners": Hand(jitter=0.02, rotation=0.08, shear=0.08, scale=0.14, thickness=0.3),
}
"""Font -> how much its drawings of one digit differ."""
