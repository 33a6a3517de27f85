# SPDX-License-Identifier: Apache-2.0
"""The nine simulated domains: the sensor, the world and the label set of each."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tasks.point_cloud.data import rooms, streets, towns
from tasks.point_cloud.data.features import normal_z
from tasks.point_cloud.data.labels import WORLD_NAMES, WORLD_TO_LABEL
from tasks.point_cloud.data.sampling import sample_surfaces
from tasks.point_cloud.data.scans import ScanArrays
from tasks.point_cloud.data.scene import Scene
from tasks.point_cloud.data.sensors import (
    AerialLaser,
    DepthCamera,
    PanoramaScanner,
    RawScan,
    SpinningLidar,
    rotation,
    scan_aerial,
    scan_depth_camera,
    scan_panorama,
    scan_spinning,
)

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
GENERATOR_VERSION = 3
"""Part of the cache key: raise it when the same configuration gives other points."""


@dataclass(frozen=True)
class SurfaceSampler:
    """Points spread evenly over all surfaces, without occlusion or noise.

    Attributes:
        points: points per scene.
    """

    points: int = 16000


@dataclass(frozen=True)
class DomainSpec:
    """One simulated domain.

    Attributes:
        name: domain name, key of its label set.
        world: what is there.
        sensor: what looks at it.
        voxel: voxel edge that suits the point spacing, metres.
        views: camera poses or tripod stations per scene.
        slope: largest slope of the ground under a vehicle, degrees.
        indoor: rooms (True) or open air.
    """

    name: str
    world: rooms.RoomWorld | streets.StreetWorld | towns.TownWorld
    sensor: DepthCamera | PanoramaScanner | SpinningLidar | AerialLaser | SurfaceSampler
    voxel: float
    views: int = 1
    slope: float = 0.0
    indoor: bool = False


_LIVING = {"bed": 1, "sofa": 1, "table": 2, "cabinet": 3, "chair": 6}
_OFFICE = {"table": 4, "cabinet": 1, "shelves": 1, "chair": 7, "clutter": 5}
_CAD = {"bed": 1, "sofa": 1, "shelves": 2, "cabinet": 2, "nightstand": 2, "table": 2, "chair": 5, "lamp": 3}
_HOUSE = {
    "bed": 1,
    "sofa": 1,
    "cabinet": 2,
    "shelves": 1,
    "table": 2,
    "nightstand": 1,
    "chair": 6,
    "lamp": 2,
    "clutter": 4,
}

DOMAINS: dict[str, DomainSpec] = {
    spec.name: spec
    for spec in (
        DomainSpec(
            "rgbd_room", rooms.RoomWorld((4.0, 6.5), furniture=_LIVING), DepthCamera(80, 60), 0.10, views=6, indoor=True
        ),
        DomainSpec(
            "tls_office",
            rooms.RoomWorld((5.5, 8.0), (2.8, 3.3), _OFFICE, doors=3, windows=4, boards=3, beams=3, columns=2),
            PanoramaScanner(step=1.7),
            0.10,
            views=2,
            indoor=True,
        ),
        DomainSpec(
            "cad_room",
            rooms.RoomWorld((4.0, 7.0), (2.5, 3.2), _CAD, doors=2, windows=3),
            SurfaceSampler(),
            0.10,
            indoor=True,
        ),
        DomainSpec("drive64", streets.StreetWorld(), SpinningLidar(), 0.30),
        DomainSpec(
            "drive32",
            streets.StreetWorld(parking=False, works=True),
            SpinningLidar(32, -30.7, 10.7, 0.5, height=1.84, max_range=70.0, gain=255.0),
            0.30,
        ),
        DomainSpec("als", towns.TownWorld(), AerialLaser(), 0.45),
        DomainSpec(
            "drive16",
            streets.StreetWorld(),
            SpinningLidar(16, -15.0, 15.0, 0.4, height=1.9, max_range=60.0, sigma=0.03),
            0.30,
        ),
        DomainSpec(
            "rgbd_house",
            rooms.RoomWorld((4.5, 7.5), (2.4, 3.0), _HOUSE, doors=3),
            DepthCamera(96, 72, 75.0, noise=2.0),
            0.10,
            views=6,
            indoor=True,
        ),
        DomainSpec(
            "drive_front",
            streets.StreetWorld(curb=(0.2, 0.3)),
            SpinningLidar(64, -17.6, 2.4, 0.3, fov=120.0, height=2.2, max_range=75.0),
            0.30,
            slope=4.0,
        ),
    )
}
SEEN = ("rgbd_room", "tls_office", "cad_room", "drive64", "drive32", "als")
VALIDATION = ("drive16",)
UNSEEN = ("rgbd_house", "drive_front")


def scene_seed(base: int, domain: str, split: Split, index: int) -> tuple[int, int, int, int]:
    """Return the seed of one scene; no two scenes of any domain or split share one."""
    return base, zlib.crc32(domain.encode()), SPLITS.index(split), index


def build_world(spec: DomainSpec, rng: np.random.Generator) -> tuple[DomainSpec, Scene]:
    """Build the scene of ``spec``; an aerial survey's density is part of its tile and goes into the sensor."""
    if isinstance(spec.world, rooms.RoomWorld):
        return spec, rooms.build_room(spec.world, rng)
    if isinstance(spec.world, streets.StreetWorld):
        return spec, streets.build_street(spec.world, rng)
    scene, density = towns.build_town(spec.world, rng)
    if isinstance(spec.sensor, AerialLaser):
        spec = replace(spec, sensor=replace(spec.sensor, density=density))
    return spec, scene


