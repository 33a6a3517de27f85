# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tasks.point_cloud.data.domains import DOMAINS, generate_scan, scene_seed
from tasks.point_cloud.data.labels import LABEL_SETS
from tasks.point_cloud.data.scans import ScanArrays
from tasks.point_cloud.data.shifts import Shifted

NAME = "drive16"


@pytest.fixture(scope="module")
def base() -> ScanArrays:
    return generate_scan(DOMAINS[NAME], scene_seed(0, NAME, "test", 0))


def _one(**options: Any) -> ScanArrays:
    return Shifted(base=NAME, scenes=1, **options).scans("test", None)[0]


def test_no_shift_gives_the_scan_of_the_base(base: ScanArrays) -> None:
    same = _one()
    np.testing.assert_array_equal(same.pos, base.pos)
    np.testing.assert_array_equal(same.label, base.label)
    np.testing.assert_array_equal(same.up, base.up)


def test_thinning_keeps_a_random_share_of_the_same_points(base: ScanArrays) -> None:
    thin = _one(keep=0.1)
    assert len(thin) == round(0.1 * len(base))
    assert {tuple(p) for p in thin.pos.tolist()} <= {tuple(p) for p in base.pos.tolist()}
    near = np.linalg.norm(base.pos, axis=1).mean()
    assert np.linalg.norm(thin.pos, axis=1).mean() == pytest.approx(near, rel=0.05)


def test_masking_empties_its_share_of_blocks_and_no_other(base: ScanArrays) -> None:
    blocks = {tuple(b) for b in np.floor(base.pos / 0.8).astype(int).tolist()}
    left = _one(mask_ratio=0.5, mask_size=0.8)
    kept = {tuple(b) for b in np.floor(left.pos / 0.8).astype(int).tolist()}

    assert len(kept) == len(blocks) - round(0.5 * len(blocks))
    inside = [tuple(b) in kept for b in np.floor(base.pos / 0.8).astype(int).tolist()]
    np.testing.assert_array_equal(left.pos, base.pos[inside])


def test_noise_has_its_sigma_and_normals_follow(base: ScanArrays) -> None:
    noisy = _one(noise=0.2)
    assert (noisy.pos - base.pos).std() == pytest.approx(0.2, rel=0.02)
    assert np.abs(noisy.up - base.up).mean() > 0.01


def test_dark_scans_have_constant_light(base: ScanArrays) -> None:
    assert np.ptp(_one(light=False).light) == 0
    assert np.ptp(base.light) > 0


def test_other_sensor_sees_the_same_street(base: ScanArrays) -> None:
    more = _one(sensor={"beams": 32})
    assert len(more) == pytest.approx(2 * len(base), rel=0.1)


def test_other_words_change_labels_only(base: ScanArrays) -> None:
    source = Shifted(base=NAME, answer_in="drive64", scenes=1)
    scan = source.scans("test", None)[0]

    assert source.label_set == LABEL_SETS["drive64"]
    np.testing.assert_array_equal(scan.pos, base.pos)
    vehicle = base.target(LABEL_SETS[NAME]) == LABEL_SETS[NAME].index("vehicle")
    words = {LABEL_SETS["drive64"][i] for i in scan.target(LABEL_SETS["drive64"])[vehicle]}
    assert words == {"car", "truck"}


def test_description_names_what_changed() -> None:
    shifted = Shifted(base=NAME, keep=0.5, noise=0.1, sensor={"height": 3}, answer_in="drive32", light=False)
    text = shifted.describe()
    assert text == (
        "simulated drive16, data_seed 0: keep 0.5, noise 0.1 m, constant light, other sensor, in the words of drive32"
    )
    assert shifted.missing(None) is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"base": "mars"}, "unknown simulated domain 'mars'"),
        ({"base": NAME, "answer_in": "mars"}, "unknown simulated domain 'mars'"),
        ({"base": NAME, "keep": 0}, "keep=0 must be in"),
        ({"base": NAME, "mask_ratio": 1.0}, "mask_ratio=1.0"),
        ({"base": NAME, "noise": -1}, "noise=-1"),
        ({"base": NAME, "sensor": {"lasers": 3}}, r"\['lasers'\] do not exist; drive16 has beams"),
        ({"base": NAME, "answer_in": "als"}, "cannot answer in the words of als"),
    ],
)
def test_impossible_shifts_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Shifted(**options)
