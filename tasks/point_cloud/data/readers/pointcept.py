# SPDX-License-Identifier: Apache-2.0
"""Folders as Pointcept's preprocessing writes them: ScanNet, S3DIS, Structured3D, Matterport3D, Waymo.

One folder per scan: ``coord.npy`` float32 (R, 3), ``color.npy`` uint8 (R, 3), ``normal.npy`` float32 (R, 3),
``strength.npy`` float32 (R, 1) in [0, 1], ``segment.npy`` integers (R,) or (R, 1); ScanNet has ``segment20.npy`` and
``segment200.npy`` instead. Other files of the folder (instances, poses, pickled masks) are not touched.

Source: layout from Pointcept/Pointcept, pointcept/datasets/defaults.py and pointcept/datasets/preprocessing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Unpack

from moeapps.files import is_clutter, missing_part
from tasks.point_cloud.data.readers.arrays import COPY_AGAIN, read_npy
from tasks.point_cloud.data.readers.label_sets import named
from tasks.point_cloud.data.readers.scan import (
    PointCloudFileError,
    RawScan,
    ReaderOptions,
    Scaling,
    ScanReader,
    ScanRef,
    Split,
    check_splits,
)
from tasks.point_cloud.data.readers.values import index_labels, make_scan

_OPTIONAL = ("color", "normal", "strength")


class FolderOptions(ReaderOptions, total=False):
    """Options of every reader of folders: ``unit`` and ``drop_invalid``, and the full scale of ``strength.npy``."""

    strength_max: float


class PointceptFolders(ScanReader):
    """Scans in Pointcept's layout with any label set; the public data sets below are this with their own defaults.

    Args:
        root: folder of the preprocessed data set.
        label_set: key of a known label set, path of a YAML list of names, or the names, in the order on disk.
        splits: folders below ``root`` for train, val and test; every scan below them belongs to the split.
        segment: stem of the label file.
        strength_max: full scale of ``strength.npy``.
        options: ``unit`` and ``drop_invalid``, as in `Scaling`.
    """

    layout: ClassVar[str] = "folders with coord.npy, color.npy, normal.npy, strength.npy, segment.npy per scan"
    source: ClassVar[str] = "your own data, preprocessed into Pointcept's layout"

    def __init__(
        self,
        root: Path | str,
        label_set: str | list[str],
        splits: Mapping[str, list[str]],
        segment: str = "segment",
        strength_max: float = 1.0,
        **options: Unpack[ReaderOptions],
    ) -> None:
        scaling = Scaling(light_max=strength_max, light_option="strength_max", **options)
        super().__init__(root, named(label_set), scaling)
        self.splits = check_splits(splits)
        self.segment = segment

    def find(self, split: Split) -> list[ScanRef]:
        """List every folder with a ``coord.npy`` below the split's folders: all of them, never a sample.

        Links are followed, hidden folders are left out.

        Raises:
            PointCloudFileError: no such folder, a scan without ``coord.npy``, or a link to nothing.
        """
        root = self.require_root()
        found: list[ScanRef] = []
        for part in self.splits[split]:
            if not (root / part).is_dir():
                raise PointCloudFileError(
                    missing_part(root / part), "no such folder", self.layout, f"check `splits.{split}`"
                )
            for folder, below, files in os.walk(root / part, onerror=_refuse, followlinks=True):
                path = Path(folder)
                if "coord.npy" in files:
                    below.clear()  # a scan holds no scans
                    found.append(ScanRef(path.relative_to(root).as_posix(), path, path / f"{self.segment}.npy"))
                    continue
                lost = {f"{what}.npy" for what in (*_OPTIONAL, self.segment)} & set(files)
                if lost:
                    given = f"{min(lost)} without coord.npy"
                    raise PointCloudFileError(path, given, "coord.npy in the folder of a scan", COPY_AGAIN)
                if dead := next((path / name for name in files if not (path / name).exists()), None):
                    raise PointCloudFileError(dead, "a link to nothing", "a file or folder", "mend or remove it")
                below[:] = [name for name in below if not is_clutter(path / name) and not _is_circle(path / name)]
        return found

    def read(self, ref: ScanRef) -> RawScan:
        """Read one folder; a missing label file gives -1 everywhere and ``labelled=False``."""
        optional = {key: read_npy(path) for key in _OPTIONAL if (path := ref.points / f"{key}.npy").exists()}
        labels = ref.points / f"{self.segment}.npy"
        return make_scan(
            ref.points,
            self.names,
            self.scaling,
            xyz=read_npy(ref.points / "coord.npy"),
            label=index_labels(labels, read_npy(labels), self.names) if labels.exists() else None,
            color=optional.get("color"),
            normal=optional.get("normal"),
            intensity=optional.get("strength"),
        )


def _refuse(error: OSError) -> None:
    given = f"cannot be read ({error.strerror})"
    raise PointCloudFileError(error.filename, given, "a folder", "change its rights or mend the disk")


def _is_circle(path: Path) -> bool:
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def _folders(train: list[str], val: list[str], test: list[str] | None = None) -> Mapping[str, list[str]]:
    return {"train": train, "val": val, "test": test or val}  # mostly one set serves choices and tests


class _Published(PointceptFolders):
    """A public data set: its label set and the folders of its splits are known.

    Args:
        root: folder of the preprocessed data set.
        splits: folders below ``root`` for train, val and test; default those that the class names.
        options: ``unit``, ``drop_invalid`` and ``strength_max``, as for `PointceptFolders`.
    """

    classes: ClassVar[str]
    folders: ClassVar[Mapping[str, list[str]]] = _folders(["train"], ["val"])

    def __init__(
        self, root: Path | str, splits: Mapping[str, list[str]] | None = None, **options: Unpack[FolderOptions]
    ) -> None:
        super().__init__(root, self.classes, splits or self.folders, **options)


class ScanNetFolders(PointceptFolders):
    """ScanNet v2, 20 classes (Dai et al. 2017): ``train/`` to train on, ``val/`` to test on.

    Args:
        root: folder with ``train/`` and ``val/``.
        label_set: ``scannet20``; for 200 classes give a YAML list of names and ``segment: segment200``.
        segment: ``segment20`` or ``segment200``.
        splits: folders below ``root``; the hidden test set has no labels, so ``val`` serves validation and test.
        options: ``unit``, ``drop_invalid`` and ``strength_max``, as for `PointceptFolders`.
    """

    source: ClassVar[str] = (
        "ScanNet, signed terms at scan-net.org, not redistributable; Pointcept's preprocess_scannet.py"
    )

    def __init__(
        self,
        root: Path | str,
        label_set: str | list[str] = "scannet20",
        segment: str = "segment20",
        splits: Mapping[str, list[str]] | None = None,
        **options: Unpack[FolderOptions],
    ) -> None:
        super().__init__(root, label_set, splits or _Published.folders, segment, **options)


class S3DISFolders(_Published):
    """S3DIS, 13 classes (Armeni et al. 2016) in the order on disk, which starts with the ceiling.

    Below ``root`` lie ``Area_1/`` to ``Area_6/``, one folder per room; area 5 is tested on. Sorting the names by
    another vocabulary, as the released Point-MoE and PPT configurations do, teaches "wall" to ceilings; here the index
    on disk is an index into the label set and nothing else.
    """

    source = "S3DIS, terms form at Stanford; Pointcept's preprocess_s3dis.py"
    classes = "s3dis"
    folders = _folders([f"Area_{area}" for area in (1, 2, 3, 4, 6)], ["Area_5"])


class Structured3DFolders(_Published):
    """Structured3D, 25 classes (Zheng et al. 2020); all rooms, never a random tenth of them.

    Below ``root`` lie ``train/``, ``val/`` and ``test/``, below them scenes and rooms; ``val`` serves validation and
    test, as in the paper.
    """

    source = "Structured3D, terms form at structured3d-dataset.org; Pointcept's preprocess_structured3d.py"
    classes = "structured3d"


class Matterport3DFolders(_Published):
    """Matterport3D, 21 classes (Chang et al. 2017): ScanNet's first 19, then 19 = other and 20 = ceiling.

    Below ``root`` lie ``train/``, ``val/`` and ``test/``. The released Point-MoE configuration reads the last two
    classes in the opposite order.
    """

    source = "Matterport3D, signed terms; Pointcept's preprocess_matterport3d_mesh.py"
    classes = "matterport3d"
    folders = _folders(["train"], ["val"], ["test"])


class WaymoFolders(_Published):
    """Waymo Open Dataset, 22 classes (Sun et al. 2020): ``strength`` is tanh of the raw intensity.

    Below ``root`` lie ``training/`` and ``validation/``, below them sequences and frames.
    """

    source = "Waymo Open Dataset, licence at waymo.com/open; Pointcept's preprocess_waymo.py"
    classes = "waymo"
    folders = _folders(["training"], ["validation"])
