# SPDX-License-Identifier: Apache-2.0
"""nuScenes-lidarseg: key-frame sweeps with one byte of class per point.

``samples/LIDAR_TOP/*.pcd.bin`` holds five little-endian float32 per point (x, y, z in metres, intensity 0..255, ring),
20 R bytes; ``lidarseg/<version>/<token>_lidarseg.bin`` holds one byte per point, R bytes. Which file belongs to which
scene stands in the JSON tables of ``<version>/``; a CSV index (``points,labels,split``) does as well and needs none
of them.

Source: Caesar et al. 2020, Fong et al. 2022, nuscenes.org; licence CC BY-NC-SA.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

from moeapps.bounds import BoundError, check_rows
from tasks.point_cloud.data.labels import label_set
from tasks.point_cloud.data.readers.arrays import read_records, read_text
from tasks.point_cloud.data.readers.label_sets import NUSCENES_CLASSES, NUSCENES_RAW, id_table
from tasks.point_cloud.data.readers.scan import (
    SPLITS,
    PointCloudFileError,
    RawScan,
    ReaderOptions,
    Scaling,
    ScanReader,
    ScanRef,
    Split,
    check_splits,
)
from tasks.point_cloud.data.readers.semantic_kitti import require_points
from tasks.point_cloud.data.readers.values import make_scan, map_labels

_COLUMNS = ("points", "labels", "split")
_KEY_FRAMES = "samples/LIDAR_TOP/"
_FULL_SCALE = 255.0


class _Sweeps(ScanReader):
    """What both indices share: the two binary files of a sweep."""

    source: ClassVar[str] = "nuScenes with the lidarseg extension, CC BY-NC-SA, nuscenes.org"

    def __init__(self, root: Path | str, intensity_max: float, **options: Unpack[ReaderOptions]) -> None:
        super().__init__(root, label_set("nuscenes"), Scaling(light_max=intensity_max, **options))
        self._ids = id_table(NUSCENES_RAW, NUSCENES_CLASSES, self.names)

    def read(self, ref: ScanRef) -> RawScan:
        """Read one sweep; without a label file in the index all labels are -1 and ``labelled=False``.

        A label file that the index names must be there: without it one would train on nothing.
        """
        points = read_records(ref.points, "<f4", 5)
        raw = None if ref.labels is None else read_records(ref.labels, "u1", 1)
        require_points(ref, len(points), raw)
        return make_scan(
            ref.points,
            self.names,
            self.scaling,
            xyz=points[:, :3],
            intensity=points[:, 3],
            label=None if raw is None else map_labels(ref.points, raw, self._ids),
        )


class NuScenes(_Sweeps):
    """nuScenes-lidarseg, 16 classes, found through the JSON tables.

    Which scenes are for training stands in no table but in the code of the development kit. Write it once:
    ``python -c "import json; from nuscenes.utils.splits import create_splits_scenes as s;
    json.dump(s(), open('splits.json', 'w'))"``.

    Args:
        root: the folder that holds ``samples/``, ``lidarseg/`` and the tables.
        version: folder of the tables, ``v1.0-trainval`` or ``v1.0-mini``.
        scenes: JSON file ``{split name: [scene names]}``, relative to ``root``.
        splits: split names of that file that make up train, val and test.
        intensity_max: full scale of the fourth number; 255 in nuScenes.
        options: ``unit`` and ``drop_invalid``, as in `Scaling`.
    """

    layout: ClassVar[str] = "samples/LIDAR_TOP/, lidarseg/<version>/, <version>/*.json and splits.json"

    def __init__(
        self,
        root: Path | str,
        version: str = "v1.0-trainval",
        scenes: str = "splits.json",
        splits: Mapping[str, list[str]] | None = None,
        intensity_max: float = _FULL_SCALE,
        **options: Unpack[ReaderOptions],
    ) -> None:
        super().__init__(root, intensity_max, **options)
        self.version = version
        self.scene_file = self.root / scenes
        self.splits = check_splits(splits or {"train": ["train"], "val": ["val"], "test": ["val"]})

    def find(self, split: Split) -> list[ScanRef]:
        """List the LiDAR key frames of the split's scenes.

        Raises:
            PointCloudFileError: a table is missing or damaged, or refers to rows that are not there.
        """
        root = self.require_root()
        self._check_categories()
        names = {row["name"]: row["token"] for row in self._table("scene", ("token", "name"))}
        sample_scene = {row["token"]: row["scene_token"] for row in self._table("sample", ("token", "scene_token"))}
        frames = [
            row
            for row in self._table("sample_data", ("token", "sample_token", "filename"))
            if row["filename"].startswith(_KEY_FRAMES)
        ]
        labels = {
            row["sample_data_token"]: row["filename"]
            for row in self._table("lidarseg", ("sample_data_token", "filename"))
        }
        wanted = self._scene_names(split)
        self._require("scene", wanted, names)
        self._require("scene", set(sample_scene.values()), set(names.values()))
        self._require("sample", (row["sample_token"] for row in frames), sample_scene)
        self._require("sample_data", labels, {row["token"] for row in frames})
        scenes = {names[name] for name in wanted}
        return [
            ScanRef(_stem(row["filename"]), root / row["filename"], _below(root, labels.get(row["token"], "")))
            for row in frames
            if sample_scene[row["sample_token"]] in scenes
        ]

    def _require(self, table: str, wanted: Iterable[str], present: Container[str]) -> None:
        missing = next((key for key in wanted if key not in present), None)
        if missing is not None:
            path = self.root / self.version / f"{table}.json"
            advice = f"check `version` and {self.scene_file.name}, or download the tables again"
            raise PointCloudFileError(path, f"no row for {missing!r}", "tables and splits of one version", advice)

    def _check_categories(self) -> None:
        """Refuse a copy that numbers the raw classes in another way than the published one."""
        rows = [row for row in self._table("category", ("name",)) if "index" in row]
        given = {row["index"]: row["name"] for row in rows if type(row["index"]) is int}
        if rows and given != NUSCENES_RAW:
            path = self.root / self.version / "category.json"
            differs = sorted(set(given.items()) ^ set(NUSCENES_RAW.items()))
            raise PointCloudFileError(
                path, f"other class numbers ({differs[:2]})", "those of lidarseg v1.0", "download the tables again"
            )

    def _scene_names(self, split: Split) -> set[str]:
        path = self.scene_file
        content = _json(path)
        parts = self.splits[split]
        if not isinstance(content, dict) or not all(_is_names(content.get(part)) for part in parts):
            given = f"no list of scene names for {parts}"
            raise PointCloudFileError(
                path, given, "{split name: [scene names]}", "write it as NuScenes' docstring says"
            )
        return {name for part in parts for name in content[part]}

    def _table(self, name: str, fields: Sequence[str]) -> list[dict[str, Any]]:
        path = self.root / self.version / f"{name}.json"
        rows = _json(path)
        if not isinstance(rows, list) or not all(_has(row, fields) for row in rows):
            allowed = f"a list of objects with {', '.join(fields)}"
            raise PointCloudFileError(path, "another structure", allowed, "download the tables of this version again")
        return rows


class NuScenesIndex(_Sweeps):
    """nuScenes-lidarseg found through a CSV file with the columns points, labels, split.

    Args:
        root: the folder that the paths in the index start from.
        index: CSV file relative to ``root``; ``labels`` may be empty, ``split`` is train, val or test.
        intensity_max: full scale of the fourth number; 255 in nuScenes.
        options: ``unit`` and ``drop_invalid``, as in `Scaling`.
    """

    layout: ClassVar[str] = "a CSV index with the columns points,labels,split and the files it names"

    def __init__(
        self,
        root: Path | str,
        index: str = "index.csv",
        intensity_max: float = _FULL_SCALE,
        **options: Unpack[ReaderOptions],
    ) -> None:
        super().__init__(root, intensity_max, **options)
        self.index = index

    def find(self, split: Split) -> list[ScanRef]:
        """List the rows of the index that belong to ``split``."""
        root = self.require_root()
        return [
            ScanRef(_stem(row["points"]), root / row["points"], _below(root, row["labels"]))
            for row in _index_rows(root / self.index)
            if row["split"] == split
        ]


def _stem(filename: str) -> str:
    return Path(filename).name.removesuffix(".pcd.bin")


def _below(root: Path, relative: str) -> Path | None:
    return root / relative if relative else None


def _index_rows(path: Path) -> list[dict[str, str]]:
    text = read_text(path)
    try:
        check_rows(path, line=420)  # a dict of three texts
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except BoundError as error:
        raise PointCloudFileError(path, str(error), "one row per sweep", "split it into several files") from None
    except csv.Error:
        rows = [{}]
    if not all(set(row) == set(_COLUMNS) and row["split"] in SPLITS and row["points"] for row in rows):
        raise PointCloudFileError(
            path,
            "a row or header that is not an index",
            f"the columns {','.join(_COLUMNS)} and a split of {', '.join(SPLITS)}",
            "write one row per sweep",
        )
    return rows


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, PointCloudFileError):
            raise
        raise PointCloudFileError(path, "text that is not JSON", "a JSON table", "download or write it again") from None


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _has(row: object, fields: Sequence[str]) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(field), str) for field in fields)
