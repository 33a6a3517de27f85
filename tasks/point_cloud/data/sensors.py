# SPDX-License-Identifier: Apache-2.0
"""Sensor models: depth camera, panorama laser scanner, spinning lidar, aerial laser, and a perfect surface sampler.

Each ``scan_*`` function looks at a :class:`Scene` and returns a :class:`RawScan` in world coordinates.
The physics is standard; the numbers are typical of the sensor class and not those of one product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.point_cloud.data.raycast import Hits, cast
from tasks.point_cloud.data.scene import NAME_ID, Bools, Floats, Ints, Scene


@dataclass(frozen=True)
class RawScan:
    """Points of one scan.

    Attributes:
        pos: [R, 3] float32 metres.
        intensity: [R] float32; its unit is the sensor's own (luminance, remission 0-1, counts 0-255).
        name: [R] world name ids.
    """

    pos: Floats
    intensity: Floats
    name: Ints

    def __len__(self) -> int:
        return len(self.pos)


def join(scans: list[RawScan]) -> RawScan:
    """Concatenate scans of one scene."""
    return RawScan(
        np.concatenate([s.pos for s in scans]).astype(np.float32),
        np.concatenate([s.intensity for s in scans]).astype(np.float32),
        np.concatenate([s.name for s in scans]),
    )


def unit(vectors: Floats) -> Floats:
    """Normalise [N, 3] vectors."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def _cosine(hits: Hits, direction: Floats) -> Floats:
    return np.asarray(np.clip(-(hits.normal * direction).sum(1), 0, 1), np.float32)


# ---------------------------------------------------------------------------------------------- depth camera


@dataclass(frozen=True)
class DepthCamera:
    """A structured-light depth camera.

    Noise: axial sigma = scale (0.0012 + 0.0019 (z - 0.4)^2) m; disparity rounded to 1/8 pixel of the sensor's own
    resolution; pixels lost at grazing incidence and beside depth edges; every view posed a little wrong (ghosting).

    Attributes:
        width: pixels per row; ``height`` rows.
        fov: horizontal field of view, degrees (square pixels give the vertical one).
        near: nearest and ``far`` farthest depth, metres.
        noise: factor on the axial noise; 0 also switches rounding, losses and ghosting off.
        baseline_focal: baseline times focal length of the physical sensor, metre pixels (0.075 m x 580 px).
        pose_sigma: position error of a view, metres; its rotation error is 0.06 degrees per millimetre.
    """

    width: int = 96
    height: int = 72
    fov: float = 63.0
    near: float = 0.5
    far: float = 4.5
    noise: float = 1.0
    baseline_focal: float = 43.5
    pose_sigma: float = 0.005

    @property
    def focal(self) -> float:
        """Focal length in pixels of the rendered image."""
        return self.width / 2 / float(np.tan(np.radians(self.fov / 2)))

    def rays(self, yaw: float, pitch: float) -> tuple[Floats, Floats]:
        """Return unit rays [H W, 3] and cos of their angle to the optical axis [H W]."""
        u = (np.arange(self.width) + 0.5 - self.width / 2) / self.focal
        v = (np.arange(self.height) + 0.5 - self.height / 2) / self.focal
        vv, uu = np.meshgrid(v, u, indexing="ij")
        local = np.stack([np.ones_like(uu), -uu, -vv], axis=-1).reshape(-1, 3)
        cosine = 1 / np.linalg.norm(local, axis=1)
        return unit(local @ rotation(yaw, pitch).T), cosine.astype(np.float32)


def rotation(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Floats:
    """Rotation matrix Rz(yaw) Ry(-pitch) Rx(roll): positive pitch looks up. Angles in radians."""
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, -pitch, roll) for f in (np.cos, np.sin))
    rz = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    ry = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    rx = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return np.asarray(rz @ ry @ rx, np.float32)


def scan_depth_camera(
    scene: Scene, camera: DepthCamera, views: list[tuple[Floats, float, float]], rng: np.random.Generator
) -> RawScan:
    """Look at ``scene`` from ``views`` (position [3], yaw, pitch) and fuse the frames."""
    return join([_one_view(scene, camera, *view, rng) for view in views])


def _one_view(
    scene: Scene, camera: DepthCamera, position: Floats, yaw: float, pitch: float, rng: np.random.Generator
) -> RawScan:
    rays, axial = camera.rays(yaw, pitch)
    hits = cast(scene, position, rays, rng)
    depth = hits.distance * axial
    keep = hits.hit & (depth > camera.near) & (depth < camera.far)
    incidence = _cosine(hits, rays)
    shade = hits.albedo * (0.55 + 0.45 * incidence)
    luminance = shade + 0.02 * camera.noise * rng.standard_normal(len(shade))
    points = rays
    if camera.noise > 0:
        keep &= ~((incidence < 0.15) & (rng.random(len(depth)) < 0.8))
        keep &= ~(_depth_edges(depth, camera) & (rng.random(len(depth)) < 0.7))
        depth = depth + camera.noise * (0.0012 + 0.0019 * (depth - 0.4) ** 2) * rng.standard_normal(len(depth))
        step = 8 * camera.baseline_focal
        with np.errstate(divide="ignore", invalid="ignore"):
            depth = step / np.maximum(np.round(step / depth), 1)
        wobble = camera.pose_sigma * camera.noise
        angles = np.radians(60 * wobble) * rng.standard_normal(3)
        points = rays @ rotation(*angles.tolist()).T
        position = position + wobble * rng.standard_normal(3).astype(np.float32)
    pos = position + (depth / axial)[:, None] * points
    return RawScan(pos[keep].astype(np.float32), luminance[keep].astype(np.float32), hits.name[keep])


