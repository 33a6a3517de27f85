# SPDX-License-Identifier: Apache-2.0
"""What every reader of point clouds returns, refuses and promises.

A reader lists the scans of a split and turns one of them into a ``RawScan``. All checks of a file's contents live
here, so that a broken file ends in one sentence (``PointCloudFileError``) whatever its format. Letters: R raw points,
C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.point_cloud.data.labels import IGNORE

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

MAX_EXTENT = 100_000.0
"""Largest side of a scan in metres; beyond it a coordinate is taken for damage, not for a measurement."""
FAR = 10_000.0
"""Coordinates beyond this many metres are stored relative to an origin: float32 keeps 1 mm only up to about 16 km."""


class PointCloudFileError(ValueError):
    """A file or folder is not in the format that it should have.

    Args:
        path: the file or folder.
        given: what was found.
        allowed: what would have been right.
        advice: what the user can do.
    """

    def __init__(self, path: Path | str, given: str, allowed: str, advice: str) -> None:
        super().__init__(f"{path}: {given}; expected {allowed}; {advice}")
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


class ScanReader(ABC):
    """A data set on disk: the names of its classes, its splits and how to read one scan.

    Args:
        root: folder of the data set; ``~`` is expanded. It is looked at when scans are listed, not here.
        names: class names in index order, without repeats; None for a subclass that reads them from its root.

    Raises:
        ValueError: no names, or a name twice.
    """

    layout: ClassVar[str]
    """What lies below ``root``, in one line."""
    source: ClassVar[str]
    """Where the data comes from and under which terms, in one line."""

    names: tuple[str, ...]

    def __init__(self, root: Path | str, names: tuple[str, ...] | None) -> None:
        self.root = Path(root).expanduser()
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

    def require_root(self) -> Path:
        """Return the root, or say how to get the data.

        Raises:
            PointCloudFileError: the root is not a folder.
        """
        if not self.root.is_dir():
            raise PointCloudFileError(
                self.root,
                "no such folder" if not self.root.exists() else "not a folder",
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


def make_scan(
    path: Path | str,
    names: tuple[str, ...],
    *,
    xyz: NDArray[Any],
    label: NDArray[np.int64] | None = None,
    color: NDArray[Any] | None = None,
    normal: NDArray[Any] | None = None,
    intensity: NDArray[Any] | None = None,
    unit: float = 1.0,
    intensity_max: float = 1.0,
) -> RawScan:
    """Check the arrays of one file against each other and bring them into the common form.

    Args:
        path: named in errors.
        names: class names; ``label`` must already be indices into them (see ``index_labels`` and ``map_labels``).
        xyz: numbers [R, 3] in ``unit`` metres.
        label: int64 [R] or [R, 1]; None means that the file has no labels.
        color: [R, 3] integers 0..255 or 0..65535, or floats in [0, 1] or [0, 255].
        normal: [R, 3].
        intensity: [R] or [R, 1] in [0, ``intensity_max``].
        unit: metres per unit of ``xyz``.
        intensity_max: value that becomes 1.

    Raises:
        PointCloudFileError: shapes disagree, values are not finite or out of range.
    """
    xyz32, origin = _coordinates(path, xyz, unit)
    rows = len(xyz32)
    return RawScan(
        xyz=xyz32,
        label=np.full(rows, IGNORE, np.int64)
        if label is None
        else _column(path, "label", label, rows).astype(np.int64),
        names=names,
        path=str(path),
        color=None if color is None else _color(path, color, rows),
        normal=None if normal is None else _normal(path, normal, rows),
        intensity=None if intensity is None else _intensity(path, intensity, rows, intensity_max),
        labelled=label is not None,
        origin=origin,
    )


def index_labels(path: Path | str, raw: NDArray[Any], names: tuple[str, ...]) -> NDArray[np.int64]:
    """Read labels that are already indices into ``names``.

    Negative values and 255 mean "ignore" (the two habits of preprocessed data). Any other value outside the names
    says that the file was written for another label set: reading on would teach wrong names.

    Raises:
        PointCloudFileError: not integers, or an index without a name.
    """
    label = _integers(path, raw)
    ignored = (label < 0) | ((label == 255) & (len(names) <= 255))
    beyond = label[~ignored & (label >= len(names))]
    if len(beyond):
        raise PointCloudFileError(
            path,
            f"label {int(beyond.max())} has no name ({len(names)} names, last {names[-1]!r})",
            f"0..{len(names) - 1}, or -1 or 255 for points to ignore",
            "choose the label set that this file was written for",
        )
    return np.where(ignored, IGNORE, label)


def map_labels(path: Path | str, raw: NDArray[Any], table: Mapping[int, int]) -> NDArray[np.int64]:
    """Look raw ids up in ``table`` (id -> index); ids that are not in it become -1.

    Raises:
        PointCloudFileError: the raw labels are not integers.
    """
    ids = _integers(path, raw)
    known = np.array(sorted(table), np.int64)
    if not len(known):
        return np.full(len(ids), IGNORE, np.int64)
    values = np.array([table[int(key)] for key in known], np.int64)
    place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[place] == ids, values[place], IGNORE)


def _integers(path: Path | str, raw: NDArray[Any]) -> NDArray[np.int64]:
    flat = raw.reshape(-1) if raw.ndim <= 2 and raw.shape[1:] in ((), (1,)) else raw
    if flat.ndim != 1:
        raise PointCloudFileError(path, f"labels of shape {raw.shape}", "(R,) or (R, 1)", "write one label per point")
    if flat.dtype.kind == "f" and bool(np.isfinite(flat).all()) and bool((flat == np.rint(flat)).all()):
        limit = float(np.abs(flat).max()) if len(flat) else 0.0
        flat = flat.astype(np.int64) if limit < 2.0**53 else flat
    if flat.dtype.kind not in "iub":
        raise PointCloudFileError(path, f"labels that are not whole numbers ({flat.dtype})", "integers", "write ids")
    return flat.astype(np.int64)


def _coordinates(
    path: Path | str, xyz: NDArray[Any], unit: float
) -> tuple[NDArray[np.float32], tuple[float, float, float]]:
    if xyz.ndim != 2 or xyz.shape[1] != 3 or xyz.dtype.kind not in "fiu":
        given = f"coordinates of shape {xyz.shape} and type {xyz.dtype}"
        raise PointCloudFileError(path, given, "numbers of shape (R, 3)", "write x, y, z per point")
    if not len(xyz):
        return np.zeros((0, 3), np.float32), (0.0, 0.0, 0.0)
    _require_finite(path, "coordinate", xyz)
    wide = xyz.astype(np.float64) * unit
    extent = float((wide.max(0) - wide.min(0)).max())
    if extent > MAX_EXTENT:
        raise PointCloudFileError(
            path,
            f"coordinates that span {extent:.3g} m",
            f"a scan of at most {MAX_EXTENT:.0f} m",
            "the file is damaged or in another unit: copy it again or set `unit` (metres per unit)",
        )
    if float(np.abs(wide).max()) <= FAR:
        return wide.astype(np.float32), (0.0, 0.0, 0.0)
    x, y, z = (float(value) for value in np.floor(wide.min(0)))
    return (wide - np.array((x, y, z))).astype(np.float32), (x, y, z)


def _color(path: Path | str, color: NDArray[Any], rows: int) -> NDArray[np.uint8]:
    _require_shape(path, "color", color, (rows, 3))
    if color.dtype == np.uint8:
        return np.asarray(color, np.uint8)
    if color.dtype.kind not in "fiu":
        raise PointCloudFileError(path, f"colours of type {color.dtype}", "numbers", "write red, green, blue")
    _require_finite(path, "colour", color)
    low, high = (float(color.min()), float(color.max())) if rows else (0.0, 0.0)
    top = 65535.0 if color.dtype == np.uint16 and high > 255 else 255.0
    if low < 0 or high > top:
        given = f"colours from {low:.4g} to {high:.4g}"
        raise PointCloudFileError(path, given, "0..255 (16 bit: 0..65535; floats also 0..1)", "rescale the colours")
    # Floats come in two habits; a scan whose brightest value is 1 of 255 would be black, so 1 is taken for white.
    scale = 255.0 if color.dtype.kind == "f" and high <= 1.0 else 255.0 / top
    return np.rint(color.astype(np.float64) * scale).astype(np.uint8)


def _normal(path: Path | str, normal: NDArray[Any], rows: int) -> NDArray[np.float32]:
    _require_shape(path, "normal", normal, (rows, 3))
    if normal.dtype.kind != "f":
        raise PointCloudFileError(path, f"normals of type {normal.dtype}", "floats", "write unit vectors")
    _require_finite(path, "normal", normal)
    longest = float(np.abs(normal).max()) if rows else 0.0
    if longest > 1.01:
        raise PointCloudFileError(path, f"a normal component of {longest:.4g}", "-1..1", "normalise or drop normals")
    return normal.astype(np.float32)


def _intensity(path: Path | str, intensity: NDArray[Any], rows: int, top: float) -> NDArray[np.float32]:
    column = _column(path, "intensity", intensity, rows)
    if column.dtype.kind not in "fiu":
        raise PointCloudFileError(path, f"intensities of type {column.dtype}", "numbers", "write numbers")
    _require_finite(path, "intensity", column)
    low, high = (float(column.min()), float(column.max())) if rows else (0.0, 0.0)
    if low < 0 or high > top * 1.001:
        raise PointCloudFileError(
            path,
            f"intensities from {low:.4g} to {high:.4g}",
            f"0..{top:g}",
            "set `intensity_max` to the sensor's full scale",
        )
    scaled: NDArray[np.float32] = np.minimum(column.astype(np.float64) / top, 1.0).astype(np.float32)
    return scaled


def _column(path: Path | str, what: str, array: NDArray[Any], rows: int) -> NDArray[Any]:
    flat = array.reshape(-1) if array.shape in ((rows,), (rows, 1)) else array
    _require_shape(path, what, flat, (rows,))
    return flat


def _require_shape(path: Path | str, what: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        given = f"{what} of shape {array.shape} beside {shape[0]} points"
        raise PointCloudFileError(
            path, given, f"shape {shape}", "the file is truncated or belongs to another scan: copy or export it again"
        )


def _require_finite(path: Path | str, what: str, array: NDArray[Any]) -> None:
    if array.dtype.kind != "f" or bool(np.isfinite(array).all()):
        return
    row = int(np.argwhere(~np.isfinite(array))[0][0])
    raise PointCloudFileError(
        path, f"a {what} that is not a number in row {row}", "finite values", "copy the file again or drop the row"
    )
