# SPDX-License-Identifier: Apache-2.0
"""Public data sets and a user's own folders as domains of `PointCloudData`, read scan by scan.

`PublicScans` is a `PointSource`: real, simulated and own domains stand side by side in one data module and share its
crops, tiles, augmentation and features. `StreamedScans` gives the very items that `ScanDataset` would give if all
scans were in memory, but holds one scan at a time.
"""

from __future__ import annotations

import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from moeapps.data.cache import build_once, cache_dir, config_hash
from tasks.point_cloud.data.dataset import Scan, ScanDataset
from tasks.point_cloud.data.features import count_cells, luminance, normal_z
from tasks.point_cloud.data.limits import check_scan
from tasks.point_cloud.data.readers.scan import PointCloudFileError, RawScan, ScanReader, ScanRef, Split
from tasks.point_cloud.data.scans import UNLABELLED, ScanArrays
from tasks.point_cloud.data.scene import Floats
from tasks.point_cloud.data.sources import PointSource

log = logging.getLogger("moeapps")


class PublicScans(PointSource):
    """A data set on disk as one domain.

    Args:
        reader: knows the layout, the splits and the class names (``tasks.point_cloud.data.readers``).
        voxel: voxel edge, metres (paper: 0.02 indoors, 0.05 for driving).
        indoor: rooms or open air; matters for ``features: paper`` only.
        optional: a missing root drops the domain with one plain line (True), or stops before training (False).

    Raises:
        ValueError: a voxel that is not positive.
    """

    def __init__(self, *, reader: ScanReader, voxel: float, indoor: bool = False, optional: bool = False) -> None:
        if voxel <= 0:
            raise ValueError(f"voxel={voxel} must be positive; the paper uses 0.02 m indoors and 0.05 m for driving")
        self.reader, self.voxel, self.indoor, self.optional = reader, voxel, indoor, optional

    @cached_property
    def label_set(self) -> tuple[str, ...]:  # type: ignore[override]
        """Class names in the order of their indices.

        Raises:
            ValueError: more names than a byte can count, or the file that holds them is missing or wrong.
        """
        names = self.reader.names
        if len(names) > UNLABELLED:
            raise ValueError(f"{len(names)} class names; at most {UNLABELLED} are allowed, merge some")
        return names

    @override
    def missing(self, cache: Path | None) -> str | None:
        try:
            self.reader.require_root()
        except PointCloudFileError as error:
            return str(error)
        return None

    def scans(self, split: Split, cache: Path | None, domain: str = "") -> list[ScanArrays]:
        """Read all scans of one split into memory; `dataset` does not, use it for large data sets."""
        return [self.arrays(self.read(ref, domain), ref, split) for ref in self.reader.scans(split)]

    def read(self, ref: ScanRef, domain: str) -> RawScan:
        """Read one scan and see whether voxels and curves can hold it.

        Raises:
            PointCloudFileError: the file is damaged.
            ScanError: its coordinates are not what the domain's voxel needs.
        """
        raw = self.reader.read(ref)
        check_scan(raw.xyz, self.voxel, raw.step, ref.name, domain, self.reader.scaling.advice("unit"))
        return raw

    def arrays(self, raw: RawScan, ref: ScanRef, split: Split) -> ScanArrays:
        """Bring a scan into the form that all domains share.

        Raises:
            PointCloudFileError: it has no labels and is one of the training split.
        """
        if split == "train" and not raw.labelled:
            raise PointCloudFileError(
                ref.labels or ref.points, "no labels", "labels for every training scan", "add them or drop the scan"
            )
        return to_arrays(raw, ref.name, self.voxel)

    def dataset(self, split: Split, cache: Path | None, **view: Any) -> ScanDataset:
        """Return the items of one split without holding its scans; ``view`` as for `ScanDataset`."""
        return StreamedScans(self, split, cache, **view)

    @override
    def describe(self) -> str:
        return f"{type(self.reader).__name__} ({self.reader.source})"


def to_arrays(raw: RawScan, name: str, voxel: float) -> ScanArrays:
    """Convert a scan of any reader to the form that all domains share.

    Light is the intensity, or the luminance of the colour, or nothing. Normals come from the points themselves in
    every domain, since files that bring their own would tell the network where they come from.

    Args:
        raw: the scan.
        name: its unique name.
        voxel: edge of the cells that normals are computed over, metres.
    """
    light: Floats
    if raw.intensity is not None:
        light = raw.intensity
    elif raw.color is not None:
        light = luminance(raw.color, 255)
    else:
        light = np.zeros(len(raw), np.float32)
    pos, middle = _centred(raw), _middle(raw)
    x, y, z = (float(value) for value in np.asarray(raw.origin) + middle)
    up = normal_z(pos, voxel) if len(pos) else np.zeros(0, np.float32)
    label = np.where(raw.label < 0, UNLABELLED, raw.label).astype(np.uint8)
    return ScanArrays(name=name, pos=pos, light=light, up=up, label=label, words=raw.names, origin=(x, y, z))


