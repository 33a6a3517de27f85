# SPDX-License-Identifier: Apache-2.0
"""SemanticKITTI: ``sequences/SS/velodyne/NNNNNN.bin`` and ``sequences/SS/labels/NNNNNN.label``.

A ``.bin`` file holds four little-endian float32 per point (x, y, z in metres, remission in [0, 1]), 16 R bytes. A
``.label`` file holds one little-endian uint32 per point, 4 R bytes: the low 16 bits are the class, the high 16 bits
the instance.

Source: Behley et al. 2019 (ICCV), semantic-kitti.org; licence CC BY-NC-SA.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Unpack

import numpy as np
from numpy.typing import NDArray

from moeapps.files import is_clutter, missing_part
from tasks.point_cloud.data.labels import label_set
from tasks.point_cloud.data.readers.arrays import COPY_AGAIN, read_records
from tasks.point_cloud.data.readers.label_sets import KITTI_CLASSES, KITTI_RAW, id_table
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

_INSTANCE_BITS = 16


class SemanticKITTI(ScanReader):
    """SemanticKITTI, 19 classes; any other data in its layout and with its ids can be read as well.

    Args:
        root: the folder that holds ``sequences/`` (in the download: ``dataset``).
        splits: sequences per split; default train 00-07, 09, 10 and 08 for validation and test (11-21 have no labels).
        intensity_max: full scale of the fourth number; 1 in SemanticKITTI.
        options: ``unit`` and ``drop_invalid``, as in `Scaling`.
    """

    layout: ClassVar[str] = "sequences/SS/velodyne/NNNNNN.bin and sequences/SS/labels/NNNNNN.label"
    source: ClassVar[str] = "SemanticKITTI, CC BY-NC-SA, semantic-kitti.org"

    def __init__(
        self,
        root: Path | str,
        splits: Mapping[str, list[str]] | None = None,
        intensity_max: float = 1.0,
        **options: Unpack[ReaderOptions],
    ) -> None:
        super().__init__(root, label_set("semantickitti"), Scaling(light_max=intensity_max, **options))
        train = [f"{sequence:02d}" for sequence in (0, 1, 2, 3, 4, 5, 6, 7, 9, 10)]
        self.splits = check_splits(splits or {"train": train, "val": ["08"], "test": ["08"]})
        self._table = id_table(KITTI_RAW, KITTI_CLASSES, self.names)

    def find(self, split: Split) -> list[ScanRef]:
        """List the frames of the split's sequences."""
        root = self.require_root() / "sequences"
        found: list[ScanRef] = []
        for sequence in self.splits[split]:
            folder = root / sequence / "velodyne"
            if not folder.is_dir():
                raise PointCloudFileError(
                    missing_part(folder), "no such folder", self.layout, f"check root and `splits.{split}`"
                )
            found += [
                ScanRef(f"{sequence}/{path.stem}", path, root / sequence / "labels" / f"{path.stem}.label")
                for path in sorted(folder.iterdir())
                if path.suffix.lower() == ".bin" and not is_clutter(path)
            ]
        return found

    def read(self, ref: ScanRef) -> RawScan:
        """Read one frame; a missing label file gives -1 everywhere and ``labelled=False``."""
        points = read_records(ref.points, "<f4", 4)
        raw = read_records(ref.labels, "<u4", 1) if ref.labels is not None and ref.labels.exists() else None
        require_points(ref, len(points), raw)
        return make_scan(
            ref.points,
            self.names,
            self.scaling,
            xyz=points[:, :3],
            intensity=points[:, 3],
            label=None if raw is None else map_labels(ref.points, raw & ((1 << _INSTANCE_BITS) - 1), self._table),
        )


def require_points(ref: ScanRef, points: int, raw: NDArray[np.generic] | None) -> None:
    """Refuse files without a header whose point and label counts disagree.

    A file of zero bytes is an empty scan only when the label file is one, too; alone it is a failed copy.

    Raises:
        PointCloudFileError: the counts differ, or there are no points and no label file says so.
    """
    if raw is None and not points:
        raise PointCloudFileError(ref.points, "an empty file", "at least one point", COPY_AGAIN)
    if raw is not None and len(raw) != points:
        raise PointCloudFileError(
            ref.labels or ref.points, f"{len(raw)} labels for {points} points", "one label per point", COPY_AGAIN
        )
