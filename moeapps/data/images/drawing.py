# SPDX-License-Identifier: Apache-2.0
"""Draw sketches made of tapered strokes and quadrilaterals, many at a time, by their signed distances.

The canvas is [-1, 1] x [-1, 1], x to the right, y DOWN. Shape legend: n images, V points, P strokes or quadrilaterals,
G pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Point = tuple[float, float]
_CHUNK = 256


@dataclass
class Sketch:
    """The drawing of one class, built by `stroke` and `quad`.

    Attributes:
        points: coordinates of all points.
        radii: half the thickness of a stroke at each point.
        strokes: pairs of points.
        quads: quadruples of points, each convex, in either sense of rotation.
    """

    points: list[Point] = field(default_factory=list)
    radii: list[float] = field(default_factory=list)
    strokes: list[tuple[int, int]] = field(default_factory=list)
    quads: list[tuple[int, int, int, int]] = field(default_factory=list)

    def stroke(self, points: Sequence[Point], *radii: float) -> Sketch:
        """Add a line through points; one radius for all of it, or one for each point."""
        start = len(self.points)
        self.points += points
        self.radii += radii if len(radii) > 1 else [*radii] * len(points)
        self.strokes += [(start + i, start + i + 1) for i in range(len(points) - 1)]
        return self

    def quad(self, a: Point, b: Point, c: Point, d: Point) -> Sketch:
        """Add a filled convex quadrilateral."""
        start = len(self.points)
        self.points += [a, b, c, d]
        self.radii += [0.0] * 4
        self.quads.append((start, start + 1, start + 2, start + 3))
        return self


def arc(cx: float, cy: float, rx: float, ry: float, first: float, last: float, num: int = 9) -> list[Point]:
    """Points on an ellipse from angle ``first`` to ``last``, degrees; 0 is right, 90 is down."""
    angles = [math.radians(first + (last - first) * i / (num - 1)) for i in range(num)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


@dataclass(frozen=True)
class Hand:
    """How much drawings of one class differ.

    Args:
        jitter: standard deviation of each point.
        rotation: standard deviation of the angle, radians.
        shear: standard deviation of the slant.
        scale: half the range of the size about 0.9.
        shift: half the range of the place.
        thickness: half the range of the relative thickness of strokes.
        mirror: probability of a left-right mirror image.
        shade: least grey of the inside, 1 is white.
        gradient: most that the grey falls from top to bottom or rises.
    """

    jitter: float = 0.03
    rotation: float = 0.1
    shear: float = 0.1
    scale: float = 0.12
    shift: float = 0.08
    thickness: float = 0.25
    mirror: float = 0.0
    shade: float = 1.0
    gradient: float = 0.0


def draw(sketch: Sketch, hand: Hand, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` variants of a sketch.

    Returns:
        uint8 [count, 1, size, size], white on black.
    """
    parts = [
        _draw(sketch, hand, min(_CHUNK, count - start), size, generator) for start in range(0, max(count, 1), _CHUNK)
    ]
    return torch.cat(parts)[:count]


def _draw(sketch: Sketch, hand: Hand, n: int, size: int, generator: torch.Generator) -> Tensor:
    u = torch.rand(8, n, 1, generator=generator) * 2 - 1  # eight numbers per image in [-1, 1]
    z = torch.randn(2, n, 1, generator=generator)
    points = torch.tensor(sketch.points).expand(n, -1, -1)
    points = points + hand.jitter * torch.randn(points.shape, generator=generator)
    scale = 0.9 + hand.scale * u[0]
    x, y = (points * scale[..., None]).unbind(-1)  # (n, V)
    x = x + hand.shear * z[0] * y
    x = torch.where(u[1] < 2 * hand.mirror - 1, -x, x)
    cos, sin = (hand.rotation * z[1]).cos(), (hand.rotation * z[1]).sin()
    x, y = cos * x - sin * y + hand.shift * u[2], sin * x + cos * y + hand.shift * u[3]
    points = torch.stack([x, y], dim=-1)  # (n, V, 2)
    radii = torch.tensor(sketch.radii) * scale * (1 + hand.thickness * u[4])  # (n, V)

    pixel = 2 / size
    axis = (torch.arange(size) + 0.5) * pixel - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2)  # (G, 2)
    distance = torch.full((n, len(grid)), 10.0)
    for a, b in sketch.strokes:
        distance = torch.minimum(distance, _stroke(grid, points[:, a], points[:, b], radii[:, a], radii[:, b]))
    for corners in sketch.quads:
        distance = torch.minimum(distance, _quad(grid, points[:, list(corners)]))
    cover = (0.5 - distance / pixel).clamp(0, 1)  # one pixel of anti-aliasing
    grey = 1 - (1 - hand.shade) * (0.5 + 0.5 * u[5]) + hand.gradient * u[6] * grid[:, 1]
    return (255 * cover * grey.clamp(0.15, 1)).round().to(torch.uint8).view(n, 1, size, size)


def _stroke(grid: Tensor, a: Tensor, b: Tensor, ra: Tensor, rb: Tensor) -> Tensor:
    """Distance (n, G) to the segment a b, less a radius that runs from ra to rb (n,) along it."""
    along = (b - a)[:, None]  # (n, 1, 2)
    from_a = grid - a[:, None]  # (n, G, 2)
    t = ((from_a * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)).clamp(0, 1)  # (n, G)
    gap: Tensor = (from_a - t[..., None] * along).square().sum(-1).sqrt()
    return gap - (ra[:, None] + t * (rb - ra)[:, None])


def _quad(grid: Tensor, corners: Tensor) -> Tensor:
    """Greatest signed distance (n, G) to the four sides of convex quadrilaterals (n, 4, 2), negative inside."""
    side = corners.roll(-1, dims=1) - corners  # (n, 4, 2)
    normal = torch.stack([side[..., 1], -side[..., 0]], dim=-1)
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    normal = normal * ((corners - corners.mean(1, keepdim=True)) * normal).sum(-1, keepdim=True).sign()  # outwards
    offset = (corners * normal).sum(-1)  # (n, 4)
    farthest: Tensor = (normal @ grid.T - offset[:, :, None]).amax(1)
    return farthest
