# SPDX-License-Identifier: Apache-2.0
"""Writers of the public layouts, for tests of their readers: Pointcept, SemanticKITTI, ScanNet's meshes, nuScenes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.point_cloud.data.readers import RawScan, write_ply
from tasks.point_cloud.data.readers.arrays import write_npy
from tasks.point_cloud.data.readers.label_sets import (
    KITTI_CLASSES,
    KITTI_RAW,
    NUSCENES_CLASSES,
    NUSCENES_RAW,
    NYU40_RAW,
)


def write_pointcept_scan(folder: Path, scan: RawScan, *, segment: str = "segment", column: bool = False) -> None:
    """Write ``scan`` in Pointcept's layout.

    Args:
        folder: folder of this scan; made if missing.
        scan: what to write; no label file is written when it is not labelled.
        segment: stem of the label file.
        column: write labels as (R, 1), as some preprocessing does, instead of (R,).
    """
    write_npy(folder / "coord.npy", scan.xyz if not any(scan.origin) else scan.world_xyz())
    if scan.color is not None:
        write_npy(folder / "color.npy", scan.color)
    if scan.normal is not None:
        write_npy(folder / "normal.npy", scan.normal)
    if scan.intensity is not None:
        write_npy(folder / "strength.npy", scan.intensity[:, None])
    if scan.labelled:
        label = scan.label.astype(np.int16)
        write_npy(folder / f"{segment}.npy", label[:, None] if column else label)


def _raw_ids(scan: RawScan, raw: Mapping[int, str], classes: Mapping[str, str]) -> NDArray[np.int64]:
    """Return one raw id per point: the smallest that means the point's class, 0 for ignored points."""
    first = {name: min(key for key, value in raw.items() if classes.get(value) == name) for name in scan.names}
    table = np.array([first[name] for name in scan.names] + [0], np.int64)  # index -1 is the last row
    return table[scan.label]


def write_kitti_frame(
    root: Path, sequence: str, frame: str, scan: RawScan, *, instance: NDArray[np.integer] | None = None
) -> None:
    """Write ``scan`` as one SemanticKITTI frame.

    Args:
        root: the folder that holds ``sequences/``.
        sequence: two digits.
        frame: six digits.
        scan: its names must be the 19 classes; no label file is written when it is not labelled.
        instance: uint16 instance number per point for the high bits.

    Raises:
        ValueError: an empty scan without labels, which could not be told from a failed copy.
    """
    if not len(scan) and not scan.labelled:
        raise ValueError("an empty scan without labels cannot be written in this format; leave it out")
    folder = root / "sequences" / sequence
    intensity = np.zeros(len(scan), np.float32) if scan.intensity is None else scan.intensity
    for part in ("velodyne", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    points = np.concatenate([scan.world_xyz(), intensity[:, None]], axis=1)
    (folder / "velodyne" / f"{frame}.bin").write_bytes(points.astype("<f4").tobytes())
    if scan.labelled:
        ids = _raw_ids(scan, KITTI_RAW, KITTI_CLASSES)
        high = np.zeros(len(scan), np.int64) if instance is None else instance.astype(np.int64)
        (folder / "labels" / f"{frame}.label").write_bytes((ids | high << 16).astype("<u4").tobytes())


def write_scannet_scene(root: Path, scene: str, scan: RawScan) -> None:
    """Write ``scan`` as the two meshes of one ScanNet scene (without faces).

    Args:
        root: folder that holds ``scans/``.
        scene: scene id.
        scan: its names must be the 20 classes; no labels file is written when it is not labelled.
    """
    nyu40 = {name: key for key, name in NYU40_RAW.items()}
    ids = np.array([nyu40[name] for name in scan.names] + [0], np.uint16)  # index -1 is the last entry: 0, unannotated
    color = np.zeros((len(scan), 3), np.uint8) if scan.color is None else scan.color
    points = scan.xyz if not any(scan.origin) else scan.world_xyz()
    vertex = {
        **dict(zip("xyz", points.T, strict=True)),
        **dict(zip(("red", "green", "blue"), color.T, strict=True)),
        "alpha": np.full(len(scan), 255, np.uint8),
    }
    write_ply(root / "scans" / scene / f"{scene}_vh_clean_2.ply", vertex)
    if scan.labelled:
        write_ply(root / "scans" / scene / f"{scene}_vh_clean_2.labels.ply", {**vertex, "label": ids[scan.label]})


def _write_sweep(root: Path, name: str, scan: RawScan, version: str) -> tuple[str, str]:
    if not len(scan) and not scan.labelled:
        raise ValueError("an empty scan without labels cannot be written in this format; leave it out")
    points, labels = f"samples/LIDAR_TOP/{name}.pcd.bin", f"lidarseg/{version}/{name}_lidarseg.bin"
    intensity = np.zeros(len(scan), np.float32) if scan.intensity is None else scan.intensity * np.float32(255.0)
    ring = np.zeros(len(scan), np.float32)
    for path in (root / points, root / labels):
        path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.concatenate([scan.world_xyz(), intensity[:, None], ring[:, None]], axis=1)
    (root / points).write_bytes(rows.astype("<f4").tobytes())
    if scan.labelled:
        (root / labels).write_bytes(_raw_ids(scan, NUSCENES_RAW, NUSCENES_CLASSES).astype("u1").tobytes())
    return points, labels if scan.labelled else ""


def write_nuscenes(
    root: Path, scans: Mapping[str, Sequence[RawScan]], *, version: str = "v1.0-mini", index: str | None = None
) -> None:
    """Write scans as a tiny nuScenes: sweeps, labels, and either the JSON tables or a CSV index.

    Args:
        root: folder to write into; made if missing.
        scans: scans per split; with tables every split is one scene of the same name.
        version: folder of the tables.
        index: name of a CSV index to write instead of the tables.
    """
    written = [
        (split, f"{split}_{number:03d}", *_write_sweep(root, f"{split}_{number:03d}", scan, version))
        for split, group in scans.items()
        for number, scan in enumerate(group)
    ]
    if index is not None:
        sweeps = (f"{points},{labels},{split}" for split, _, points, labels in written)
        lines = ["points,labels,split", *sweeps]
        (root / index).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    tables: dict[str, list[dict[str, Any]]] = {
        "scene": [{"token": f"s_{split}", "name": f"scene-{split}"} for split in scans],
        "sample": [{"token": f"f_{name}", "scene_token": f"s_{split}"} for split, name, _, _ in written],
        "sample_data": [
            {"token": f"d_{name}", "sample_token": f"f_{name}", "filename": points} for _, name, points, _ in written
        ],
        "lidarseg": [
            {"token": f"d_{n}", "sample_data_token": f"d_{n}", "filename": labels}
            for _, n, _, labels in written
            if labels
        ],
        "category": [{"token": f"c_{key}", "name": name, "index": key} for key, name in NUSCENES_RAW.items()],
    }
    (root / version).mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (root / version / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (root / "splits.json").write_text(json.dumps({split: [f"scene-{split}"] for split in scans}), encoding="utf-8")
