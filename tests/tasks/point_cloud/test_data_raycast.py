# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from tasks.point_cloud.data.raycast import GROUND, MISS, cast
from tasks.point_cloud.data.scene import NAME_ID, Floats, SceneBuilder
from tasks.point_cloud.data.sensors import (
    AerialLaser,
    DepthCamera,
    PanoramaScanner,
    SpinningLidar,
    scan_aerial,
    scan_depth_camera,
    scan_panorama,
    scan_spinning,
    unit,
)


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _sphere_rays(count: int) -> Floats:
    return unit(_rng().standard_normal((count, 3)))


def test_range_to_the_ground_is_height_over_sine_of_depression() -> None:
    rays = _sphere_rays(500)
    hits = cast(SceneBuilder("road").build(), np.array([3, 4, 2.5]), rays, _rng(), t_max=1e6)

    down = rays[:, 2] < -1e-3
    np.testing.assert_allclose(hits.distance[down], 2.5 / -rays[down, 2], rtol=1e-5)
    assert (hits.primitive[down] == GROUND).all()
    assert (hits.primitive[rays[:, 2] > 0] == MISS).all()


def test_box_faces_lie_where_they_were_put() -> None:
    builder = SceneBuilder()
    builder.at(5, 0, yaw=0.0).box("wall", (0, 0, -1), (2, 3, 4))
    hits = cast(builder.build(), np.zeros(3), np.array([[1, 0, 0], [-1, 0, 0]]), _rng())

    assert hits.distance[0] == pytest.approx(4.0)
    np.testing.assert_allclose(hits.normal[0], [-1, 0, 0], atol=1e-6)
    assert hits.primitive[1] == MISS


def test_turning_scene_and_rays_together_changes_no_distance() -> None:
    def look(yaw: float) -> Floats:
        builder = SceneBuilder()
        c, s = np.cos(yaw), np.sin(yaw)
        for x, y in ((6, 1), (-4, 3), (2, -7)):
            frame = builder.at(c * x - s * y, s * x + c * y, yaw)
            frame.box("car", (0, 0, -1), (2, 1, 1.5))
            frame.gable("building", (0, 0, 0.5), (2, 1.5, 0.8))
            frame.ellipsoid("person", (0, 2, 0), (0.3, 0.5, 0.9))
        rays = _sphere_rays(4000) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32).T
        return cast(builder.build(), np.zeros(3), rays, _rng()).distance

    still, turned = look(0.0), look(0.7)
    same = np.isclose(still, turned, rtol=1e-4) | (np.isinf(still) & np.isinf(turned))
    assert np.isfinite(still).sum() > 100
    assert same.mean() > 0.997  # rays that graze an edge may fall on either side of it


@pytest.mark.parametrize("kind", ["ellipsoid", "cylinder"])
def test_hit_points_satisfy_the_equation_of_the_surface(kind: str) -> None:
    builder = SceneBuilder()
    if kind == "ellipsoid":
        builder.at(20, 30).ellipsoid("person", (0, 0, 0), (1.0, 2.0, 0.5))
    else:
        builder.at(20, 30).cylinder("pole", (0, 0, -5), 0.1, 10.0)
    target = np.array([20, 30, 0]) + _rng().uniform(-0.3, 0.3, (500, 3))
    hits = cast(builder.build(), np.zeros(3), rays := unit(target), _rng())

    at = (hits.distance[:, None] * rays)[hits.hit] - np.array([20, 30, 0])
    radii = np.array([1.0, 2.0, 0.5]) if kind == "ellipsoid" else np.array([0.1, 0.1, np.inf])
    assert len(at) > 50
    np.testing.assert_allclose(((at / radii) ** 2).sum(1), 1, atol=2e-3)
    assert ((hits.normal[hits.hit] * rays[hits.hit]).sum(1) < 1e-3).all()


def test_gabled_roof_is_met_at_its_slope() -> None:
    builder = SceneBuilder()
    builder.at().gable("building", (0, 0, 0), (10, 8, 2))
    origins = np.stack([np.zeros(9), np.linspace(-3.9, 3.9, 9), np.full(9, 30.0)], axis=1)
    hits = cast(builder.build(), origins, np.tile([0.0, 0, -1], (9, 1)), _rng())

    np.testing.assert_allclose(30 - hits.distance, 2 * (1 - np.abs(origins[:, 1]) / 4), atol=1e-4)
    assert (hits.normal[:, 2] > 0.8).all()


