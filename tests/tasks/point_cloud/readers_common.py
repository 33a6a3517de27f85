# SPDX-License-Identifier: Apache-2.0
"""Tiny scans written in every layout, and what any scan that a reader returns must obey."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from layout_writers import write_kitti_frame, write_nuscenes, write_pointcept_scan, write_scannet_scene

from tasks.point_cloud.data.labels import label_set
from tasks.point_cloud.data.readers import (
    Matterport3DFolders,
    NuScenes,
    NuScenesIndex,
    OwnLabels,
    OwnScans,
    PointceptFolders,
    RawScan,
    S3DISFolders,
    ScanNetFolders,
    ScanNetMeshes,
    ScanReader,
    SemanticKITTI,
    Structured3DFolders,
    WaymoFolders,
    write_own_labels,
    write_own_scan,
)

OWN_NAMES = ("ground", "building", "vegetation")


def random_scan(
    names: tuple[str, ...], rows: int = 9, *, indoor: bool = True, seed: int = 0, labelled: bool = True
) -> RawScan:
    """A scan whose values survive every format exactly: quarters for coordinates, 255ths for intensity."""
    rng = np.random.default_rng(seed)
    normal = np.eye(3, dtype=np.float32)[rng.integers(0, 3, rows)]
    return RawScan(
        xyz=(rng.integers(-200, 200, (rows, 3)) / 4).astype(np.float32),
        label=rng.integers(-1, len(names), rows) if labelled else np.full(rows, -1),
        names=names,
        color=rng.integers(0, 256, (rows, 3)).astype(np.uint8) if indoor else None,
        normal=normal if indoor else None,
        intensity=None if indoor else (rng.integers(0, 256, rows) / 255).astype(np.float32),
        labelled=labelled,
    )


@dataclass(frozen=True)
class Layout:
    """How one scan is written and read in one layout.

    Args:
        write: writes a scan below a root.
        reader: opens the root.
        names: its label set.
        indoor: whether it keeps colour and normals, or intensity.
        keeps: fields that come back.
    """

    write: Callable[[Path, RawScan], None]
    reader: Callable[[Path], ScanReader]
    names: tuple[str, ...]
    indoor: bool
    keeps: tuple[str, ...]
    named_labels: bool = False  # an index names the label file, so that it must be there

    def make(self, root: Path, scan: RawScan | None = None) -> tuple[ScanReader, RawScan]:
        scan = random_scan(self.names, indoor=self.indoor) if scan is None else scan
        self.write(root, scan)
        return self.reader(root), scan


def _write_meshes(root: Path, scan: RawScan) -> None:
    write_scannet_scene(root, "scene0000_00", scan)
    (root / "scannetv2_train.txt").write_text("scene0000_00\n")


def _own(suffix: str) -> Layout:
    def write(root: Path, scan: RawScan) -> None:
        write_own_labels(root / "yard" / "labels.yaml", OwnLabels(OWN_NAMES))
        write_own_scan(root / "yard" / "train" / f"first{suffix}", scan)

    keeps = ("color",) if suffix in (".las", ".laz") else ("color", "normal")
    return Layout(write, lambda root: OwnScans(root, "yard"), OWN_NAMES, True, keeps)


LAYOUTS: dict[str, Layout] = {
    "scannet": Layout(
        lambda root, scan: write_pointcept_scan(root / "train" / "scene0000_00", scan, segment="segment20"),
        ScanNetFolders,
        label_set("scannet20"),
        True,
        ("color", "normal"),
    ),
    "s3dis_column": Layout(
        lambda root, scan: write_pointcept_scan(root / "Area_1" / "office_1", scan, column=True),
        lambda root: S3DISFolders(root, splits={"train": ["Area_1"]}),
        label_set("s3dis"),
        True,
        ("color", "normal"),
    ),
    "structured3d": Layout(
        lambda root, scan: write_pointcept_scan(root / "train" / "scene_00000" / "room_1", scan),
        Structured3DFolders,
        label_set("structured3d"),
        True,
        ("color", "normal"),
    ),
    "matterport3d": Layout(
        lambda root, scan: write_pointcept_scan(root / "train" / "house" / "region0", scan),
        Matterport3DFolders,
        label_set("matterport3d"),
        True,
        ("color", "normal"),
    ),
    "pointcept": Layout(
        lambda root, scan: write_pointcept_scan(root / "all" / "one", scan),
        lambda root: PointceptFolders(root, list(OWN_NAMES), {"train": ["all"]}),
        OWN_NAMES,
        False,
        ("intensity",),
    ),
    "waymo": Layout(
        lambda root, scan: write_pointcept_scan(root / "training" / "sequence" / "frame", scan),
        WaymoFolders,
        label_set("waymo"),
        False,
        ("intensity",),
    ),
    "kitti": Layout(
        lambda root, scan: write_kitti_frame(root, "00", "000000", scan),
        lambda root: SemanticKITTI(root, splits={"train": ["00"]}),
        label_set("semantickitti"),
        False,
        ("intensity",),
    ),
    "nuscenes": Layout(
        lambda root, scan: write_nuscenes(root, {"train": [scan]}),
        lambda root: NuScenes(root, version="v1.0-mini"),
        label_set("nuscenes"),
        False,
        ("intensity",),
        named_labels=True,
    ),
    "nuscenes_csv": Layout(
        lambda root, scan: write_nuscenes(root, {"train": [scan]}, index="index.csv"),
        NuScenesIndex,
        label_set("nuscenes"),
        False,
        ("intensity",),
        named_labels=True,
    ),
    "scannet_meshes": Layout(_write_meshes, ScanNetMeshes, label_set("scannet20"), True, ("color",)),
    "own_npy": _own(".npy"),
    "own_npz": _own(".npz"),
    "own_ply": _own(".ply"),
    "own_las": _own(".las"),
    "own_laz": _own(".laz"),
}


def assert_valid(scan: RawScan) -> None:
    """The promises of RawScan."""
    rows = len(scan)
    assert scan.xyz.dtype == np.float32
    assert scan.xyz.shape == (rows, 3)
    assert np.isfinite(scan.xyz).all()
    assert scan.label.dtype == np.int64
    assert scan.label.shape == (rows,)
    assert ((scan.label >= -1) & (scan.label < len(scan.names))).all()
    if scan.color is not None:
        assert scan.color.dtype == np.uint8
        assert scan.color.shape == (rows, 3)
    if scan.normal is not None:
        assert scan.normal.dtype == np.float32
        assert scan.normal.shape == (rows, 3)
    if scan.intensity is not None:
        assert scan.intensity.dtype == np.float32
        assert scan.intensity.shape == (rows,)
        assert ((scan.intensity >= 0) & (scan.intensity <= 1)).all()


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())
