# SPDX-License-Identifier: Apache-2.0
"""The numbers of one file, checked against each other and brought into the form of `RawScan`.

All checks of a file's contents live here, so that a broken file ends in one sentence (``PointCloudFileError``) whatever
its format. Letters: R raw points, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.point_cloud.data.labels import IGNORE
from tasks.point_cloud.data.limits import FAR, MAX_EXTENT, coarse_step
from tasks.point_cloud.data.readers.scan import PointCloudFileError, RawScan, Scaling

log = logging.getLogger("moeapps")


def make_scan(
    path: Path | str,
    names: tuple[str, ...],
    scaling: Scaling,
    *,
    xyz: NDArray[Any],
    label: NDArray[np.int64] | None = None,
    color: NDArray[Any] | None = None,
    normal: NDArray[Any] | None = None,
    intensity: NDArray[Any] | None = None,
) -> RawScan:
    """Check the arrays of one file against each other and bring them into the common form.

    Normals are kept as they are: nothing is computed from them. An intensity or a colour that is 0 everywhere was never
    measured, and is None.

    Args:
        path: named in errors.
        names: class names; ``label`` must already be indices into them (see ``index_labels`` and ``map_labels``).
        scaling: unit and full scale of the numbers.
        xyz: numbers [R, 3].
        label: int64 [R] or [R, 1]; None means that the file has no labels.
        color: [R, 3] integers 0..255 or 0..65535, or floats in [0, 1] or [0, 255].
        normal: [R, 3].
        intensity: [R] or [R, 1], at least 0.

    Raises:
        PointCloudFileError: shapes disagree, values are not finite or out of range.
    """
    if xyz.ndim != 2 or xyz.shape[1] != 3 or xyz.dtype.kind not in "fiu":
        given = f"coordinates of shape {xyz.shape} and type {xyz.dtype}"
        raise PointCloudFileError(path, given, "numbers of shape (R, 3)", "write x, y, z per point")
    rows = len(xyz)
    arrays = {"xyz": xyz}
    for what, array, shape in (
        *(("label", label, (rows,)), ("color", color, (rows, 3))),
        *(("normal", normal, (rows, 3)), ("intensity", intensity, (rows,))),
    ):
        if array is not None:
            arrays[what] = array.reshape(-1) if array.shape == (rows, 1) else array
            _require_shape(path, what, arrays[what], shape)
    arrays = _without_invalid(path, arrays) if scaling.drop_invalid else arrays
    step = coarse_step(arrays["xyz"]) * scaling.unit
    xyz32, origin = _coordinates(path, arrays["xyz"], scaling)
    given_label = arrays.get("label")
    return RawScan(
        xyz=xyz32,
        label=np.full(len(xyz32), IGNORE, np.int64)
        if given_label is None
        else given_label.astype(np.int64, copy=False),
        names=names,
        path=str(path),
        color=_color(path, arrays["color"]) if _measured(arrays.get("color")) else None,
        normal=None if normal is None else arrays["normal"].astype(np.float32),
        intensity=_intensity(path, arrays["intensity"], scaling) if _measured(arrays.get("intensity")) else None,
        labelled=label is not None,
        origin=origin,
        step=step,
    )


def _measured(column: NDArray[Any] | None) -> bool:
    return column is not None and bool(column.any())


def _without_invalid(path: Path | str, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    keep = np.isfinite(arrays["xyz"]).all(1)
    if "intensity" in arrays and arrays["intensity"].dtype.kind == "f":
        keep &= np.isfinite(arrays["intensity"])
    if bool(keep.all()):
        return arrays
    log.info("%s: %d of %d points without a return were left out", path, int((~keep).sum()), len(keep))
    return {what: array[keep] for what, array in arrays.items()}


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
    path: Path | str, xyz: NDArray[Any], scaling: Scaling
) -> tuple[NDArray[np.float32], tuple[float, float, float]]:
    if not len(xyz):
        return np.zeros((0, 3), np.float32), (0.0, 0.0, 0.0)
    _require_finite(path, "coordinate", xyz, scaling)
    low, high = (edge.astype(np.float64) * scaling.unit for edge in (xyz.min(0), xyz.max(0)))
    extent = float((high - low).max())
    if extent > MAX_EXTENT:
        raise PointCloudFileError(
            path,
            f"coordinates that span {extent:.3g} m",
            f"a scan of at most {MAX_EXTENT:.0f} m",
            f"the file is damaged or in another unit: copy it again or {scaling.advice('unit')} (metres per unit)",
        )
    near = max(float(np.abs(low).max()), float(np.abs(high).max())) <= FAR
    origin = np.zeros(3) if near else np.floor(low)
    moved = np.empty(xyz.shape, np.float32)
    for axis in range(3):  # one axis at a time: scans are large
        moved[:, axis] = xyz[:, axis].astype(np.float64) * scaling.unit - origin[axis]
    return moved, (float(origin[0]), float(origin[1]), float(origin[2]))


def _color(path: Path | str, color: NDArray[Any]) -> NDArray[np.uint8]:
    if color.dtype == np.uint8:
        return np.asarray(color, np.uint8)
    if color.dtype.kind not in "fiu":
        raise PointCloudFileError(path, f"colours of type {color.dtype}", "numbers", "write red, green, blue")
    _require_finite(path, "colour", color, None)
    low, high = float(color.min()), float(color.max())
    top = 65535.0 if color.dtype == np.uint16 and high > 255 else 255.0
    if low < 0 or high > top:
        given = f"colours from {low:.4g} to {high:.4g}"
        raise PointCloudFileError(path, given, "0..255 (16 bit: 0..65535; floats also 0..1)", "rescale the colours")
    # Floats come in two habits; a scan whose brightest value is 1 of 255 would be black, so 1 is taken for white.
    scale = 255.0 if color.dtype.kind == "f" and high <= 1.0 else 255.0 / top
    return np.rint(color.astype(np.float64) * scale).astype(np.uint8)


def _intensity(path: Path | str, column: NDArray[Any], scaling: Scaling) -> NDArray[np.float32]:
    if column.dtype.kind not in "fiu":
        raise PointCloudFileError(path, f"intensities of type {column.dtype}", "numbers", "write numbers")
    _require_finite(path, "intensity", column, scaling)
    low, high, top = float(column.min()), float(column.max()), scaling.light_max
    if low < 0 or high > top * 1.001:
        raise PointCloudFileError(
            path,
            f"intensities from {low:.4g} to {high:.4g}",
            f"0..{top:g}",
            f"{scaling.advice(scaling.light_option)} to the sensor's full scale",
        )
    scaled: NDArray[np.float32] = np.minimum(column.astype(np.float64) / top, 1.0).astype(np.float32)
    return scaled


def _require_shape(path: Path | str, what: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        given = f"{what} of shape {array.shape} beside {shape[0]} points"
        raise PointCloudFileError(
            path, given, f"shape {shape}", "the file is truncated or belongs to another scan: copy or export it again"
        )


def _require_finite(path: Path | str, what: str, array: NDArray[Any], scaling: Scaling | None) -> None:
    if array.dtype.kind != "f" or bool(np.isfinite(array).all()):
        return
    row = int(np.argwhere(~np.isfinite(array))[0][0])
    advice = "copy the file again" if scaling is None else f"copy the file again, or {scaling.advice('drop_invalid')}"
    raise PointCloudFileError(path, f"a {what} that is not a number in row {row}", "finite values", advice)
