# SPDX-License-Identifier: Apache-2.0
"""Every reader gives back what its writer wrote, and the bytes are those of the public layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from layout_writers import write_kitti_frame, write_nuscenes, write_pointcept_scan
from readers_common import LAYOUTS, OWN_NAMES, Layout, assert_valid, random_scan

from tasks.point_cloud.data.labels import label_set
from tasks.point_cloud.data.readers import (
    OwnLabels,
    OwnScans,
    PointCloudFileError,
    SemanticKITTI,
    write_own_labels,
    write_own_scan,
)

EACH = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@EACH
def test_reader_gives_back_what_its_writer_wrote(layout: Layout, tmp_path: Path) -> None:
    reader, scan = layout.make(tmp_path)

    (ref,) = reader.scans("train")
    back = reader.read(ref)

    assert_valid(back)
    assert back.labelled
    assert back.names == scan.names
    assert back.origin == (0.0, 0.0, 0.0)
    np.testing.assert_array_equal(back.xyz, scan.xyz)
    np.testing.assert_array_equal(back.label, scan.label)
    for field in layout.keeps:
        np.testing.assert_allclose(getattr(back, field), getattr(scan, field), rtol=1e-6)


@EACH
def test_missing_labels_are_minus_one_everywhere_and_flagged(layout: Layout, tmp_path: Path) -> None:
    reader, scan = layout.make(tmp_path, random_scan(layout.names, indoor=layout.indoor, labelled=False))

    back = reader.read(reader.scans("train")[0])

    assert not back.labelled
    assert (back.label == -1).all()
    np.testing.assert_array_equal(back.xyz, scan.xyz)


@EACH
def test_an_empty_scan_is_read_as_no_points(layout: Layout, tmp_path: Path) -> None:
    reader, _ = layout.make(tmp_path, random_scan(layout.names, rows=0, indoor=layout.indoor))

    back = reader.read(reader.scans("train")[0])

    assert_valid(back)
    assert len(back) == 0


@EACH
def test_a_missing_root_says_what_to_do(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(PointCloudFileError, match=r"no such (file|folder)"):
        layout.reader(tmp_path / "nowhere").scans("train")


@EACH
def test_scans_are_listed_in_sorted_order(layout: Layout, tmp_path: Path) -> None:
    reader, _ = layout.make(tmp_path)

    names = [ref.name for ref in reader.scans("train")]

    assert names == sorted(names)
    assert len(names) == 1


@pytest.mark.parametrize("rows", [0, 1, 7, 50])
def test_kitti_files_hold_16_and_4_bytes_per_point(rows: int, tmp_path: Path) -> None:
    write_kitti_frame(tmp_path, "00", "000000", random_scan(label_set("semantickitti"), rows, indoor=False))

    assert (tmp_path / "sequences/00/velodyne/000000.bin").stat().st_size == 16 * rows
    assert (tmp_path / "sequences/00/labels/000000.label").stat().st_size == 4 * rows


@pytest.mark.parametrize("rows", [0, 1, 7, 50])
def test_nuscenes_files_hold_20_and_1_bytes_per_point(rows: int, tmp_path: Path) -> None:
    write_nuscenes(tmp_path, {"val": [random_scan(label_set("nuscenes"), rows, indoor=False)]})

    assert (tmp_path / "samples/LIDAR_TOP/val_000.pcd.bin").stat().st_size == 20 * rows
    assert (tmp_path / "lidarseg/v1.0-mini/val_000_lidarseg.bin").stat().st_size == rows


def test_pointcept_arrays_have_the_types_on_disk(tmp_path: Path) -> None:
    write_pointcept_scan(tmp_path, random_scan(label_set("s3dis"), 5))

    types = {path.stem: (np.load(path).dtype, np.load(path).shape) for path in tmp_path.glob("*.npy")}

    assert types == {
        "coord": (np.float32, (5, 3)),
        "color": (np.uint8, (5, 3)),
        "normal": (np.float32, (5, 3)),
        "segment": (np.int16, (5,)),
    }


def test_instance_bits_do_not_reach_the_class(tmp_path: Path) -> None:
    scan = random_scan(label_set("semantickitti"), 20, indoor=False)
    write_kitti_frame(tmp_path, "00", "000000", scan, instance=np.full(20, 65_535, np.uint16))
    reader = SemanticKITTI(tmp_path, splits={"train": ["00"]})

    back = reader.read(reader.scans("train")[0])

    np.testing.assert_array_equal(back.label, scan.label)


def test_an_empty_scan_without_labels_cannot_be_written_headerless(tmp_path: Path) -> None:
    scan = random_scan(label_set("semantickitti"), 0, indoor=False, labelled=False)
    with pytest.raises(ValueError, match="leave it out"):
        write_kitti_frame(tmp_path, "00", "000000", scan)
    with pytest.raises(ValueError, match="leave it out"):
        write_nuscenes(tmp_path, {"train": [replace(scan, names=label_set("nuscenes"))]})


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".ply"])
def test_coordinates_of_a_map_projection_keep_their_millimetres(suffix: str, tmp_path: Path) -> None:
    scan = replace(random_scan(OWN_NAMES, 30), origin=(691_000.0, 5_336_000.0, 500.0))
    world = scan.world_xyz() + np.linspace(0, 1, 30)[:, None] / 1000
    local = (world - np.array(scan.origin)).astype(np.float32)
    write_own_labels(tmp_path / "labels.yaml", OwnLabels(OWN_NAMES))
    write_own_scan(tmp_path / "town" / "test" / f"tile{suffix}", replace(scan, xyz=local))
    reader = OwnScans(tmp_path, "town")

    back = reader.read(reader.scans("test")[0])

    assert np.abs(back.xyz).max() < 10_000
    np.testing.assert_allclose(back.world_xyz(), world, atol=1e-5)
