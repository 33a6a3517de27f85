# SPDX-License-Identifier: Apache-2.0
"""What every reader of point clouds returns, refuses and promises.

A reader lists the scans of a split and turns one of them into a ``RawScan``; ``values.py`` checks what it read.
Letters: R raw points, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from moeapps.files import missing_part
from moeapps.text import plain

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class PointCloudFileError(ValueError):
    """A file or folder is not in the format that it should have.

    Args:
        path: the file or folder.
        given: what was found.
        allowed: what would have been right.
        advice: what the user can do.
    """

    def __init__(self, path: Path | str, given: str, allowed: str, advice: str) -> None:
        super().__init__(f"{plain(path, 1000)}: {given}; expected {allowed}; {advice}")
        self.path = str(path)


@dataclass(frozen=True, eq=False)
class RawScan:
    """One scan as it is on disk, with labels as indices into its own names.

    Args:
        xyz: float32 [R, 3], metres, relative to ``origin``.
        label: int64 [R], index into ``names``; -1 is ignored by losses and metrics.
        names: class names in index order.
        path: file or folder it was read from (empty when it was made in memory).
        color: uint8 [R, 3] red, green, blue, or None.
        normal: float32 [R, 3], or None.
        intensity: float32 [R] in [0, 1], or None.
        labelled: False when the file holds no labels at all; ``label`` is then -1 everywhere.
        origin: world coordinates of (0, 0, 0) in metres; not zero only for scans far from it (map projections).
        step: metres between neighbouring coordinates where float32 had cut them before they were read; 0 where not.
    """

    xyz: NDArray[np.float32]
    label: NDArray[np.int64]
    names: tuple[str, ...]
    path: str = ""
    color: NDArray[np.uint8] | None = None
    normal: NDArray[np.float32] | None = None
    intensity: NDArray[np.float32] | None = None
    labelled: bool = True
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    step: float = 0.0

    def __len__(self) -> int:
        return len(self.xyz)

    def world_xyz(self) -> NDArray[np.float64]:
        """Return the coordinates in the file's own frame, float64 [R, 3], metres."""
        return np.asarray(self.xyz.astype(np.float64) + np.asarray(self.origin), np.float64)


@dataclass(frozen=True)
class ScanRef:
    """Where one scan lies.

    Args:
        name: unique within its split; used in predictions and tables.
        points: file or folder with the coordinates.
        labels: file with the labels when it is another one; it need not exist.
    """

    name: str
    points: Path
    labels: Path | None = None


@dataclass(frozen=True)
class Scaling:
    """How the numbers of a file become metres and light.

    Args:
        unit: metres per unit of the coordinates.
        light_max: intensity that becomes 1.
        drop_invalid: leave points out whose coordinates or intensity are no numbers (pulses without a return).
        light_option: what the user calls ``light_max``.
        where: where the user sets these.

    Raises:
        ValueError: a factor that is not positive.
    """

    unit: float = 1.0
    light_max: float = 1.0
    drop_invalid: bool = False
    light_option: str = "intensity_max"
    where: str = "of this reader"

    def __post_init__(self) -> None:
        for name, value in (("unit", self.unit), (self.light_option, self.light_max)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} is not allowed; use a number above 0")

    def advice(self, option: str) -> str:
        """Tell the user to set one of the options."""
        return f"set `{option}` {self.where}"


class ReaderOptions(TypedDict, total=False):
    """Options of every reader: ``unit`` and ``drop_invalid`` of `Scaling`."""

    unit: float
    drop_invalid: bool


class ScanReader(ABC):
    """A data set on disk: the names of its classes, its splits and how to read one scan.

    Args:
        root: folder of the data set; ``~`` is expanded. It is looked at when scans are listed, not here.
        names: class names in index order, without repeats; None for a subclass that reads them from its root.
        scaling: how numbers become metres and light; None for a subclass that reads it from its root.

    Raises:
        ValueError: no names, or a name twice.
    """

    layout: ClassVar[str]
    """What lies below ``root``, in one line."""
    source: ClassVar[str]
    """Where the data comes from and under which terms, in one line."""

    names: tuple[str, ...]
    scaling: Scaling

    def __init__(self, root: Path | str, names: tuple[str, ...] | None, scaling: Scaling | None = None) -> None:
        self.root = Path(root).expanduser()
        if scaling is not None:
            self.scaling = scaling
        if names is None:
            return
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names must be a non-empty list without repeats, got {list(names)}; merge equal classes")
        self.names = tuple(names)

    def scans(self, split: Split) -> list[ScanRef]:
        """List the scans of ``split``, sorted by name: the same files give the same list on every machine.

        Raises:
            PointCloudFileError: the root or an index file is missing or unreadable, or there is no scan.
        """
        found = sorted(self.find(split), key=lambda ref: ref.name)
        if not found:
            raise PointCloudFileError(self.root, f"no {split} scan", self.layout, "check the root and the splits")
        return found

    @abstractmethod
    def find(self, split: Split) -> list[ScanRef]:
        """Find the scans of ``split``, in any order."""

    @abstractmethod
    def read(self, ref: ScanRef) -> RawScan:
        """Read one scan.

        Raises:
            PointCloudFileError: the file is missing, truncated or holds what it cannot hold.
        """

    def fingerprint(self) -> object:
        """What decides, beside the files, how many points and voxels a scan has; part of the keys of caches."""
        return repr(self.scaling)

    def require_root(self) -> Path:
        """Return the root, or say how to get the data.

        Raises:
            PointCloudFileError: the root is not a folder.
        """
        if not self.root.is_dir():
            missing = missing_part(self.root)
            raise PointCloudFileError(
                missing,
                "no such folder" if not missing.exists() else "not a folder",
                self.layout,
                f"get the data ({self.source}) and set `root` of this reader",
            )
        return self.root


def check_splits(splits: Mapping[str, list[str]]) -> dict[Split, list[str]]:
    """Return ``splits`` with every split present.

    Raises:
        ValueError: a key is not train, val or test.
    """
    unknown = sorted(set(splits) - set(SPLITS))
    if unknown:
        raise ValueError(f"splits {unknown} are unknown; allowed: {', '.join(SPLITS)}; rename them")
    return {split: list(splits.get(split, ())) for split in SPLITS}