def test_nothing_is_hit_behind_a_nearer_box() -> None:
    builder = SceneBuilder("road")
    builder.at(5, 0).box("wall", (0, 0, 0), (0.2, 400, 50))
    builder.at(9, 0).box("car", (0, 0, 0), (2, 2, 2))
    rays = _sphere_rays(3000)
    rays[:, 0] = np.abs(rays[:, 0]) + 0.1
    hits = cast(builder.build(), np.array([0, 0, 1.5]), unit(rays), _rng())

    assert not (hits.name == NAME_ID["car"]).any()


def test_culling_by_bounding_spheres_loses_no_hit() -> None:
    rng = _rng()
    builder = SceneBuilder()
    for _ in range(40):
        x, y, z = rng.uniform(-20, 20, 3)
        builder.at(x, y, rng.uniform(0, 6), z).box("car", (0, 0, 0), tuple(rng.uniform(0.2, 6, 3)))
    scene, rays = builder.build(), _sphere_rays(3000)
    together = cast(scene, np.zeros(3), rays, rng)

    alone = np.full(len(rays), np.inf)
    for index in range(scene.num_primitives):
        center, half = scene.center[:, index].astype(float), scene.half[:, index].astype(float)
        c, s = float(scene.cos[index]), float(scene.sin[index])
        turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        o, d = turn @ -center, rays.astype(float) @ turn.T
        one, two = (-half - o) / d, (half - o) / d
        near, far = np.minimum(one, two).max(1), np.maximum(one, two).min(1)
        alone = np.where((near < far) & (near > 0.05), np.minimum(alone, near), alone)
    agree = np.isclose(together.distance, alone, rtol=1e-3) | (np.isinf(alone) & np.isinf(together.distance))
    assert agree.mean() > 0.999


def test_foliage_lets_the_share_exp_minus_density_times_path_through() -> None:
    builder = SceneBuilder()
    builder.at(10, 0).ellipsoid("vegetation", (0, 0, 0), (2, 2, 2), density=0.4)
    hits = cast(builder.build(), np.zeros(3), np.tile([1.0, 0, 0], (20000, 1)), _rng())

    passed = 1 - hits.hit.mean()
    assert passed == pytest.approx(np.exp(-0.4 * 4), abs=0.01)
    assert hits.distance[hits.hit].min() > 8
    assert hits.distance[hits.hit].max() < 12


# Sensors -----------------------------------------------------------------------------------------------------


def test_spinning_lidar_thins_on_flat_ground_as_the_closed_form_says() -> None:
    lidar = SpinningLidar(640, -25, -2, azimuth_step=1.0, sigma=0.0, keep_prob=1.0, decay=1e9)
    scan = scan_spinning(SceneBuilder("road").build(), lidar, np.zeros(2, np.float32), 0.0, _rng())

    rho = np.hypot(scan.pos[:, 0], scan.pos[:, 1])
    step_elevation, step_azimuth = np.radians(23 / 639), np.radians(1.0)
    for low, high in ((5, 6), (9, 11), (18, 22)):
        measured = ((rho >= low) & (rho < high)).sum() / (np.pi * (high**2 - low**2))
        h, r = lidar.height, np.linspace(low, high, 200)
        density = h / (r * (r**2 + h**2) * step_elevation * step_azimuth)
        expected = (density * r).sum() / r.sum()
        assert measured == pytest.approx(expected, rel=0.05)


def test_depth_camera_covers_a_frontal_wall_with_focal_squared_over_depth_squared() -> None:
    builder = SceneBuilder()
    builder.at(2.0 + 0.5, 0).box("wall", (0, 0, -20), (1.0, 40, 40))
    camera = DepthCamera(160, 120, noise=0.0)
    scan = scan_depth_camera(builder.build(), camera, [(np.zeros(3, np.float32), 0.0, 0.0)], _rng())

    inside = (np.abs(scan.pos[:, 1]) < 0.5) & (np.abs(scan.pos[:, 2]) < 0.5)
    assert inside.sum() == pytest.approx(camera.focal**2 / 2.0**2, rel=0.03)
    np.testing.assert_allclose(scan.pos[:, 0], 2.0, atol=1e-4)


def test_depth_camera_noise_has_its_sigma() -> None:
    builder = SceneBuilder()
    builder.at(3.5, 0).box("wall", (0, 0, -20), (1.0, 40, 40))
    camera = DepthCamera(160, 120, baseline_focal=1e5, pose_sigma=0.0)
    scan = scan_depth_camera(builder.build(), camera, [(np.zeros(3, np.float32), 0.0, 0.0)], _rng())

    assert (scan.pos[:, 0] - 3.0).std() == pytest.approx(0.0012 + 0.0019 * 2.6**2, rel=0.03)