def _depth_edges(depth: Floats, camera: DepthCamera) -> Bools:
    """Mark pixels whose depth bends away from both neighbours' line: a slanted plane is no edge."""
    image = np.where(np.isfinite(depth), depth, 50.0).reshape(camera.height, camera.width)
    bend = np.zeros_like(image)
    bend[1:-1] = np.abs(image[2:] - 2 * image[1:-1] + image[:-2])
    bend[:, 1:-1] = np.maximum(bend[:, 1:-1], np.abs(image[:, 2:] - 2 * image[:, 1:-1] + image[:, :-2]))
    return (bend > 0.08 + 0.05 * image).reshape(-1)


# ------------------------------------------------------------------------------------ panorama laser scanner


@dataclass(frozen=True)
class PanoramaScanner:
    """A terrestrial laser scanner on a tripod.

    Attributes:
        step: angular step in azimuth and elevation, degrees.
        low: lowest and ``high`` highest elevation, degrees.
        sigma: range noise, metres.
        mixed_prob: share of edge beams that return a range between the two surfaces.
        glass_prob: share of beams on windows that do not come back.
    """

    step: float = 1.4
    low: float = -60.0
    high: float = 88.0
    sigma: float = 0.002
    mixed_prob: float = 0.3
    glass_prob: float = 0.7

    def rays(self) -> tuple[Floats, tuple[int, int]]:
        """Return unit rays and the (elevations, azimuths) shape of the grid."""
        elevation = np.radians(np.arange(self.low, self.high, self.step))
        azimuth = np.radians(np.arange(0, 360, self.step))
        return spherical_rays(elevation, azimuth), (len(elevation), len(azimuth))


def spherical_rays(elevation: npt.ArrayLike, azimuth: npt.ArrayLike) -> Floats:
    """Unit rays [len(elevation) len(azimuth), 3] of a spherical grid, angles in radians."""
    e, a = np.meshgrid(elevation, azimuth, indexing="ij")
    rays = np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], axis=-1)
    return rays.reshape(-1, 3).astype(np.float32)


def scan_panorama(scene: Scene, scanner: PanoramaScanner, stations: list[Floats], rng: np.random.Generator) -> RawScan:
    """Scan ``scene`` from tripod ``stations`` [3]; intensity = albedo cos(incidence) in [0, 1]."""
    rays, shape = scanner.rays()
    scans = []
    for station in stations:
        hits = cast(scene, station, rays, rng)
        distance = hits.distance.copy()
        keep = hits.hit & ~((hits.name == NAME_ID["window"]) & (rng.random(len(rays)) < scanner.glass_prob))
        grid = distance.reshape(shape)
        beside = np.roll(grid, -1, axis=1).reshape(-1)
        with np.errstate(invalid="ignore"):
            edge = np.isfinite(distance) & np.isfinite(beside) & (np.abs(distance - beside) > 0.2)
        mixed = edge & (rng.random(len(rays)) < scanner.mixed_prob)
        share = rng.random(int(mixed.sum())).astype(np.float32)
        distance[mixed] = share * distance[mixed] + (1 - share) * beside[mixed]
        distance += scanner.sigma * rng.standard_normal(len(rays)).astype(np.float32)
        light = hits.albedo * np.sqrt(_cosine(hits, rays)) * (1 + 0.05 * rng.standard_normal(len(rays)))
        pos = station + distance[keep, None] * rays[keep]
        scans.append(RawScan(pos.astype(np.float32), light[keep].astype(np.float32), hits.name[keep]))
    return join(scans)


# ---------------------------------------------------------------------------------------------- spinning lidar


@dataclass(frozen=True)
class SpinningLidar:
    """A multi-beam lidar on a vehicle's roof.

    Attributes:
        beams: number of beams between elevations ``low`` and ``high``, degrees.
        azimuth_step: degrees between firings.
        fov: horizontal field of view around straight ahead, degrees.
        height: metres above the road.
        max_range: metres.
        sigma: range noise, metres.
        keep_prob: probability of a return at range 0; it falls as exp(-r / decay).
        decay: metres.
        gain: full scale of the intensity (1 or 255).
    """

    beams: int = 64
    low: float = -24.8
    high: float = 2.0
    azimuth_step: float = 0.72
    fov: float = 360.0
    height: float = 1.73
    max_range: float = 80.0
    sigma: float = 0.02
    keep_prob: float = 0.97
    decay: float = 120.0
    gain: float = 1.0

    def rays(self) -> Floats:
        """Return unit rays [beams x azimuths, 3]."""
        elevation = np.radians(np.linspace(self.low, self.high, self.beams))
        azimuth = np.radians(np.arange(-self.fov / 2, self.fov / 2, self.azimuth_step))
        return spherical_rays(elevation, azimuth)


