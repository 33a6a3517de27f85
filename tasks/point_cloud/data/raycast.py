# SPDX-License-Identifier: Apache-2.0
"""A vectorised ray caster for scenes of convex primitives.

Every primitive is convex: a ray x = o + t d is inside it for t in [near, far]. A solid is hit at t = near. A porous
volume of density rho (foliage) is hit at t = near + s, where s is exponential with mean 1/rho, if that lies before far:
a Poisson process along the path, so overlapping volumes add up as they should.

Rays meet bounding spheres first (one matrix product per chunk); only the surviving (ray, primitive) pairs are tested.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tasks.point_cloud.data.scene import BOX, CYLINDER, ELLIPSOID, GABLE, Bools, Floats, Ints, Scene

_FAR = np.float32(np.inf)
GROUND = -1
MISS = -2


@dataclass(frozen=True)
class Hits:
    """First hits of N rays.

    Attributes:
        distance: [N] metres along the ray, inf where nothing was hit.
        primitive: [N] index of the primitive, GROUND or MISS.
        name: [N] world name id, -1 where nothing was hit.
        normal: [N, 3] unit normal that looks against the ray; foliage: minus the ray.
        albedo: [N] reflectance.
    """

    distance: Floats
    primitive: Ints
    name: Ints
    normal: Floats
    albedo: Floats

    @property
    def hit(self) -> Bools:
        """[N] true where the ray hit something."""
        return np.asarray(self.primitive != MISS)


def cast(
    scene: Scene,
    origin: Floats,
    direction: Floats,
    rng: np.random.Generator,
    *,
    t_min: float = 0.05,
    t_max: float = 500.0,
    chunk: int = 4096,
) -> Hits:
    """Find the first hit of every ray.

    Args:
        scene: what to look at.
        origin: [3] or [N, 3] starting points.
        direction: [N, 3] unit vectors.
        rng: used for foliage only.
        t_min: nearest distance that counts, metres.
        t_max: farthest distance that counts, metres.
        chunk: rays per pass; a pass over P primitives works on chunk x P numbers, which should stay in cache.

    Returns:
        the hits, in the order of the rays.
    """
    direction = np.ascontiguousarray(direction, np.float32)
    origin = np.asarray(origin, np.float32)
    count = len(direction)
    distance = np.full(count, _FAR, np.float32)
    primitive = np.full(count, MISS, np.int64)
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        o = origin if origin.ndim == 1 else origin[part]
        distance[part], primitive[part] = _cast_chunk(scene, o, direction[part], rng, t_min, t_max)
    return _describe(scene, origin, direction, distance, primitive)


def _cast_chunk(
    scene: Scene, o: Floats, d: Floats, rng: np.random.Generator, t_min: float, t_max: float
) -> tuple[Floats, Ints]:
    distance = np.full(len(d), _FAR, np.float32)
    primitive = np.full(len(d), MISS, np.int64)
    if scene.ground is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (-o[..., 2] / d[:, 2]).astype(np.float32)
        good = (t > t_min) & (t < t_max)
        distance[good] = t[good]
        primitive[good] = GROUND
    if scene.num_primitives == 0:
        return distance, primitive
    ray, index = _candidates(scene, o, d, t_max)
    if len(ray) == 0:
        return distance, primitive
    t = _entry(scene, o, d, ray, index, rng, t_min, t_max)
    starts = np.flatnonzero(np.diff(ray, prepend=-1))
    best = np.minimum.reduceat(t, starts)
    owner = ray[starts]
    lengths = np.diff(starts, append=len(ray))
    won = (t == np.repeat(best, lengths)) & (t < distance[ray])
    distance[owner] = np.minimum(distance[owner], best)
    primitive[ray[won]] = index[won]
    return distance, primitive


def _candidates(scene: Scene, o: Floats, d: Floats, t_max: float) -> tuple[Ints, Ints]:
    """Return (ray, primitive) pairs, sorted by ray, whose bounding spheres the rays touch."""
    centers = scene.center
    radius = np.sqrt((scene.half**2).sum(0))
    radius[scene.kind == ELLIPSOID] = scene.half.max(0)[scene.kind == ELLIPSOID]
    o2 = np.atleast_2d(o)
    along = d @ centers - (d * o2).sum(1, keepdims=True)
    apart = (centers**2).sum(0) - 2 * (o2 @ centers) + (o2**2).sum(1, keepdims=True)
    touched = apart - along * along <= radius**2 + 1e-3
    touched &= along > -radius
    touched &= along < t_max + radius
    flat = np.flatnonzero(touched)
    ray = flat // scene.num_primitives
    return ray, flat - ray * scene.num_primitives


def _local(scene: Scene, index: Ints, vector: Floats) -> Floats:
    """Turn vectors [3, M] into the frames of primitives ``index``."""
    c, s = scene.cos[index], scene.sin[index]
    return np.stack([vector[0] * c + vector[1] * s, vector[1] * c - vector[0] * s, vector[2]])


def _entry(
    scene: Scene, o: Floats, d: Floats, ray: Ints, index: Ints, rng: np.random.Generator, t_min: float, t_max: float
) -> Floats:
    """Return [M] hit distances of (ray, primitive) pairs, inf where they miss."""
    start = o[:, None] if o.ndim == 1 else o[ray].T
    near = np.full(len(ray), _FAR, np.float32)
    far = np.full(len(ray), -_FAR, np.float32)
    kind = scene.kind[index]
    for which, interval in ((BOX, _box), (GABLE, _gable), (CYLINDER, _cylinder), (ELLIPSOID, _ellipsoid)):
        rows = np.flatnonzero(kind == which)
        if len(rows) == 0:
            continue
        item = index[rows]
        begin = start if start.shape[1] == 1 else start[:, rows]
        local_o = _local(scene, item, begin - scene.center[:, item])
        local_d = _local(scene, item, d[ray[rows]].T)
        near[rows], far[rows] = interval(local_o, local_d, scene.half[:, item])
    density = scene.density[index]
    porous = density > 0
    t = near
    t[porous] = (
        np.maximum(near[porous], t_min) + rng.exponential(size=int(porous.sum())).astype(np.float32) / density[porous]
    )
    return np.where((t < far) & (t > t_min) & (t < t_max), t, _FAR)


def _safe(d: Floats) -> Floats:
    return np.where(np.abs(d) < 1e-9, np.float32(1e-9), d)


def _box(o: Floats, d: Floats, half: Floats) -> tuple[Floats, Floats]:
    inverse = 1 / _safe(d)
    middle, reach = -o * inverse, half * np.abs(inverse)
    return (middle - reach).max(0), (middle + reach).min(0)


def _gable(o: Floats, d: Floats, half: Floats) -> tuple[Floats, Floats]:
    """A box cut by the two roof planes |y| / hy + (z + hz) / (2 hz) <= 1."""
    near, far = _box(o, d, half)
    for side in (-1.0, 1.0):
        offset = side * o[1] / half[1] + (o[2] + half[2]) / (2 * half[2]) - 1
        slope = _safe(side * d[1] / half[1] + d[2] / (2 * half[2]))
        t = -offset / slope
        near = np.where(slope < 0, np.maximum(near, t), near)
        far = np.where(slope > 0, np.minimum(far, t), far)
    return near, far


def _round(o: Floats, d: Floats, radius: Floats | float) -> tuple[Floats, Floats]:
    """Interval of |o + t d| <= radius.

    Solved around the closest approach: the plain quadratic formula loses a thin pole at 80 m to float32 cancellation.
    """
    a = np.maximum((d * d).sum(0), np.float32(1e-12))
    closest = -(o * d).sum(0) / a
    foot = o + closest * d
    slack = radius**2 - (foot * foot).sum(0)
    reach = np.sqrt(np.maximum(slack, 0) / a)
    return np.where(slack < 0, _FAR, closest - reach), np.where(slack < 0, -_FAR, closest + reach)


def _cylinder(o: Floats, d: Floats, half: Floats) -> tuple[Floats, Floats]:
    near, far = _round(o[:2], d[:2], half[0])
    inverse = 1 / _safe(d[2])
    middle, reach = -o[2] * inverse, half[2] * np.abs(inverse)
    return np.maximum(near, middle - reach), np.minimum(far, middle + reach)


def _ellipsoid(o: Floats, d: Floats, half: Floats) -> tuple[Floats, Floats]:
    return _round(o / half, d / half, 1.0)


def _describe(scene: Scene, origin: Floats, direction: Floats, distance: Floats, primitive: Ints) -> Hits:
    """Look up names, albedos and normals of the winners."""
    count = len(direction)
    name = np.full(count, -1, np.int64)
    albedo = np.zeros(count, np.float32)
    normal = np.zeros((count, 3), np.float32)
    ground = np.flatnonzero(primitive == GROUND)
    origins = origin if origin.ndim == 2 else np.broadcast_to(origin, (count, 3))
    if len(ground):
        at = origins[ground] + distance[ground, None] * direction[ground]
        name[ground], albedo[ground] = scene.ground_paint(at[:, 0], at[:, 1])
        normal[ground, 2] = np.sign(-direction[ground, 2])
    solid = np.flatnonzero(primitive >= 0)
    if len(solid):
        item = primitive[solid]
        at = origins[solid] + distance[solid, None] * direction[solid]
        normal[solid] = surface_normal(scene, item, at, direction[solid])
        up = normal[solid, 2] > 0.7
        name[solid] = np.where(up, scene.top[item], scene.name[item])
        albedo[solid] = scene.albedo[item]
    return Hits(distance, primitive, name, normal, albedo)


def surface_normal(scene: Scene, item: Ints, at: Floats, direction: Floats) -> Floats:
    """Return [M, 3] outward normals of primitives ``item`` at surface points ``at``."""
    local = _local(scene, item, at.T - scene.center[:, item])
    half, kind = scene.half[:, item], scene.kind[item]
    columns = np.arange(len(item))
    share = np.abs(local) / half
    roof = share[1] + (local[2] + half[2]) / (2 * half[2])
    is_gable = kind == GABLE
    share[1, is_gable] = 0
    share[2, is_gable] = -local[2, is_gable] / half[2, is_gable]
    face = np.zeros_like(local)
    axis = share.argmax(0)
    face[axis, columns] = np.sign(local[axis, columns])
    on_roof = is_gable & (roof > share.max(0))
    slope = np.stack([np.zeros_like(roof), np.sign(local[1]) / half[1], 0.5 / half[2]])
    face = np.where(on_roof, slope, face)
    radial = np.stack([local[0], local[1], np.zeros_like(roof)])
    side = (kind == CYLINDER) & (np.abs(local[2]) < half[2] * 0.9999)
    face = np.where(side, radial, face)
    cap = (kind == CYLINDER) & ~side
    face = np.where(cap, np.stack([0 * roof, 0 * roof, np.sign(local[2])]), face)
    face = np.where(kind == ELLIPSOID, local / half**2, face)
    face /= np.maximum(np.sqrt((face * face).sum(0)), 1e-12)
    c, s = scene.cos[item], scene.sin[item]
    world = np.stack([face[0] * c - face[1] * s, face[0] * s + face[1] * c, face[2]], axis=1)
    return np.where((scene.density[item] > 0)[:, None], -direction, world)
