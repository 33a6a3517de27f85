# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.point_cloud.data import domains, rooms, streets
from tasks.point_cloud.data.domains import DOMAINS, SEEN, SPLITS, UNSEEN, VALIDATION, generate_scan, scene_seed
from tasks.point_cloud.data.labels import IGNORE, LABEL_SETS, WORLD_NAMES, WORLD_TO_LABEL, label_index, label_set
from tasks.point_cloud.data.sampling import sample_surfaces
from tasks.point_cloud.data.scans import UNLABELLED, ScanArrays, load_scans, save_scans
from tasks.point_cloud.data.scene import NAME_ID, SceneBuilder
from tasks.point_cloud.data.sensors import SpinningLidar

# Names that a scene must hold at least five objects of, so that a score is no coin toss.
RARE = {
    "rgbd_room": ("chair",),
    "tls_office": ("chair",),
    "drive64": ("person", "pole", "traffic sign", "trunk", "fence", "truck", "car"),
    "drive32": ("person", "pole", "truck", "car"),
    "drive16": ("person", "pole", "car"),
    "drive_front": ("person", "pole", "traffic sign", "trunk", "car"),
}


@pytest.fixture(scope="module")
def scans() -> dict[str, ScanArrays]:
    return {name: generate_scan(spec, scene_seed(0, name, "test", 0)) for name, spec in DOMAINS.items()}


# Labels ------------------------------------------------------------------------------------------------------------


def test_every_domain_has_one_role() -> None:
    roles = [*SEEN, *VALIDATION, *UNSEEN]
    assert sorted(roles) == sorted(DOMAINS)
    assert len(set(roles)) == len(roles)


@pytest.mark.parametrize("name", list(DOMAINS))
def test_each_domain_answers_in_exactly_its_label_set(name: str) -> None:
    mapping = WORLD_TO_LABEL[name]
    assert set(mapping) <= set(WORLD_NAMES)
    assert set(mapping.values()) == set(LABEL_SETS[name])


@pytest.mark.parametrize("name", list(LABEL_SETS))
def test_label_sets_hold_no_name_twice(name: str) -> None:
    assert len(set(LABEL_SETS[name])) == len(LABEL_SETS[name])


def test_names_on_disk_find_their_own_index_whatever_their_order() -> None:
    words = tuple(reversed(LABEL_SETS["s3dis"]))
    scan = ScanArrays("x", *(np.zeros((13, 3)), np.zeros(13), np.zeros(13)), np.arange(13, dtype=np.uint8), words)
    target = scan.target(LABEL_SETS["s3dis"])

    assert [LABEL_SETS["s3dis"][i] for i in target] == list(words)


def test_label_outside_the_set_is_one_clear_error() -> None:
    scan = ScanArrays("x", np.zeros((1, 3)), np.zeros(1), np.zeros(1), np.zeros(1, np.uint8), ("bridge",))
    with pytest.raises(ValueError, match=r"x: labels \['bridge'\] are not in its label set \(ground, building"):
        scan.target(LABEL_SETS["real_als"])
    with pytest.raises(ValueError, match="has no name"):
        replace(scan, label=np.array([7], np.uint8)).target(("bridge",))
    with pytest.raises(ValueError, match="no label set for 'nowhere'"):
        label_set("nowhere")
    assert label_index(("a", "b"), ["b"]) == {"b": 1}


# Seeds -------------------------------------------------------------------------------------------------------------


def test_no_two_scenes_share_a_seed() -> None:
    seeds = [
        scene_seed(base, name, split, index)
        for base, name, split, index in itertools.product(range(3), DOMAINS, SPLITS, range(100))
    ]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("name", list(DOMAINS))
def test_same_seed_gives_the_same_scan_and_another_seed_another(name: str, scans: dict[str, ScanArrays]) -> None:
    again = generate_scan(DOMAINS[name], scene_seed(0, name, "test", 0))
    for attribute in ("pos", "light", "up", "label"):
        np.testing.assert_array_equal(getattr(again, attribute), getattr(scans[name], attribute))
    assert again.words == scans[name].words

    other = generate_scan(DOMAINS[name], scene_seed(0, name, "train", 0))
    assert len(other) != len(again) or not np.array_equal(other.pos, again.pos)


def test_one_street_can_be_seen_by_two_sensors() -> None:
    one = DOMAINS["drive64"]
    two = replace(one, sensor=SpinningLidar(16, -15, 15, 0.4))
    _, first = domains.build_world(one, np.random.default_rng((7, 0)))
    _, second = domains.build_world(two, np.random.default_rng((7, 0)))

    np.testing.assert_array_equal(first.center, second.center)
    assert len(generate_scan(one, (7,))) != len(generate_scan(two, (7,)))


# What is generated -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(DOMAINS))
def test_scans_are_well_formed(name: str, scans: dict[str, ScanArrays]) -> None:
    scan = scans[name]

    assert 5_000 <= len(scan) <= 45_000
    assert scan.pos.dtype == scan.light.dtype == scan.up.dtype == np.float32
    assert np.isfinite(scan.pos).all()
    assert np.isfinite(scan.light).all()
    assert scan.up.min() >= 0
    assert scan.up.max() <= 1
    target = scan.target(LABEL_SETS[name])
    labelled = target[target != IGNORE]
    assert len(labelled) > 0.6 * len(scan)
    assert len(np.unique(labelled)) >= 0.8 * len(LABEL_SETS[name])


