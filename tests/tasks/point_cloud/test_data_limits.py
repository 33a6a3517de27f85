# SPDX-License-Identifier: Apache-2.0
"""What no voxel or curve can hold is found when the scan is read, with scan, domain and remedy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tasks.point_cloud.data.features import count_cells, network_input, normal_z, voxelise
from tasks.point_cloud.data.limits import MAX_CELLS, MAX_EXTENT, MAX_SCAN_CELLS, ScanError, check_scan, coarse_step
from tasks.point_cloud.data.public import PublicScans
from tasks.point_cloud.data.readers import OwnLabels, OwnScans, write_own_labels, write_ply
from tasks.point_cloud.data.readers.arrays import write_npy
from tasks.point_cloud.data.readers.las import write_las
from tasks.point_cloud.data.sources import LasFiles
from tasks.point_cloud.data.transforms import Augmentation
from tasks.point_cloud.nets.serialization import MAX_DEPTH, encode

UTM = np.array([500_000.0, 5_400_000.0, 100.0])


def tile(rows: int = 3000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 20, (rows, 3)) * (1, 1, 0.02)


def opened(root: Path, xyz: np.ndarray, voxel: float = 0.25, split: str = "test", **labels: Any) -> Any:
    """The items of one own scan ``a`` of domain ``yard``."""
    write_own_labels(root / "yard" / "labels.yaml", OwnLabels(("ground",), **labels))
    label = {"label": np.zeros(len(xyz), np.int32)} if split == "train" else {}
    write_ply(root / "yard" / split / "a.ply", {**dict(zip("xyz", xyz.T, strict=True)), **label})
    source = PublicScans(reader=OwnScans(root, "yard"), voxel=voxel)
    view = {"domain": "yard", "label_set": ["ground"], "domain_index": 0, "voxel": voxel, "max_voxels": 100_000}
    items = source.dataset(split, root / "cache", train=split == "train", **view)  # type: ignore[arg-type]
    items[0]
    return items


def test_coordinates_of_a_map_that_went_through_float32_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match=r"scan a of domain 'yard' .* steps of 0\.5 m.*double"):
        opened(tmp_path / "float", (tile() + UTM).astype(np.float32))
    # float32 numbers in a file of doubles lost as much.
    with pytest.raises(ScanError, match=r"steps of 0\.5 m"):
        opened(tmp_path / "cast", (tile() + UTM).astype(np.float32).astype(np.float64))

    items = opened(tmp_path / "double", tile() + UTM)
    assert len(items[0].x) > 3000 * 0.5  # 20 m x 20 m in voxels of 0.25 m: 6,400 squares


@settings(deadline=None)
@given(st.floats(0, 1e7), st.sampled_from([0.02, 0.05, 0.25, 1.0]), st.integers(0, 99))
def test_an_accepted_float32_scan_is_right_to_a_sixteenth_of_a_voxel(far: float, voxel: float, seed: int) -> None:
    exact = tile(seed=seed) + far
    held = exact.astype(np.float32)
    worst = float(np.abs(held.astype(np.float64) - exact).max())

    step = coarse_step(held)

    assert worst <= max(step, 2.0**-10) / 2 + 1e-12
    assert coarse_step(exact) in (0.0, step)  # doubles have their digits, unless far is so small that both are exact
    try:
        check_scan(held - held.min(0), voxel, step, "a", "d", "set `unit`")
    except ScanError:
        assert step > voxel / 8
    else:
        assert worst <= voxel / 16 + 1e-12 or worst <= 2.0**-11


@settings(max_examples=30, deadline=None)
@given(far=st.floats(0, 60_000), seed=st.integers(0, 99))
def test_half_precision_is_known_by_its_step(far: float, seed: int) -> None:
    exact = np.random.default_rng(seed).uniform(0, 20, (200, 3)) + np.array([far, 0, 0])
    held = exact.astype(np.float16)

    assert np.abs(held.astype(np.float64) - exact).max() <= coarse_step(held) / 2 + 1e-12


def test_a_raster_in_whole_metres_on_a_map_is_no_loss() -> None:
    grid = np.stack(np.meshgrid(np.arange(50.0), np.arange(50.0), [0.0]), -1).reshape(-1, 3) + UTM

    assert coarse_step(grid) == 0.0
    assert coarse_step(grid.astype(np.float32)) == 0.0


def test_a_stray_point_is_found_when_the_scan_is_read_and_named(tmp_path: Path) -> None:
    xyz = tile()
    xyz[1234] += (20_000, 0, 0)

    for split in ("test", "train"):
        with pytest.raises(
            ScanError, match=r"scan a of domain 'yard' .* 1 of its 3000 .*\(the first in row 1234\).*in labels\.yaml"
        ):
            opened(tmp_path / split, xyz, split=split)


def test_a_stray_point_within_the_limits_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    xyz = tile()
    xyz[7] += (0, 2000, 0)

    with caplog.at_level(logging.WARNING, "moeapps"):
        opened(tmp_path, xyz)

    assert "scan a of domain 'yard'" in caplog.text
    assert "row 7" in caplog.text


def test_degrees_are_refused_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    degrees = np.stack([9 + rng.uniform(0, 0.001, 3000), 48 + rng.uniform(0, 0.001, 3000), rng.uniform(0, 9, 3000)], 1)

    with pytest.raises(ScanError, match=r"scan a of domain 'yard' .*degrees.*UTM"):
        opened(tmp_path, degrees)


def test_a_thin_tower_is_no_scan_in_degrees(tmp_path: Path) -> None:
    opened(tmp_path, np.random.default_rng(0).uniform(0, 1, (3000, 3)) * (0.3, 0.3, 60))


@pytest.mark.parametrize("kind", ["own", "las"])
def test_a_las_header_that_names_degrees_is_believed(kind: str, tmp_path: Path) -> None:
    import laspy

    path = tmp_path / "yard" / "test" / "a.las"
    path.parent.mkdir(parents=True)
    write_las(path, tile() * 1e-3 + (9, 48, 0), scale=1e-7)
    las = laspy.read(path)
    las.vlrs.append(laspy.vlrs.known.WktCoordinateSystemVlr('GEOGCS["WGS 84",DATUM["WGS_1984"]]'))
    las.write(path)
    write_own_labels(tmp_path / "yard" / "labels.yaml", OwnLabels(("ground",)))

    source = PublicScans(reader=OwnScans(tmp_path, "yard"), voxel=0.25)
    files = LasFiles(root=path.parent, test=["a.las"], classes={2: "ground"})

    with pytest.raises(ValueError, match=r"a\.las.*degrees.*UTM"):
        (source if kind == "own" else files).scans("test", None, "yard")


def test_las_files_are_held_to_the_same_limits(tmp_path: Path) -> None:
    xyz = tile()
    xyz[5] += (30_000, 0, 0)
    write_las(tmp_path / "a.las", xyz)

    with pytest.raises(ScanError, match=r"scan a of domain 'town' .*row 5"):
        LasFiles(root=tmp_path, test=["a.las"], classes={2: "ground"}).scans("test", None, "town")


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.01, 3.0), st.tuples(*[st.floats(1.0, MAX_EXTENT)] * 3), st.integers(0, 2**31), st.floats(0, np.pi / 64)
)
def test_what_the_reader_accepts_voxeliser_and_curves_hold(
    voxel: float, box: tuple[float, float, float], seed: int, tilt: float
) -> None:
    rng = np.random.default_rng(seed)
    pos = (rng.uniform(0, 1, (50, 3)) * box).astype(np.float32)
    pos[:2] = (0, 0, 0), box
    pos -= (pos.min(0) + pos.max(0)) / 2
    try:
        check_scan(pos, voxel, 0.0, "a", "d", "set `unit`")
    except ScanError:
        assert max(box) / voxel > MAX_SCAN_CELLS * 0.99
        return
    moved = Augmentation(tilt=tilt, elastic_prob=0.0).move(pos, voxel, rng)
    for points in (pos, moved):
        voxels = voxelise(points, voxel)
        assert np.isfinite(normal_z(points, voxel)).all()
        grid, _ = network_input(
            points[voxels.pick], voxel, np.zeros(len(voxels.pick)), np.zeros(len(voxels.pick)),
            features="common", indoor=False,
        )  # fmt: skip
        assert grid.max() < MAX_CELLS == 2**MAX_DEPTH
        encode(torch.from_numpy(grid), torch.zeros(len(grid), dtype=torch.int64), "hilbert")


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 3.0]))
def test_cells_are_counted(seed: int, size: float) -> None:
    pos = np.random.default_rng(seed).uniform(-3, 3, (200, 3)).astype(np.float32)
    cells = {tuple(np.floor(row.astype(np.float64) / size)) for row in pos}

    assert count_cells(pos, size) == len(cells) == len(voxelise(pos, size).pick)


def test_few_voxels_for_many_points_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    xyz = tile() * 1e-3  # kilometres

    for split in ("test", "train"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "moeapps"):
            opened(tmp_path / split, xyz, voxel=0.25 if split == "test" else 0.26, split=split)
        # Around the middle of a scan the corners of eight voxels meet.
        assert "scan a of domain 'yard': its 3000 points fall into 8 voxels" in caplog.text
        assert "`unit`" in caplog.text

    caplog.clear()
    with caplog.at_level(logging.WARNING, "moeapps"):
        opened(tmp_path / "right", xyz, unit=1000.0)
    assert not caplog.records


@settings(deadline=None, max_examples=30)
@given(st.floats(0.001, 1000), st.floats(0.001, 1000))
def test_another_unit_in_labels_yaml_counts_the_tiles_anew(first: float, second: float) -> None:
    import tempfile

    assume(first != second)
    xyz = tile(500) * 0.01
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_npy(root / "yard" / "test" / "a.npy", xyz)
        view = {"domain": "yard", "label_set": ["a"], "domain_index": 0, "voxel": 0.25, "max_voxels": 40}
        for unit in (first, second):
            write_own_labels(root / "yard" / "labels.yaml", OwnLabels(("a",), unit=unit))
            source = PublicScans(reader=OwnScans(root, "yard"), voxel=0.25)
            items = source.dataset("test", root / "cache", **view)  # type: ignore[arg-type]
            counts[unit] = sum(len(items[index].raw_y) for index in range(len(items)))
    assert set(counts.values()) == {500}
