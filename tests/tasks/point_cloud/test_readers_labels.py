# SPDX-License-Identifier: Apache-2.0
"""Labels are names: what each raw number of a public data set means, and what it must never come to mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layout_writers import write_kitti_frame, write_nuscenes, write_pointcept_scan, write_scannet_scene
from readers_common import random_scan

from tasks.point_cloud.data.labels import LABEL_SETS, label_set
from tasks.point_cloud.data.readers import (
    Matterport3DFolders,
    NuScenes,
    NuScenesIndex,
    OwnLabels,
    OwnScans,
    PointceptFolders,
    PointCloudFileError,
    S3DISFolders,
    ScanNetFolders,
    ScanNetMeshes,
    SemanticKITTI,
    Structured3DFolders,
    WaymoFolders,
    read_own_scan,
    write_own_labels,
    write_own_scan,
)
from tasks.point_cloud.data.readers.arrays import write_npy
from tasks.point_cloud.data.readers.label_sets import ASPRS, NYU40_RAW, id_table, named
from tasks.point_cloud.data.readers.las import write_las
from tasks.point_cloud.data.readers.values import index_labels

# Written from the format descriptions, not from the tables under test.
KITTI = {
    **{10: "car", 252: "car", 11: "bicycle", 15: "motorcycle", 18: "truck", 258: "truck", 30: "person", 254: "person"},
    **dict.fromkeys((13, 16, 20, 256, 257, 259), "other vehicle"),
    **{31: "bicyclist", 253: "bicyclist", 32: "motorcyclist", 255: "motorcyclist", 40: "road", 60: "road"},
    **{44: "parking", 48: "sidewalk", 49: "other ground", 50: "building", 51: "fence", 70: "vegetation"},
    **{71: "trunk", 72: "terrain", 80: "pole", 81: "traffic sign"},
}
NUSCENES = {
    **{9: "barrier", 14: "bicycle", 15: "bus", 16: "bus", 17: "car", 18: "construction vehicle", 21: "motorcycle"},
    **dict.fromkeys((2, 3, 4, 6), "pedestrian"),
    **{12: "traffic cone", 22: "trailer", 23: "truck", 24: "driveable surface", 25: "other flat", 26: "sidewalk"},
    **{27: "terrain", 28: "manmade", 30: "vegetation"},
}
NYU_KEPT = (*range(1, 13), 14, 16, 24, 28, 33, 34, 36, 39)


def _names(labels: np.ndarray[tuple[int, ...], np.dtype[np.int64]], names: tuple[str, ...]) -> list[str | None]:
    return [None if label < 0 else names[label] for label in labels]


def _write_disk_ids(folder: Path, count: int, segment: str = "segment") -> None:
    """One point per index on disk, and two ignored ones."""
    write_npy(folder / "coord.npy", np.zeros((count + 2, 3), np.float32))
    write_npy(folder / f"{segment}.npy", np.array([*range(count), -1, 255], np.int16)[:, None])


def test_s3dis_order_on_disk_starts_with_the_ceiling(tmp_path: Path) -> None:
    """Card 6.3: the released configurations read these 13 indices against a list sorted by another vocabulary."""
    _write_disk_ids(tmp_path / "Area_5" / "office_1", 13)
    reader = S3DISFolders(tmp_path)

    scan = reader.read(reader.scans("test")[0])

    assert _names(scan.label, scan.names) == [
        *("ceiling", "floor", "wall", "beam", "column", "window", "door", "table", "chair", "sofa"),
        *("bookcase", "board", "clutter", None, None),
    ]


def test_matterport_ends_with_other_then_ceiling(tmp_path: Path) -> None:
    """Card 6.4: the released head reads 19 as ceiling and 20 as other."""
    _write_disk_ids(tmp_path / "test" / "house" / "region0", 21)
    reader = Matterport3DFolders(tmp_path)

    scan = reader.read(reader.scans("test")[0])

    assert _names(scan.label, scan.names)[18:] == ["bathtub", "other", "ceiling", None, None]
    assert scan.names[:19] == label_set("scannet20")[:19]


def test_scannet_structured3d_and_waymo_indices_are_their_names(tmp_path: Path) -> None:
    cases = [
        (ScanNetFolders(tmp_path / "a"), "val/scene", "segment20", {0: "wall", 9: "bookshelf", 19: "other furniture"}),
        (Structured3DFolders(tmp_path / "b"), "val/scene/room", "segment", {11: "shelves", 16: "ceiling", 21: "lamp"}),
        (WaymoFolders(tmp_path / "c"), "validation/s/f", "segment", {0: "car", 9: "pole", 16: "curb", 21: "sidewalk"}),
    ]
    for reader, folder, segment, expected in cases:
        _write_disk_ids(reader.root / folder, len(reader.names), segment)

        scan = reader.read(reader.scans("test")[0])

        assert _names(scan.label, scan.names)[: len(scan.names)] == list(scan.names)
        assert {index: scan.names[index] for index in expected} == expected


def test_structured3d_lists_every_room(tmp_path: Path) -> None:
    """Card 6.5: the released data set class silently takes a random tenth."""
    for scene in range(5):
        for room in range(4):
            _write_disk_ids(tmp_path / "train" / f"scene_{scene:05d}" / f"room_{room}", 25)
    reader = Structured3DFolders(tmp_path)

    names = [ref.name for ref in reader.scans("train")]

    assert len(names) == 20
    assert names == [ref.name for ref in reader.scans("train")]


def test_area_5_is_never_trained_on(tmp_path: Path) -> None:
    for area in range(1, 7):
        _write_disk_ids(tmp_path / f"Area_{area}" / "office_1", 13)
    reader = S3DISFolders(tmp_path)

    train = {ref.name.split("/")[0] for ref in reader.scans("train")}

    assert train == {"Area_1", "Area_2", "Area_3", "Area_4", "Area_6"}
    assert [ref.name for ref in reader.scans("test")] == ["Area_5/office_1"]


@pytest.mark.parametrize("instance", [0, 1, 65_535])
def test_every_16_bit_kitti_id_means_its_name_or_is_ignored(instance: int, tmp_path: Path) -> None:
    ids = np.arange(65_536, dtype=np.uint32)
    for part, content in (("velodyne", np.zeros((65_536, 4), "<f4")), ("labels", ids | np.uint32(instance << 16))):
        path = tmp_path / "sequences" / "08" / part / f"000000.{'bin' if part == 'velodyne' else 'label'}"
        path.parent.mkdir(parents=True)
        path.write_bytes(content.astype(content.dtype.newbyteorder("<")).tobytes())
    reader = SemanticKITTI(tmp_path)

    scan = reader.read(reader.scans("test")[0])

    assert {i: name for i, name in enumerate(_names(scan.label, scan.names)) if name is not None} == KITTI
    assert set(KITTI.values()) == set(reader.names)


@pytest.mark.parametrize("index", [None, "index.csv"])
def test_every_nuscenes_byte_means_its_name_or_is_ignored(index: str | None, tmp_path: Path) -> None:
    write_nuscenes(tmp_path, {"val": [random_scan(label_set("nuscenes"), 256, indoor=False)]}, index=index)
    next(tmp_path.glob("lidarseg/*/*.bin")).write_bytes(bytes(range(256)))
    reader = NuScenesIndex(tmp_path) if index else NuScenes(tmp_path, version="v1.0-mini")

    scan = reader.read(reader.scans("val")[0])

    assert {i: name for i, name in enumerate(_names(scan.label, scan.names)) if name is not None} == NUSCENES
    assert set(NUSCENES.values()) == set(reader.names)


def test_a_nuscenes_copy_with_other_numbers_is_refused(tmp_path: Path) -> None:
    write_nuscenes(tmp_path, {"val": [random_scan(label_set("nuscenes"), 3, indoor=False)]})
    path = tmp_path / "v1.0-mini" / "category.json"
    path.write_text(path.read_text().replace("vehicle.car", "vehicle.boat"))

    with pytest.raises(PointCloudFileError, match="other class numbers"):
        NuScenes(tmp_path, version="v1.0-mini").scans("val")


def test_nyu40_ids_become_the_20_names_in_benchmark_order(tmp_path: Path) -> None:
    assert [NYU40_RAW[key] for key in NYU_KEPT] == list(label_set("scannet20"))
    scan = random_scan(label_set("scannet20"), 20)
    scan.label[:] = np.arange(20)
    write_scannet_scene(tmp_path, "scene0000_00", scan)
    (tmp_path / "scannetv2_val.txt").write_text("scene0000_00\n")
    reader = ScanNetMeshes(tmp_path)

    back = reader.read(reader.scans("val")[0])

    np.testing.assert_array_equal(back.label, np.arange(20))


def test_label_sets_have_the_published_sizes() -> None:
    sizes = {"scannet20": 20, "s3dis": 13, "structured3d": 25, "matterport3d": 21}
    sizes |= {"semantickitti": 19, "nuscenes": 16, "waymo": 22}

    assert {name: len(LABEL_SETS[name]) for name in sizes} == sizes
    assert all(len(set(LABEL_SETS[name])) == size for name, size in sizes.items())


def test_two_hundred_classes_come_from_a_list_of_names(tmp_path: Path) -> None:
    names = [f"thing {index}" for index in range(200)]
    (tmp_path / "names.yaml").write_text("".join(f"- {name}\n" for name in names))
    _write_disk_ids(tmp_path / "val" / "scene", 200, "segment200")
    reader = ScanNetFolders(tmp_path, label_set=str(tmp_path / "names.yaml"), segment="segment200")

    scan = reader.read(reader.scans("val")[0])

    assert scan.names == tuple(names)
    np.testing.assert_array_equal(scan.label, [*range(200), -1, -1])


def test_labels_of_another_label_set_are_refused(tmp_path: Path) -> None:
    _write_disk_ids(tmp_path / "val" / "scene", 200, "segment200")
    reader = ScanNetFolders(tmp_path, segment="segment200")

    with pytest.raises(PointCloudFileError, match="label 199 has no name"):
        reader.read(reader.scans("val")[0])


@pytest.mark.parametrize("choice", ["scannet", "names.yaml", ""])
def test_an_unknown_label_set_is_refused_at_construction(choice: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_set"):
        PointceptFolders(tmp_path, choice, {"train": ["train"]})


def test_names_are_checked_at_construction(tmp_path: Path) -> None:
    for names in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="without repeats"):
            PointceptFolders(tmp_path, names, {"train": ["train"]})
    with pytest.raises(ValueError, match="unknown"):
        PointceptFolders(tmp_path, ["a"], {"training": ["train"]})
    with pytest.raises(ValueError, match="not among"):
        id_table({1: "x"}, {"x": "boat"}, ("car",))
    assert named(["a", "b"]) == ("a", "b")
    assert named("asprs") == ASPRS


def test_own_raw_ids_map_to_names_and_unlisted_ids_are_ignored(tmp_path: Path) -> None:
    labels = OwnLabels(("ground", "plant"), table={2: 0, 3: 1, 5: 1})
    write_own_labels(tmp_path / "wood" / "labels.yaml", labels)
    scan = random_scan(("a", "b", "c", "d", "e", "f"), 6)
    scan.label[:] = [2, 3, 5, 4, 0, -1]
    write_own_scan(tmp_path / "wood" / "val" / "one.ply", scan)
    reader = OwnScans(tmp_path, "wood")

    back = reader.read(reader.scans("val")[0])

    assert _names(back.label, back.names) == ["ground", "plant", "plant", None, None, None]


def test_own_ignore_list_applies_to_indices(tmp_path: Path) -> None:
    write_own_labels(tmp_path / "labels.yaml", OwnLabels(("a", "b"), ignore=(77,)))
    scan = random_scan(tuple(str(i) for i in range(100)), 3)
    scan.label[:] = [0, 1, 77]
    write_own_scan(tmp_path / "wood" / "val" / "one.npz", scan)
    reader = OwnScans(tmp_path, "wood")

    np.testing.assert_array_equal(reader.read(reader.scans("val")[0]).label, [0, 1, -1])


def test_plain_columns_units_and_full_scale_come_from_labels_yaml(tmp_path: Path) -> None:
    columns = ("x", "y", "z", "-", "intensity", "label")
    labels = OwnLabels(("a", "b"), unit=0.3048, intensity_max=255, columns=columns)
    write_own_labels(tmp_path / "yard" / "labels.yaml", labels)
    rows = np.array([[10.0, 0.0, 1.0, 99.0, 255.0, 1.0], [0.0, 5.0, 1.0, 99.0, 51.0, 0.0]])
    write_npy(tmp_path / "yard" / "test" / "one.npy", rows)
    reader = OwnScans(tmp_path, "yard")

    scan = reader.read(reader.scans("test")[0])

    np.testing.assert_allclose(scan.xyz, rows[:, :3] * 0.3048, rtol=1e-6)
    assert scan.intensity is not None
    np.testing.assert_allclose(scan.intensity, [1.0, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(scan.label, [1, 0])
    assert scan.color is None


def test_pure_coordinates_need_no_columns_and_have_no_labels(tmp_path: Path) -> None:
    write_own_labels(tmp_path / "yard" / "labels.yaml", OwnLabels(("a",)))
    write_npy(tmp_path / "yard" / "test" / "one.npy", np.ones((4, 3)))
    reader = OwnScans(tmp_path, "yard")

    scan = reader.read(reader.scans("test")[0])

    assert not scan.labelled
    assert (scan.label == -1).all()


def test_both_label_shapes_and_whole_floats_are_read() -> None:
    for raw in (np.array([0, 1, -1]), np.array([[0], [1], [-1]]), np.array([0.0, 1.0, -1.0], np.float32)):
        np.testing.assert_array_equal(index_labels("x", raw, ("a", "b")), [0, 1, -1])
    np.testing.assert_array_equal(index_labels("x", np.array([0, 255], np.uint8), ("a", "b")), [0, -1])
    many = tuple(str(i) for i in range(300))
    np.testing.assert_array_equal(index_labels("x", np.array([255, 299]), many), [255, 299])


def test_written_kitti_and_pointcept_labels_are_the_documented_numbers(tmp_path: Path) -> None:
    scan = random_scan(label_set("semantickitti"), 19, indoor=False)
    scan.label[:] = np.arange(19)
    write_kitti_frame(tmp_path, "00", "000000", scan)
    write_pointcept_scan(tmp_path / "scan", scan)

    ids = np.fromfile(tmp_path / "sequences/00/labels/000000.label", "<u4")

    assert [KITTI[int(key)] for key in ids] == list(scan.names)
    np.testing.assert_array_equal(np.load(tmp_path / "scan" / "segment.npy"), np.arange(19))


@pytest.mark.parametrize("blank", [0, 1, 255])
def test_a_las_file_that_was_never_classified_has_no_labels(blank: int, tmp_path: Path) -> None:
    write_las(tmp_path / "a.las", np.eye(3), classification=blank)

    assert not read_own_scan(tmp_path / "a.las", OwnLabels(("ground", "building"))).labelled
    assert not read_own_scan(tmp_path / "a.las", OwnLabels(("ground",), table={2: 0})).labelled
    assert read_own_scan(tmp_path / "a.las", OwnLabels(("ground",), table={blank: 0})).labelled


def test_las_codes_colours_and_named_attributes_are_read(tmp_path: Path) -> None:
    write_las(
        tmp_path / "a.las",
        np.eye(3) * 100,
        classification=np.array([2, 6, 7]),
        intensity=np.array([0, 13_107, 65_535]),
        rgb=np.array([[0, 0, 65_535], [257, 0, 0], [0, 514, 0]]),
        point_format=7,
        extra={"species": np.array([1, 0, 9], np.uint8)},
    )

    scan = read_own_scan(tmp_path / "a.las", OwnLabels(("ground", "building"), table={2: 0, 6: 1}))
    other = read_own_scan(tmp_path / "a.las", OwnLabels(("oak", "fir"), ignore=(9,), label="species", unit=0.3048))

    assert _names(scan.label, scan.names) == ["ground", "building", None]
    np.testing.assert_allclose(scan.intensity, [0, 0.2, 1], atol=1e-6)
    np.testing.assert_array_equal(scan.color, [[0, 0, 255], [1, 0, 0], [0, 2, 0]])
    assert _names(other.label, other.names) == ["fir", "oak", None]
    np.testing.assert_allclose(other.xyz, np.eye(3) * 30.48, atol=1e-4)
    with pytest.raises(PointCloudFileError, match="'genus'"):
        read_own_scan(tmp_path / "a.las", OwnLabels(("oak",), label="genus"))
