# SPDX-License-Identifier: Apache-2.0
"""Folders of scans: every scan is found, in capitals and through links, or what would be lost is refused by name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readers_common import LAYOUTS, OWN_NAMES

from tasks.point_cloud.data.readers import (
    OwnLabels,
    OwnScans,
    PointceptFolders,
    PointCloudFileError,
    read_own_scan,
    write_ply,
)
from tasks.point_cloud.data.readers.arrays import write_npy

FEW = settings(deadline=None, max_examples=max(1, settings().max_examples // 2))


@pytest.mark.parametrize("what", ["folder", "link", "folder.las"])
def test_what_would_be_lost_beside_own_scans_is_refused_by_name(what: str, tmp_path: Path) -> None:
    LAYOUTS["own_ply"].make(tmp_path)
    lost = tmp_path / "yard" / "train" / ("more.ply" if what == "link" else what)
    lost.symlink_to(tmp_path / "gone.ply") if what == "link" else lost.mkdir()

    with pytest.raises(PointCloudFileError, match=f"'{lost.name}'; expected one file per scan"):
        OwnScans(tmp_path, "yard").scans("train")


@FEW
@given(
    tree=st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join), min_size=1, max_size=6),
    linked=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_folders_of_scans_are_found_at_any_depth_and_through_links(tree: list[str], linked: list[bool]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "train").mkdir()
        for number, (place, link) in enumerate(zip(tree, linked, strict=False)):
            scan = (root / "train" / place / f"s{number}") if not link else root / "store" / f"s{number}"
            write_npy(scan / "coord.npy", np.zeros((1, 3), np.float32))
            if link:
                (root / "train" / place).mkdir(parents=True, exist_ok=True)
                (root / "train" / place / f"s{number}").symlink_to(scan, target_is_directory=True)
        (root / "train" / tree[0] / "back").symlink_to(root / "train", target_is_directory=True)
        write_npy(root / "train" / ".Trash" / "old" / "coord.npy", np.zeros((1, 3), np.float32))
        found = PointceptFolders(root, ["a"], {"train": ["train"]}).scans("train")

    assert [ref.name for ref in found] == sorted(f"train/{place}/s{number}" for number, place in enumerate(tree))


@pytest.mark.parametrize("part", ["color", "normal", "strength", "segment"])
def test_a_folder_that_lost_its_coordinates_is_named(part: str, tmp_path: Path) -> None:
    for scan in ("one", "two"):
        write_npy(tmp_path / "train" / scan / "coord.npy", np.zeros((1, 3), np.float32))
    write_npy(tmp_path / "train" / "two" / f"{part}.npy", np.zeros(1, np.float32))
    (tmp_path / "train" / "two" / "coord.npy").unlink()

    with pytest.raises(PointCloudFileError, match=f"two: {part}.npy without coord.npy"):
        PointceptFolders(tmp_path, ["a"], {"train": ["train"]}).scans("train")


def test_a_dead_link_and_a_locked_folder_among_scans_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = PointceptFolders(tmp_path, ["a"], {"train": ["train"]})
    write_npy(tmp_path / "train" / "one" / "coord.npy", np.zeros((1, 3), np.float32))
    (tmp_path / "train" / "two").symlink_to(tmp_path / "gone")
    with pytest.raises(PointCloudFileError, match="two: a link to nothing"):
        reader.scans("train")
    (tmp_path / "train" / "two").unlink()
    open_folder = os.scandir

    def locked(path: Any) -> Any:
        if Path(path).name == "one":
            raise PermissionError(13, "Permission denied", str(path))
        return open_folder(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(PointCloudFileError, match=r"one: cannot be read \(Permission denied\)"):
        reader.scans("train")


def test_capitals_and_forks_of_kitti_frames(tmp_path: Path) -> None:
    reader, _ = LAYOUTS["kitti"].make(tmp_path)
    folder = tmp_path / "sequences" / "00" / "velodyne"
    (folder / "000001.BIN").write_bytes((folder / "000000.bin").read_bytes())
    (folder / "._000000.bin").write_bytes(b"fork")

    assert [ref.name for ref in reader.scans("train")] == ["00/000000", "00/000001"]


def test_an_index_that_a_spreadsheet_wrote_is_read(tmp_path: Path) -> None:
    reader, _ = LAYOUTS["nuscenes_csv"].make(tmp_path)
    path = tmp_path / "index.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    assert len(reader.scans("train")) == 1


@pytest.mark.parametrize("suffix", [".ply", ".npz"])
def test_the_plural_names_the_labels_as_well(suffix: str, tmp_path: Path) -> None:
    path, xyz, label = tmp_path / f"a{suffix}", np.zeros((3, 3)), np.arange(3, dtype=np.int32)
    if suffix == ".ply":
        write_ply(path, {**dict(zip("xyz", xyz.T, strict=True)), "labels": label})
    else:
        np.savez(path, xyz=xyz, labels=label)

    assert read_own_scan(path, OwnLabels(OWN_NAMES)).label.tolist() == [0, 1, 2]
