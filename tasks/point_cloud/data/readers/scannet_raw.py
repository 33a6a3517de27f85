# SPDX-License-Identifier: Apache-2.0
"""ScanNet as it is downloaded: one folder per scene with two meshes, whose vertices are the points.

``<id>_vh_clean_2.ply`` holds positions and colours, ``<id>_vh_clean_2.labels.ply`` the same vertices with a property
``label``: an NYU-40 id. 20 of the 40 names are classes, matched by name; the others are ignored.

Source: Dai et al. 2017 (CVPR), scan-net.org; signed terms, not redistributable.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Unpack

import numpy as np

from tasks.point_cloud.data.labels import label_set
from tasks.point_cloud.data.readers.arrays import read_text
from tasks.point_cloud.data.readers.label_sets import NYU40_RAW, id_table
from tasks.point_cloud.data.readers.ply import read_ply
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
from tasks.point_cloud.data.readers.values import make_scan, map_labels

_POINTS, _LABELS = "_vh_clean_2.ply", "_vh_clean_2.labels.ply"


class ScanNetMeshes(ScanReader):
    """ScanNet v2 from its own files, 20 classes, without preprocessing.

    Args:
        root: folder that holds ``scans/`` and the split lists.
        splits: text files below ``root``, one scene id per line; default the two of the benchmark, with the
            validation list for validation and test (the hidden test set has no labels).
        options: ``unit`` and ``drop_invalid``, as in `Scaling`; the meshes have no intensity.
    """

    layout: ClassVar[str] = f"scans/<id>/<id>{_POINTS}, scans/<id>/<id>{_LABELS} and lists of ids"
    source: ClassVar[str] = "ScanNet, signed terms at scan-net.org, not redistributable"

    def __init__(
        self, root: Path | str, splits: Mapping[str, list[str]] | None = None, **options: Unpack[ReaderOptions]
    ) -> None:
        super().__init__(root, label_set("scannet20"), Scaling(**options))
        val = ["scannetv2_val.txt"]
        self.splits = check_splits(splits or {"train": ["scannetv2_train.txt"], "val": val, "test": val})
        self._table = id_table(NYU40_RAW, {name: name for name in self.names}, self.names)

    def find(self, split: Split) -> list[ScanRef]:
        """List the scenes that the split's files name."""
        root = self.require_root()
        scenes = {line.strip() for part in self.splits[split] for line in read_text(root / part).splitlines()}
        folder = root / "scans"
        return [
            ScanRef(scene, folder / scene / f"{scene}{_POINTS}", folder / scene / f"{scene}{_LABELS}")
            for scene in sorted(scenes - {""})
        ]

    def read(self, ref: ScanRef) -> RawScan:
        """Read one scene; a missing labels file gives -1 everywhere and ``labelled=False``."""
        cloud = read_ply(ref.points)
        label = None
        if ref.labels is not None and ref.labels.exists():
            labels = read_ply(ref.labels)
            if "label" not in labels.vertex:
                given = f"vertex properties {', '.join(labels.vertex)}"
                raise PointCloudFileError(ref.labels, given, "a property 'label'", "download the labels file again")
            label = map_labels(ref.labels, labels.vertex["label"], self._table)
        xyz = np.stack([cloud.vertex[axis] for axis in "xyz"], axis=1)
        color, normal = cloud.stack("red", "green", "blue"), cloud.stack("nx", "ny", "nz")
        return make_scan(ref.points, self.names, self.scaling, xyz=xyz, color=color, normal=normal, label=label)
