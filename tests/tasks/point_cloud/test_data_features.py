# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tasks.point_cloud.data.features import common_features, normal_z, normalise_light, paper_features, voxelise


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 60), st.just(3)), elements=st.floats(-50, 50)), st.floats(0.05, 3)
)
def test_voxels_are_a_partition_of_the_points(pos: np.ndarray, size: float) -> None:
    voxels = voxelise(pos, size, _rng())

    np.testing.assert_array_equal(voxels.inverse[voxels.pick], np.arange(len(voxels.pick)))
    assert len(np.unique(voxels.grid, axis=0)) == len(voxels.grid)
    assert (voxels.grid.min(0) == 0).all()
    cell = np.floor(pos / size).astype(int)
    np.testing.assert_array_equal(voxels.grid[voxels.inverse], cell - cell.min(0))


def test_without_generator_the_first_point_of_a_voxel_is_kept() -> None:
    voxels = voxelise(np.array([[0.1, 0, 0], [5, 5, 5], [0.2, 0, 0], [5.1, 5, 5]]), 1.0)
    np.testing.assert_array_equal(voxels.pick, [0, 1])


def test_cloud_of_absurd_width_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="stray points"):
        voxelise(np.array([[0, 0, 0], [1e9, 0, 0]]), 0.1)


@pytest.mark.parametrize("tilt", [0, 20, 45, 70, 90])
def test_normal_of_a_plane_is_its_own(tilt: float) -> None:
    flat = np.c_[_rng().uniform(-2, 2, (20_000, 2)), np.zeros(20_000)]
    c, s = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    up = normal_z(flat @ np.array([[1, 0, 0], [0, c, s], [0, -s, c]]), 0.1)

    np.testing.assert_allclose(up, c, atol=1e-5)


def test_normal_is_unchanged_by_a_turn_about_z() -> None:
    pos = _rng().uniform(-1, 1, (5000, 3)) * (2, 2, 0.02)
    pos = np.concatenate([pos, pos[:, [0, 2, 1]]])
    turned = pos @ np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    away = np.abs(pos[:, 2]) > 0.6  # the wall; at its foot the two cells differ
    np.testing.assert_allclose(normal_z(pos, 0.1)[away], normal_z(turned, 0.1)[away], atol=0.05)


@pytest.mark.parametrize("count", [1, 2])
def test_lone_points_have_no_normal(count: int) -> None:
    np.testing.assert_array_equal(normal_z(np.zeros((count, 3)), 0.1), 0)


@pytest.mark.parametrize(("gain", "offset"), [(1, 0), (255, 0), (60_000, 3000), (0.01, -5)])
def test_light_loses_the_unit_of_its_sensor(gain: float, offset: float) -> None:
    light = _rng().random(1000)
    np.testing.assert_allclose(normalise_light(gain * light + offset), normalise_light(light), atol=1e-4)


def test_constant_or_missing_light_is_harmless() -> None:
    np.testing.assert_array_equal(normalise_light(np.full(5, 7.0)), 0.5)
    assert normalise_light(np.zeros(0)).shape == (0,)


def test_features_stay_in_their_ranges_and_in_their_order() -> None:
    pos = _rng().uniform(-30, 80, (500, 3))
    x = common_features(pos, 0.3, normalise_light(_rng().normal(size=500)), np.full(500, 0.7))

    assert x.shape == (500, 6)
    assert x.dtype == np.float32
    low, high = np.array([-0.5, -0.5, -0.5, -1, 0, 0]), np.array([0.5, 0.5, 0.5, 6, 1, 1])
    assert (x >= low - 1e-6).all()
    assert (x <= high + 1e-6).all()
    expected = np.clip((pos[:, 2] - np.quantile(pos[:, 2], 0.02)) / 3, -1, 6)
    np.testing.assert_allclose(x[:, 3], expected, rtol=1e-5)


def test_shared_features_do_not_know_where_the_scan_stands_in_plan() -> None:
    pos = _rng().uniform(0, 5, (300, 3))
    light, up = _rng().random(300), _rng().random(300)
    moved = common_features(pos + np.array([30.0, -60.0, 0.0]), 0.25, light, up)
    np.testing.assert_allclose(moved, common_features(pos, 0.25, light, up), atol=1e-5)


def test_paper_features_mean_other_things_indoors_and_outdoors() -> None:
    pos, light, up = _rng().random((9, 3)) * 20, _rng().random(9), _rng().random(9)
    indoor = paper_features(pos, light, up, indoor=True)
    outdoor = paper_features(pos, light, up, indoor=False)

    np.testing.assert_allclose(indoor[:, :3], light[:, None] * np.ones(3), rtol=1e-6)
    np.testing.assert_allclose(indoor[:, 5], up, rtol=1e-6)
    np.testing.assert_allclose(outdoor[:, :3], pos - pos.mean(0), rtol=1e-4)
    np.testing.assert_allclose(outdoor[:, 3:], light[:, None] * np.ones(3), rtol=1e-6)


def naive_normal_z(pos: np.ndarray, size: float) -> np.ndarray:
    """Point by point: all points of the 27 cells around, their covariance, its smallest eigenvector."""
    cell = np.floor(pos / size)
    up = np.zeros(len(pos))
    for row in range(len(pos)):
        near = pos[(np.abs(cell - cell[row]) <= 1).all(1)]
        if len(near) >= 3:
            _, vectors = np.linalg.eigh(np.cov(near.T, bias=True))
            up[row] = abs(vectors[2, 0])
    return up


@pytest.mark.parametrize("block", [1, 7, 10_000])
def test_normals_are_those_of_the_points_around_in_blocks_of_any_size(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pos = _rng().uniform(0, 6, (400, 3)) * (1, 1, 0.3)
    monkeypatch.setattr("tasks.point_cloud.data.features._BLOCK", block)

    np.testing.assert_allclose(normal_z(pos, 0.8), naive_normal_z(pos, 0.8), atol=1e-5)


def test_the_size_of_blocks_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    pos = _rng().uniform(0, 6, (3000, 3)).astype(np.float32)
    whole = normal_z(pos, 0.3)
    monkeypatch.setattr("tasks.point_cloud.data.features._BLOCK", 13)

    np.testing.assert_array_equal(normal_z(pos, 0.3), whole)