def test_disparity_is_rounded_to_eighths_of_a_pixel() -> None:
    builder = SceneBuilder()
    builder.at(3.5, 0, 0.3).box("wall", (0, 0, -20), (1.0, 40, 40))
    camera = DepthCamera(noise=1e-9)
    scan = scan_depth_camera(builder.build(), camera, [(np.zeros(3, np.float32), 0.0, 0.0)], _rng())

    disparity = 8 * camera.baseline_focal / scan.pos[:, 0]
    np.testing.assert_allclose(disparity, np.round(disparity), atol=2e-3)


def test_panorama_thins_with_cosine_over_range_squared() -> None:
    builder = SceneBuilder()
    builder.at(4.5, 0).box("wall", (0, 0, -40), (1.0, 80, 80))
    scanner = PanoramaScanner(step=0.25, low=-60, high=60, sigma=0.0, mixed_prob=0.0)
    scan = scan_panorama(builder.build(), scanner, [np.zeros(3, np.float32)], _rng())

    step = np.radians(0.25)
    for y in (0.0, 2.0, 4.0):
        r = np.hypot(4.0, y)
        inside = (np.abs(scan.pos[:, 1] - y) < 0.25) & (np.abs(scan.pos[:, 2]) < 0.25)
        assert inside.sum() / 0.25 == pytest.approx((4 / r) / (r * step) ** 2, rel=0.05)


@pytest.mark.parametrize("sigma", [0.0, 0.002, 0.05])
def test_lidar_range_residuals_have_the_sigma_that_was_set(sigma: float) -> None:
    builder = SceneBuilder()
    builder.at(10.5, 0).box("wall", (0, 0, -40), (1.0, 80, 80))
    lidar = SpinningLidar(64, -10, 10, azimuth_step=0.5, fov=60, height=0.0, sigma=sigma, keep_prob=1.0, decay=1e9)
    scan = scan_spinning(builder.build(), lidar, np.zeros(2, np.float32), 0.0, _rng())

    r = np.linalg.norm(scan.pos, axis=1)
    residual = r - 10.0 * r / scan.pos[:, 0]
    assert residual.std() == pytest.approx(sigma, rel=0.05, abs=1e-5)


def test_lidar_drop_out_follows_its_decay() -> None:
    builder = SceneBuilder()
    builder.at(40.5, 0).box("wall", (0, 0, -400), (1.0, 800, 800))
    lidar = SpinningLidar(200, -3, 3, azimuth_step=0.05, fov=8, height=0.0, keep_prob=0.9, decay=60.0)
    scan = scan_spinning(builder.build(), lidar, np.zeros(2, np.float32), 0.0, _rng())

    assert len(scan) / len(lidar.rays()) == pytest.approx(0.9 * np.exp(-40 / 60), rel=0.03)


def test_aerial_pulse_density_is_the_one_asked_for() -> None:
    builder = SceneBuilder("terrain", extent=(0, 0, 40, 40))
    scan = scan_aerial(builder.build(), AerialLaser(density=10.0, sigma=0.0), _rng())

    cell = np.histogram2d(scan.pos[:, 0], scan.pos[:, 1], bins=8, range=((4, 36), (4, 36)))[0] / 16
    assert np.median(cell) == pytest.approx(10, rel=0.06)
    np.testing.assert_allclose(scan.pos[:, 2], 0, atol=1e-3)


def test_aerial_pulses_pass_leaves_and_reach_the_ground() -> None:
    builder = SceneBuilder("terrain", extent=(0, 0, 12, 12))
    builder.at(6, 6).ellipsoid("vegetation", (0, 0, 8), (9, 9, 3), density=0.5)
    scan = scan_aerial(builder.build(), AerialLaser(density=20.0, tilt=5.0), _rng())

    leaf = scan.name == NAME_ID["vegetation"]
    assert 0.2 < (~leaf).sum() / len(scan) < 0.8
    assert len(scan) > 1.3 * 20 * 144  # more echoes than pulses
    assert scan.intensity[leaf].mean() < scan.intensity[~leaf].mean()


def test_glass_returns_the_share_it_should() -> None:
    builder = SceneBuilder()
    builder.at(4.5, 0).box("window", (0, 0, -40), (1.0, 80, 80))
    full = scan_panorama(builder.build(), PanoramaScanner(1.0, glass_prob=0.0), [np.zeros(3, np.float32)], _rng())
    some = scan_panorama(builder.build(), PanoramaScanner(1.0, glass_prob=0.7), [np.zeros(3, np.float32)], _rng())

    assert len(some) / len(full) == pytest.approx(0.3, abs=0.02)