def scan_spinning(
    scene: Scene, lidar: SpinningLidar, position: Floats, yaw: float, rng: np.random.Generator
) -> RawScan:
    """Take one sweep from the road point ``position`` [2]; intensity = gain albedo cos(incidence)."""
    origin = np.array([position[0], position[1], lidar.height], np.float32)
    rays = lidar.rays() @ rotation(yaw).T
    hits = cast(scene, origin, rays, rng, t_min=1.5, t_max=lidar.max_range)
    reached = np.where(hits.hit, hits.distance, 0)
    keep = hits.hit & (rng.random(len(rays)) < lidar.keep_prob * np.exp(-reached / lidar.decay))
    distance = reached + lidar.sigma * rng.standard_normal(len(rays)).astype(np.float32)
    light = lidar.gain * np.clip(hits.albedo * _cosine(hits, rays) + 0.02 * rng.standard_normal(len(rays)), 0, 1)
    pos = origin + distance[keep, None] * rays[keep]
    return RawScan(pos.astype(np.float32), light[keep].astype(np.float32), hits.name[keep])


# ------------------------------------------------------------------------------------------------- aerial laser


@dataclass(frozen=True)
class AerialLaser:
    """An airborne laser over a tile of ground.

    Attributes:
        density: pulses per square metre.
        tilt: largest scan angle, degrees; each of the two overlapping strips has its own.
        sigma: range noise, metres.
        returns: echoes kept per pulse.
        pass_prob: probability that enough of the pulse passes a leaf to make another echo.
        start: metres above ground where the rays begin (only geometry below counts).
    """

    density: float = 20.0
    tilt: float = 18.0
    sigma: float = 0.03
    returns: int = 3
    pass_prob: float = 0.7
    start: float = 40.0


def scan_aerial(scene: Scene, laser: AerialLaser, rng: np.random.Generator) -> RawScan:
    """Fly two overlapping strips over ``scene.extent``; intensity falls with every echo of a pulse."""
    x0, y0, x1, y1 = scene.extent
    cut = x0 + (x1 - x0) * rng.uniform(0.2, 0.8)
    overlap = 0.06 * (x1 - x0)
    strips = [(x0, cut + overlap), (cut - overlap, x1)]
    scans = [_strip(scene, laser, (low, y0, high, y1), rng) for low, high in strips]
    scan = join(scans)
    inside = (scan.pos[:, :2] > (x0, y0)).all(1) & (scan.pos[:, :2] < (x1, y1)).all(1)
    return RawScan(scan.pos[inside], scan.intensity[inside], scan.name[inside])


def _strip(
    scene: Scene, laser: AerialLaser, area: tuple[float, float, float, float], rng: np.random.Generator
) -> RawScan:
    angle = np.radians(laser.tilt) * rng.uniform(0.1, 1)
    heading = rng.uniform(0, 2 * np.pi)
    down = np.array([np.sin(angle) * np.cos(heading), np.sin(angle) * np.sin(heading), -np.cos(angle)], np.float32)
    spacing = laser.density**-0.5
    x, y = np.meshgrid(np.arange(area[0], area[2], spacing), np.arange(area[1], area[3], spacing), indexing="ij")
    foot = np.stack([x.reshape(-1), y.reshape(-1)], 1) + rng.normal(0, 0.15 * spacing, (x.size, 2))
    rays = unit(down + rng.normal(0, 0.004, (len(foot), 3)).astype(np.float32))
    origin = np.empty((len(foot), 3), np.float32)
    # Aim at the footprint at roof height, so that strips cover the tile whatever their tilt.
    origin[:, :2] = foot - rays[:, :2] / -rays[:, 2:] * (laser.start - 4)
    origin[:, 2] = laser.start
    scans, energy = [], np.ones(len(foot), np.float32)
    for _ in range(laser.returns):
        hits = cast(scene, origin, rays, rng, t_min=0.3)
        hit = hits.hit
        distance = hits.distance[hit] + laser.sigma * rng.standard_normal(int(hit.sum()))
        pos = np.asarray(origin[hit] + distance[:, None] * rays[hit], np.float32)
        leaf = hits.name == NAME_ID["vegetation"]
        share = np.where(leaf, rng.uniform(0.25, 0.8, len(leaf)), 1.0) * energy
        light = share * hits.albedo * np.sqrt(_cosine(hits, rays)) * (1 + 0.1 * rng.standard_normal(len(leaf)))
        scans.append(RawScan(pos, np.clip(light, 0, None)[hit].astype(np.float32), hits.name[hit]))
        on = hit & leaf & (rng.random(len(leaf)) < laser.pass_prob)
        origin = (origin + np.where(hit, hits.distance, 0)[:, None] * rays)[on]
        rays, energy = rays[on], (energy * (1 - 0.6 * share))[on]
        if not on.any():
            break
    return join(scans)