def look(spec: DomainSpec, scene: Scene, rng: np.random.Generator) -> RawScan:
    """Point the sensor of ``spec`` at ``scene``."""
    sensor = spec.sensor
    if isinstance(sensor, DepthCamera):
        return scan_depth_camera(scene, sensor, rooms.camera_views(scene, spec.views, rng), rng)
    if isinstance(sensor, PanoramaScanner):
        return scan_panorama(scene, sensor, rooms.stations(scene, spec.views, rng), rng)
    if isinstance(sensor, SurfaceSampler):
        return sample_surfaces(scene, sensor.points, rng)
    if isinstance(sensor, AerialLaser):
        return scan_aerial(scene, sensor, rng)
    where = np.array([rng.uniform(-2, 2), rng.uniform(-2.0, 2.0)], np.float32)
    return scan_spinning(scene, sensor, where, float(rng.choice([0.0, np.pi]) + rng.normal(0, 0.05)), rng)


def generate_scan(spec: DomainSpec, seed: tuple[int, ...]) -> ScanArrays:
    """Generate one labelled scan.

    World and sensor draw from separate streams: two specs with equal worlds and one seed see the same scene.

    Args:
        spec: the domain.
        seed: integers, e.g. from :func:`scene_seed`.
    """
    spec, scene = build_world(spec, np.random.default_rng((*seed, 0)))
    rng = np.random.default_rng((*seed, 1))
    scan = look(spec, scene, rng)
    pos = scan.pos
    if isinstance(spec.world, towns.TownWorld):
        pos = pos + np.array([[0, 0, 1]], np.float32) * towns.relief(spec.world, rng)(pos)[:, None]
    if spec.slope:
        # The vehicle and the street share one slope: turned as a whole, sensor geometry stays exact.
        pos = pos @ rotation(0.0, *np.radians(rng.uniform(-spec.slope, spec.slope, 2)).tolist()).T
    pos = pos @ rotation(float(rng.uniform(-np.pi, np.pi))).T
    pos = pos - np.array([*((pos[:, :2].min(0) + pos[:, :2].max(0)) / 2), 0], np.float32)
    labels = WORLD_TO_LABEL[spec.name]
    words = sorted(set(labels.values()))
    table = np.array([words.index(labels[name]) if name in labels else 255 for name in WORLD_NAMES], np.uint8)
    return ScanArrays(
        name=f"{spec.name}-{'-'.join(str(part) for part in seed)}",
        pos=pos.astype(np.float32),
        light=scan.intensity,
        up=normal_z(pos, spec.voxel),
        label=table[scan.name],
        words=tuple(words),
    )


def generate_split(
    spec: DomainSpec, split: Split, count: int, base_seed: int, advance: Callable[[], object] | None = None
) -> list[ScanArrays]:
    """Generate all scans of one split, two at a time.

    Threads suffice: the work is numpy on large arrays, which releases the interpreter. The result does not depend on
    their number, since every scan has a seed of its own.

    Args:
        spec: the domain.
        split: train, val or test.
        count: number of scans.
        base_seed: seed of the whole data set.
        advance: called after each scan, for a progress bar.
    """

    def one(index: int) -> ScanArrays:
        scan = generate_scan(spec, scene_seed(base_seed, spec.name, split, index))
        if advance is not None:
            advance()
        return scan

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(count)))