@pytest.mark.parametrize("name", list(RARE))
def test_scenes_hold_at_least_five_of_every_rare_object(name: str) -> None:
    for seed in range(4):
        _, scene = domains.build_world(DOMAINS[name], np.random.default_rng((seed, 0)))
        pairs = set(zip(scene.name.tolist(), scene.instance.tolist(), strict=True))
        counts = Counter(WORLD_NAMES[name] for name, _ in pairs)
        assert all(counts.get(rare, 0) >= 5 for rare in RARE[name]), counts


@pytest.mark.parametrize("name", ["rgbd_room", "tls_office", "cad_room", "rgbd_house"])
def test_points_of_a_room_lie_in_the_room(name: str, scans: dict[str, ScanArrays]) -> None:
    spec = DOMAINS[name]
    assert isinstance(spec.world, rooms.RoomWorld)
    reach = spec.world.side[1] / np.sqrt(2) + 0.5
    inside = np.linalg.norm(scans[name].pos[:, :2], axis=1) < reach
    assert inside.mean() > 0.995
    assert scans[name].pos[:, 2].max() < spec.world.height[1] + 0.3


def test_vehicle_itself_is_not_in_its_scan() -> None:
    spec = DOMAINS["drive64"]
    assert isinstance(spec.world, streets.StreetWorld)
    scene = streets.build_street(spec.world, np.random.default_rng(0))
    scan = domains.look(spec, scene, np.random.default_rng(1))
    assert np.linalg.norm(scan.pos - (0, 0, 1.73), axis=1).min() > 1.3 - 2.9  # sensor within 2.9 m of the origin
    assert not scene.occupied(0.0, 0.0, 1.73)


def test_furniture_does_not_overlap() -> None:
    for seed in range(5):
        scene = rooms.build_room(DOMAINS["rgbd_house"].world, np.random.default_rng(seed))  # type: ignore[arg-type]
        boxes = {}
        for index, instance in enumerate(scene.instance):
            if WORLD_NAMES[scene.name[index]] in ("bed", "sofa", "cabinet", "table", "shelves"):
                boxes.setdefault(int(instance), []).append(index)
        for one, two in itertools.combinations(boxes.values(), 2):
            a = scene.center[:2, one].mean(1)
            b = scene.center[:2, two].mean(1)
            assert np.linalg.norm(a - b) > 0.3


def test_perfect_sampler_covers_surfaces_evenly_and_hides_nothing() -> None:
    builder = SceneBuilder("floor", extent=(0, 0, 4, 4), height=3.0)
    builder.at(2, 2).box("table", (0, 0, 0), (1, 1, 1))
    scan = sample_surfaces(builder.build(), 22_000, np.random.default_rng(0))

    share = (scan.name == NAME_ID["table"]).mean()
    assert share == pytest.approx(6 / 22, abs=0.01)
    under = (scan.pos[:, 2] == 0) & (np.abs(scan.pos[:, :2] - 2) < 0.5).all(1)
    assert under.sum() == pytest.approx(2 * 1000, rel=0.1)  # the floor below and the box's own bottom


def test_perfect_sampler_refuses_roofs() -> None:
    builder = SceneBuilder()
    builder.at().gable("building", (0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="gabled roofs"):
        sample_surfaces(builder.build(), 10, np.random.default_rng(0))


# Files -------------------------------------------------------------------------------------------------------------


def test_scans_survive_the_file(tmp_path: Path, scans: dict[str, ScanArrays]) -> None:
    before = [scans["als"], scans["drive16"]]
    save_scans(tmp_path / "x.npz", before)
    after = load_scans(tmp_path / "x.npz")

    for name, old, new in zip(("als", "drive16"), before, after, strict=True):
        assert new.name == old.name
        np.testing.assert_array_equal(new.pos, old.pos)
        np.testing.assert_array_equal(new.light, old.light)
        np.testing.assert_allclose(new.up, old.up, atol=5e-4)
        np.testing.assert_array_equal(new.target(LABEL_SETS[name]), old.target(LABEL_SETS[name]))


def test_unlabelled_points_stay_unlabelled(tmp_path: Path, scans: dict[str, ScanArrays]) -> None:
    blank = replace(scans["als"], label=np.full(len(scans["als"]), UNLABELLED, np.uint8))
    save_scans(tmp_path / "x.npz", [blank, scans["drive16"]])
    assert (load_scans(tmp_path / "x.npz")[0].target(LABEL_SETS["als"]) == IGNORE).all()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_damaged_file_is_one_clear_error(tmp_path: Path, scans: dict[str, ScanArrays], damage: str) -> None:
    path = tmp_path / "x.npz"
    if damage != "missing":
        save_scans(path, [scans["drive16"]])
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello"}[damage])
    with pytest.raises(ValueError, match="delete the file"):
        load_scans(path)
