# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.point_cloud.data.transforms import Augmentation, crop_columns, tile_columns

OFF = Augmentation(
    rotate_prob=0, tilt=0, scale=0, flip_prob=0, jitter=0, dropout_prob=0, light_jitter=0, elastic_prob=0
)


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _distances(pos: np.ndarray) -> np.ndarray:
    return np.linalg.norm(pos[:, None] - pos[None], axis=-1)


POS = _rng(5).uniform(-3, 3, (40, 3))


def test_switched_off_changes_nothing() -> None:
    np.testing.assert_allclose(OFF.move(POS, 0.1, _rng()), POS, atol=1e-6)
    np.testing.assert_array_equal(OFF.keep(40, _rng()), np.arange(40))
    np.testing.assert_allclose(OFF.relight(np.linspace(0, 1, 5), _rng()), np.linspace(0, 1, 5), atol=1e-7)


def test_turns_and_flips_keep_all_distances() -> None:
    moved = Augmentation(scale=0, jitter=0, dropout_prob=0).move(POS, 0.1, _rng())
    np.testing.assert_allclose(_distances(moved), _distances(POS), atol=1e-5)
    assert np.abs(moved - POS).max() > 0.1


def test_rotation_about_z_keeps_heights() -> None:
    moved = Augmentation(tilt=0, scale=0, jitter=0).move(POS, 0.1, _rng())
    np.testing.assert_allclose(moved[:, 2], POS[:, 2], atol=1e-6)


def test_tilt_is_at_most_what_was_set() -> None:
    up = np.array([[0.0, 0, 1]])
    limit = np.pi / 64
    augmentation = Augmentation(scale=0, jitter=0)
    angles = [np.arccos(np.clip(augmentation.move(up, 0.1, _rng(s))[0, 2], -1, 1)) for s in range(200)]
    assert 0.3 * limit < max(angles) <= limit * np.sqrt(2) + 1e-6


def test_scale_multiplies_all_distances_by_one_factor() -> None:
    factors = []
    for seed in range(50):
        moved = Augmentation(jitter=0, scale=0.1).move(POS, 0.1, _rng(seed))
        ratio = _distances(moved)[0, 1:] / _distances(POS)[0, 1:]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
        factors.append(ratio[0])
    assert 0.9 <= min(factors) < 0.93 < 1.07 < max(factors) <= 1.1


def test_jitter_is_a_share_of_the_voxel() -> None:
    still = np.zeros((20_000, 3))
    moved = Augmentation(rotate_prob=0, tilt=0, scale=0, flip_prob=0, jitter=0.05).move(still, 2.0, _rng())
    assert moved.std() == pytest.approx(0.1, rel=0.03)
    assert np.abs(moved).max() <= 0.4 + 1e-6


def test_elastic_bend_is_smooth() -> None:
    augmentation = Augmentation(
        rotate_prob=0, tilt=0, scale=0, flip_prob=0, jitter=0, elastic_prob=1, elastic_strength=0.2, elastic_cell=1.0
    )
    line = np.c_[np.linspace(0, 8, 400), np.zeros((400, 2))]
    shift = augmentation.move(line, 0.1, _rng()) - line
    assert 0.05 < shift.std() < 0.3
    # Linear between control points 1 m apart: no step of 2 cm can exceed 2 per cent of the largest difference.
    assert np.abs(np.diff(shift, axis=0)).max() < 0.02 * 8 * 0.2


def test_dropout_keeps_its_share_and_never_all_is_lost() -> None:
    augmentation = Augmentation(dropout_prob=1.0, dropout_ratio=0.9)
    assert len(augmentation.keep(1000, _rng())) == 100
    assert len(augmentation.keep(1, _rng())) == 1
    assert len(Augmentation(dropout_prob=1.0, dropout_ratio=1.0).keep(5, _rng())) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rotate_prob": 1.5}, "rotate_prob=1.5 is not in"),
        ({"dropout_ratio": -0.1}, "dropout_ratio"),
        ({"jitter": -1}, "jitter=-1 is negative"),
        ({"scale": 1.0}, "scale=1.0 must be below 1"),
        ({"elastic_cell": 0}, "elastic_cell"),
    ],
)
def test_impossible_numbers_are_refused(options: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Augmentation(**options)


def test_crop_holds_whole_columns() -> None:
    pos = _rng().uniform(0, 10, (500, 3))
    pos[250:, :2] = pos[:250, :2]  # a second floor above every point
    chosen = crop_columns(pos, 100, _rng(1))

    assert len(chosen) == 100
    inside = np.zeros(500, bool)
    inside[chosen] = True
    assert (inside[:250] == inside[250:]).sum() >= 249
    np.testing.assert_array_equal(crop_columns(pos, 500, _rng()), np.arange(500))


@pytest.mark.parametrize("count", [1, 7, 99, 100, 101, 250, 1000])
def test_tiles_are_a_fixed_partition_of_nearly_equal_parts(count: int) -> None:
    pos = _rng().uniform(0, 10, (250, 3))
    parts = tile_columns(pos, count)

    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(250))
    assert len(parts) == -(-250 // count)
    sizes = [len(part) for part in parts]
    assert max(sizes) <= count
    assert max(sizes) - min(sizes) <= 1 + max(sizes) // 3
    for one, two in zip(parts, tile_columns(pos, count), strict=True):
        np.testing.assert_array_equal(one, two)


def naive_tiles(pos: np.ndarray, count: int) -> list[np.ndarray]:
    """Sort every part whole, again and again; equal coordinates stay in the order of the sort before."""
    parts, stack = [], [(np.arange(len(pos)), max(1, -(-len(pos) // count)))]
    while stack:
        part, number = stack.pop()
        if number == 1:
            parts.append(np.sort(part))
            continue
        spread = np.ptp(pos[part, :2], axis=0)
        order = part[np.argsort(pos[part, int(spread[1] > spread[0])], kind="stable")]
        middle = len(order) * (number // 2) // number
        stack.extend(((order[middle:], number - number // 2), (order[:middle], number // 2)))
    return parts


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 200), count=st.integers(1, 60), steps=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_tiles_are_those_of_sorting_every_part_even_where_points_are_level(
    rows: int, count: int, steps: int, seed: int
) -> None:
    pos = np.random.default_rng(seed).integers(0, steps, (rows, 3)).astype(np.float32)  # few steps: many are level

    for found, expected in zip(tile_columns(pos, count), naive_tiles(pos, count), strict=True):
        np.testing.assert_array_equal(found, expected)