def _middle(raw: RawScan) -> NDArray[np.float64]:
    return (raw.xyz.min(0).astype(np.float64) + raw.xyz.max(0)) / 2 if len(raw) else np.zeros(3)


def _centred(raw: RawScan) -> Floats:
    return np.asarray(raw.xyz - _middle(raw), np.float32)


def num_tiles(num_voxels: int, max_voxels: int) -> int:
    """Return how many parts `tile_columns` makes of so many voxels."""
    return -(-num_voxels // max_voxels)


class StreamedScans(ScanDataset):
    """Crops or tiles of scans that are read when they are asked for.

    Item i equals item i of a `ScanDataset` over the same scans in memory. How many tiles each scan has is counted
    once (it needs every point) and kept in the cache under the names, sizes and times of the files and what the reader
    makes of them. The scan that was counted last, the first of the list, is not read again for its tiles. Empty scans
    have no tile; a training crop of one is taken from the next scan that is not empty.

    Args:
        source: reads a scan.
        split: which scans.
        cache: folder of the cache, None for the default.
        view: as for `ScanDataset`.
    """

    def __init__(self, source: PublicScans, split: Split, cache: Path | None, **view: Any) -> None:
        super().__init__([], **view)
        self.view = view
        self.source, self.split = source, split
        self.refs = source.reader.scans(split)
        self._held: tuple[int, ScanDataset] | None = None
        self._raw: tuple[int, RawScan] | None = None
        counts = [] if self.train else self._counts(cache)
        self.starts = np.concatenate([[0], np.cumsum(np.array(counts, np.int64))])

    def num_labels(self) -> int | None:
        """Return None: counting labels would read every scan."""
        return None

    def __len__(self) -> int:
        return len(self.refs) * self.crops if self.train else int(self.starts[-1])

    def __getitem__(self, index: int) -> Scan:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        if not self.train:
            scan = int(np.searchsorted(self.starts, index, side="right")) - 1
            return self._one(scan)[index - int(self.starts[scan])]
        for step in range(len(self.refs)):
            one = self._one((index + step) % len(self.refs))
            if one.scans:
                one.clock = self.clock
                return one[index]
        raise ValueError(f"all {self.split} scans of domain {self.domain!r} are empty; check {self.source.reader.root}")

    def _one(self, scan: int) -> ScanDataset:
        """Return the data set of one scan; the last one is held, since its tiles follow one another."""
        if self._held is None or self._held[0] != scan:
            self._held = None  # frees the memory of the scan before
            raw, self._raw = self._read(scan), None
            arrays = self.source.arrays(raw, self.refs[scan], self.split)
            del raw
            # The generator of a crop is drawn from the index: one scan must accept all indices.
            view = {**self.view, "crops": max(len(self), 1)}
            one = ScanDataset([arrays] if len(arrays) else [], **view)
            counted = len(one) if self.train else int(self.starts[scan + 1] - self.starts[scan])
            if counted != len(one):
                raise RuntimeError(
                    f"scan {arrays.name} of domain {self.domain!r} has {len(one)} tiles, counted were {counted}: its "
                    "file has changed since this run began; start again"
                )
            self._held = (scan, one)
        return self._held[1]

    def _read(self, scan: int) -> RawScan:
        """Read a scan; the last one is kept until it is tiled."""
        if self._raw is None or self._raw[0] != scan:
            self._raw = None
            self._raw = (scan, self.source.read(self.refs[scan], self.domain))
        return self._raw[1]

    def _counts(self, cache: Path | None) -> list[int]:
        files = [(ref.name, *_stamp(ref.points)) for ref in self.refs]
        reader = self.source.reader
        made_by = [type(reader).__name__, reader.fingerprint()]
        key = config_hash([str(reader.root.resolve()), files, self.voxel, self.max_voxels, made_by])
        path = cache_dir("point_cloud", root=cache) / f"tiles-{self.domain}-{key}.json"

        def write(target: Path) -> None:
            log.info("counting the tiles of %d %s scans of %s", len(self.refs), self.split, self.domain)
            counts = [self._count(scan) for scan in reversed(range(len(self.refs)))]
            target.write_text(json.dumps(counts[::-1]), encoding="utf-8")

        counts: list[int] = json.loads(build_once(path, write).read_text(encoding="utf-8"))
        return counts

    def _count(self, scan: int) -> int:
        raw = self._read(scan)
        if not len(raw):
            log.warning("scan %s of %s is empty and is left out", self.refs[scan].name, self.domain)
            return 0
        # The coordinates that the tiles will see: moving a cloud can change which voxel a point falls into.
        return num_tiles(count_cells(_centred(raw), self.voxel), self.max_voxels)


def _stamp(path: Path) -> tuple[int, int]:
    points = path / "coord.npy" if path.is_dir() else path
    try:
        status = points.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
