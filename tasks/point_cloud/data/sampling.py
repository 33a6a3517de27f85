# SPDX-License-Identifier: Apache-2.0
"""The sensor that CAD data sets imply: points spread evenly over all surfaces, nothing hidden, no noise."""

from __future__ import annotations

import numpy as np

from tasks.point_cloud.data.scene import CYLINDER, ELLIPSOID, GABLE, Floats, Ints, Scene
from tasks.point_cloud.data.sensors import RawScan

_FACES = 6


def sample_surfaces(scene: Scene, count: int, rng: np.random.Generator) -> RawScan:
    """Draw ``count`` points with uniform density over the surfaces inside ``scene.extent``.

    Faces that the room's own walls turn to the outside fall out of the extent; faces hidden inside or under furniture
    stay, as in meshes made by designers. Ellipsoids are drawn on the sphere and scaled, a little denser at their tips.
    Intensity is the plain albedo.

    Raises:
        ValueError: the scene holds gabled roofs, which this sampler does not know.
    """
    if (scene.kind == GABLE).any():
        raise ValueError("sample_surfaces knows boxes, cylinders and ellipsoids; cast rays at gabled roofs instead")
    x0, y0, x1, y1 = scene.extent
    areas = _areas(scene)
    ground_area = (x1 - x0) * (y1 - y0) if scene.ground is not None else 0.0
    weights = np.append(areas.reshape(-1), ground_area)
    # Faces outside the extent are thrown away, so draw until enough points are inside.
    parts: list[RawScan] = []
    have = 0
    while have < count:
        face = rng.choice(len(weights), size=count, p=weights / weights.sum())
        scan = _points(scene, face, rng)
        inside = (scan.pos[:, 0] >= x0 - 0.02) & (scan.pos[:, 0] <= x1 + 0.02) & (scan.pos[:, 2] <= scene.height + 0.02)
        inside &= (scan.pos[:, 1] >= y0 - 0.02) & (scan.pos[:, 1] <= y1 + 0.02)
        parts.append(RawScan(scan.pos[inside], scan.intensity[inside], scan.name[inside]))
        have += int(inside.sum())
    pos, light, name = (np.concatenate(c) for c in zip(*((p.pos, p.intensity, p.name) for p in parts), strict=True))
    return RawScan(pos[:count], light[:count], name[:count])


def _areas(scene: Scene) -> Floats:
    """[P, 6] areas: the six faces of a box; side, bottom, top of a cylinder; the whole ellipsoid first."""
    a, b, c = 2 * scene.half
    areas = np.stack([b * c, b * c, a * c, a * c, a * b, a * b], axis=1)
    round_ = scene.kind == CYLINDER
    disc = np.pi * scene.half[0] ** 2
    zero = np.zeros_like(disc)
    tube = np.stack([2 * np.pi * scene.half[0] * c, zero, zero, zero, disc, disc], axis=1)
    areas[round_] = tube[round_]
    egg = scene.kind == ELLIPSOID
    p = 1.6075  # Thomsen's approximation of an ellipsoid's area, within 1.1 per cent.
    x, y, z = scene.half
    mean = (((x * y) ** p + (x * z) ** p + (y * z) ** p) / 3) ** (1 / p)
    areas[egg] = np.stack([4 * np.pi * mean, zero, zero, zero, zero, zero], axis=1)[egg]
    return areas


def _points(scene: Scene, face: Ints, rng: np.random.Generator) -> RawScan:
    ground = face == scene.num_primitives * _FACES
    item, side = np.divmod(np.where(ground, 0, face), _FACES)
    half, kind = scene.half[:, item], scene.kind[item]
    local = rng.uniform(-1, 1, (3, len(face)))
    axis, sign = side // 2, np.where(side % 2 == 0, -1.0, 1.0)
    local[axis, np.arange(len(face))] = sign
    angle = rng.uniform(0, 2 * np.pi, len(face))
    tube = (kind == CYLINDER) & (side == 0)
    radius = np.where(tube, 1.0, np.sqrt(rng.random(len(face))))
    circle = np.stack([radius * np.cos(angle), radius * np.sin(angle)])
    flat = rng.uniform(-1, 1, len(face))
    cylinder = kind == CYLINDER
    local[:2, cylinder] = circle[:, cylinder]
    local[2, tube] = flat[tube]
    ball = rng.standard_normal((3, len(face)))
    ball /= np.linalg.norm(ball, axis=0)
    local = np.where(kind == ELLIPSOID, ball, local) * half
    c, s = scene.cos[item], scene.sin[item]
    x, y = local[0] * c - local[1] * s, local[0] * s + local[1] * c
    pos = np.stack([x, y, local[2]], axis=1) + scene.center[:, item].T
    up = (side == 5) & (kind != ELLIPSOID)
    name = np.where(up, scene.top[item], scene.name[item])
    light = scene.albedo[item].copy()
    if ground.any():
        x0, y0, x1, y1 = scene.extent
        spread = rng.random((int(ground.sum()), 2))
        pos[ground] = np.c_[x0 + spread[:, 0] * (x1 - x0), y0 + spread[:, 1] * (y1 - y0), np.zeros(len(spread))]
        name[ground], light[ground] = scene.ground_paint(pos[ground, 0], pos[ground, 1])
    return RawScan(pos.astype(np.float32), light.astype(np.float32), name)
