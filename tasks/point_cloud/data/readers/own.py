# SPDX-License-Identifier: Apache-2.0
"""A user's own scans: ``root/<domain>/<split>/*.npy|npz|ply|las|laz`` and one ``labels.yaml``.

``labels.yaml`` lies in ``root/<domain>/`` (or in ``root/`` for all domains) and says what the numbers in the files
mean; ``docs/point_cloud_formats.md`` explains each key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml
from numpy.typing import NDArray

from moeapps.bounds import BoundError, read_yaml
from moeapps.files import is_clutter
from tasks.point_cloud.data.labels import IGNORE
from tasks.point_cloud.data.readers.arrays import read_npy, read_npz, read_text, write_npy, write_npz
from tasks.point_cloud.data.readers.las import LasError, read_las, write_las
from tasks.point_cloud.data.readers.ply import read_ply, write_ply
from tasks.point_cloud.data.readers.scan import PointCloudFileError, RawScan, Scaling, ScanReader, ScanRef, Split
from tasks.point_cloud.data.readers.values import index_labels, make_scan, map_labels

FORMATS = (".npy", ".npz", ".ply", ".las", ".laz")
SIDECARS = (".lax", ".prj", ".wkt", ".xml", ".db", ".ini")
"""Endings of what other programs lay beside scans (indices, reference systems, thumbnails); such files are skipped."""
COLUMNS = ("x", "y", "z", "red", "green", "blue", "nx", "ny", "nz", "intensity", "label")
_LAS_FULL_SCALE, _LAS_BLANK = 65_535.0, (0, 1, 255)
_COLOR, _NORMAL = ("red", "green", "blue"), ("nx", "ny", "nz")
_KEYS = ("names", "ignore", "unit", "intensity_max", "drop_invalid", "columns", "label")
_ALIASES: dict[str, tuple[str, ...]] = {
    **{"red": ("red", "r"), "green": ("green", "g"), "blue": ("blue", "b")},
    "intensity": ("intensity", "scalar_intensity", "reflectance", "remission", "strength"),
    "label": (
        *("label", "labels", "class", "classification", "scalar_label", "scalar_classification", "semantic", "segment"),
        *("sem_class", "scalar_sem_class"),
    ),
}
"""Property names (in lower case) that mean a column; point-cloud editors put ``scalar_`` before their fields."""
_NPZ: dict[str, tuple[str, ...]] = {
    **{"xyz": ("xyz", "coord", "points", "pos"), "color": ("color", "colors", "rgb"), "normal": ("normal", "normals")},
    **{"intensity": _ALIASES["intensity"], "label": _ALIASES["label"]},
}


@dataclass(frozen=True)
class OwnLabels:
    """What ``labels.yaml`` says.

    Args:
        names: class names in index order.
        table: raw id -> index when the file maps ids to names; None when labels are indices already.
        ignore: raw ids that mean "no label".
        unit: metres per unit of the coordinates.
        intensity_max: full scale of the intensity; None means 65535 for LAS and 1 for the others.
        columns: meaning of the columns of plain .npy arrays, "-" for a column to skip; empty: x, y, z.
        label: name of the label column where a file offers several, any field of a LAS file; empty: the usual names.
        drop_invalid: leave points out whose coordinates or intensity are no numbers.
    """

    names: tuple[str, ...]
    table: dict[int, int] | None = None
    ignore: tuple[int, ...] = ()
    unit: float = 1.0
    intensity_max: float | None = None
    columns: tuple[str, ...] = ()
    label: str = ""
    drop_invalid: bool = False


def read_own_labels(path: Path) -> OwnLabels:
    """Read and check ``labels.yaml``.

    Raises:
        PointCloudFileError: missing, not YAML, an unknown key, or a value of the wrong kind.
    """
    try:
        read_text(path)  # with its own words for what cannot be read
        content = read_yaml(path)
    except BoundError as error:
        given = str(error).removeprefix(f"{path}: ")
        raise PointCloudFileError(path, given, "key: value lines", "mend or rewrite it") from None
    except yaml.YAMLError:
        raise PointCloudFileError(path, "text that is not YAML", "key: value lines", "mend or rewrite it") from None
    if not isinstance(content, dict) or not set(content) <= set(_KEYS) or "names" not in content:
        given = f"the keys {', '.join(map(str, content))}" if isinstance(content, dict) else "no keys"
        raise PointCloudFileError(path, given, f"names, and if needed {', '.join(_KEYS[1:])}", "rename or drop keys")
    names, table = _names(path, content["names"])
    return OwnLabels(
        names=names,
        table=table,
        ignore=tuple(_list(path, content, "ignore", int)),
        unit=_positive(path, content, "unit"),
        intensity_max=_positive(path, content, "intensity_max") if "intensity_max" in content else None,
        columns=_columns(path, _list(path, content, "columns", str)),
        label=_list(path, {"label": [content.get("label", "")]}, "label", str)[0],
        drop_invalid=_list(path, {"drop_invalid": [content.get("drop_invalid", False)]}, "drop_invalid", bool)[0],
    )


def _names(path: Path, value: object) -> tuple[tuple[str, ...], dict[int, int] | None]:
    if isinstance(value, list) and value and all(isinstance(n, str) for n in value) and len(set(value)) == len(value):
        return tuple(value), None
    if isinstance(value, dict) and value and all(type(k) is int and isinstance(n, str) for k, n in value.items()):
        names = tuple(dict.fromkeys(value.values()))
        return names, {key: names.index(name) for key, name in value.items()}
    allowed = "a list of different class names, or a mapping of raw ids to class names"
    raise PointCloudFileError(path, f"names: {value!r}", allowed, "write names as text (quote words like 'no' or 'on')")


def _list(path: Path, content: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    value = content.get(key, [])
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise PointCloudFileError(path, f"{key}: {value!r}", f"{kind.__name__} entries", "write it as [a, b, c]")
    return value


def _positive(path: Path, content: Mapping[str, Any], key: str) -> float:
    value = content.get(key, 1.0)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise PointCloudFileError(path, f"{key}: {value!r}", "a number above 0", "give it, or drop the line for 1")
    return float(value)


def _columns(path: Path, value: list[str]) -> tuple[str, ...]:
    named = [name for name in value if name != "-"]
    if value and (set(named) - set(COLUMNS) or len(set(named)) < len(named) or not {"x", "y", "z"} <= set(named)):
        allowed = f"x, y, z and any of {', '.join(COLUMNS[3:])}, each once, '-' to skip one"
        raise PointCloudFileError(path, f"columns: {value}", allowed, "name the columns of your .npy files in order")
    return tuple(value)


class OwnScans(ScanReader):
    """Your own scans in a plain layout: ``root/<domain>/<split>/*.npy|npz|ply|las|laz``, named by ``labels.yaml``.

    Args:
        root: folder of your data.
        domain: folder below it, one per sensor or place.
    """

    layout: ClassVar[str] = (
        "<domain>/labels.yaml and <domain>/<train|val|test>/ with .npy, .npz, .ply, .las or .laz files"
    )
    source: ClassVar[str] = "your own data; docs/point_cloud_formats.md describes the layout"

    def __init__(self, root: Path | str, domain: str) -> None:
        self.base = Path(root).expanduser()
        super().__init__(self.base / domain, None)

    @cached_property
    def labels(self) -> OwnLabels:
        """What ``labels.yaml`` says; read when it is first asked for.

        Raises:
            PointCloudFileError: it is missing or wrong.
        """
        for path in (self.root / "labels.yaml", self.base / "labels.yaml"):
            if path.exists():
                return read_own_labels(path)
        self.require_root()  # of a folder that is not there no file is missed
        advice = "write it (docs/point_cloud_formats.md), or set `root` and `domain` of this reader"
        raise PointCloudFileError(self.root / "labels.yaml", "no such file", "the class names, names: [a, b]", advice)

    @cached_property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Class names in index order."""
        return self.labels.names

    @cached_property
    def scaling(self) -> Scaling:  # type: ignore[override]
        """Unit and full scale as ``labels.yaml`` gives them."""
        return _scaling(self.labels, 1.0)

    def find(self, split: Split) -> list[ScanRef]:
        """List the files of a split's folder.

        Raises:
            PointCloudFileError: no such folder, two files of one name, a file of another kind, a folder, or a link to
                nothing.
        """
        folder = self.require_root() / split
        if not folder.is_dir():
            raise PointCloudFileError(folder, "no such folder", self.layout, f"make it and put {split} scans there")
        files = [p for p in folder.iterdir() if not is_clutter(p) and p.suffix.lower() not in SIDECARS]
        wrong = sorted(path.name for path in files if path.suffix.lower() not in FORMATS or not path.is_file())
        if wrong or len({path.stem for path in files}) < len(files):
            given = f"{wrong[0]!r}" if wrong else "two files that differ in their ending only"
            raise PointCloudFileError(
                folder, given, f"one file per scan of {', '.join(FORMATS)}, no folders", "move others out"
            )
        return [ScanRef(path.stem, path) for path in files]

    def read(self, ref: ScanRef) -> RawScan:
        """Read one file; without a label column all labels are -1 and ``labelled=False``."""
        return read_own_scan(ref.points, self.labels)

    def fingerprint(self) -> object:
        """What ``labels.yaml`` says."""
        return repr(self.labels)


def read_own_scan(path: Path, labels: OwnLabels, *, labelled: bool = True) -> RawScan:
    """Read one .npy, .npz, .ply, .las or .laz file as ``labels`` says, without its labels if ``labelled`` is False.

    Raises:
        PointCloudFileError: damaged, of another format, or not as ``labels`` says.
    """
    match path.suffix.lower():
        case ".npy":
            arrays = _group(path, _npy_columns(path, labels), labels)
        case ".npz":
            arrays = _npz_arrays(path, labels)
        case ".ply":
            arrays = _group(path, _renamed(path, read_ply(path).vertex, labels), labels)
        case ".las" | ".laz":
            arrays = _las_arrays(path, labels)
        case suffix:
            raise PointCloudFileError(path, f"a {suffix or 'nameless'} file", ", ".join(FORMATS), "convert it")
    raw, withheld = arrays.pop("label", None), arrays.pop("withheld", None)
    label = None if raw is None or not labelled else _indices(path, raw, labels)
    if label is not None and withheld is not None:
        label = np.where(withheld, IGNORE, label)
    scaling = _scaling(labels, _LAS_FULL_SCALE if path.suffix.lower() in (".las", ".laz") else 1.0)
    return make_scan(path, labels.names, scaling, label=label, **_required(path, arrays))


def _scaling(labels: OwnLabels, full_scale: float) -> Scaling:
    return Scaling(labels.unit, labels.intensity_max or full_scale, labels.drop_invalid, where="in labels.yaml")


def _required(path: Path, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    if "xyz" not in arrays:
        raise PointCloudFileError(path, f"only {', '.join(arrays) or 'unknown'} arrays", "x, y, z", "add coordinates")
    return arrays


def _indices(path: Path, raw: NDArray[Any], labels: OwnLabels) -> NDArray[np.int64]:
    if labels.table is not None:
        table = {key: index for key, index in labels.table.items() if key not in labels.ignore}
        return map_labels(path, raw, table)
    if raw.dtype.kind in "iuf" and labels.ignore:
        raw = np.where(
            np.isin(raw, labels.ignore), IGNORE, raw.astype(np.float64 if raw.dtype.kind == "f" else np.int64)
        )
    return index_labels(path, raw, labels.names)


def _npy_columns(path: Path, labels: OwnLabels) -> dict[str, NDArray[Any]]:
    array = read_npy(path)
    if array.dtype.names is not None:
        return _renamed(path, {name: array[name].reshape(-1) for name in array.dtype.names}, labels)
    columns = labels.columns or ("x", "y", "z")
    if array.ndim != 2 or array.shape[1] != len(columns):
        allowed = f"(R, {len(columns)}): {', '.join(columns)}"
        raise PointCloudFileError(path, f"shape {array.shape}", allowed, "list the file's columns in labels.yaml")
    return {name: array[:, place] for place, name in enumerate(columns) if name != "-"}


def _npz_arrays(path: Path, labels: OwnLabels) -> dict[str, NDArray[Any]]:
    aliases = {**_NPZ, "label": (labels.label,)} if labels.label else _NPZ
    arrays = read_npz(path, tuple(key for keys in aliases.values() for key in keys))
    return {what: arrays[_one(path, what, keys, arrays)] for what, keys in aliases.items() if set(keys) & set(arrays)}


def _las_arrays(path: Path, labels: OwnLabels) -> dict[str, NDArray[Any]]:
    try:
        cloud = read_las(path)
        cloud.require_metres(path.name)
        classes = cloud.column(labels.label or "classification")
    except LasError as error:
        raise PointCloudFileError(path, str(error), "a LAS or LAZ file as labels.yaml says", "see the reason") from None
    arrays: dict[str, NDArray[Any]] = {"xyz": cloud.pos, "intensity": cloud.intensity}
    if cloud.rgb is not None:
        arrays["color"] = cloud.rgb
    withheld = cloud.withheld
    if labels.label or not _is_blank(classes[~withheld], labels.table):
        arrays["label"] = classes
    return {**arrays, "withheld": withheld} if bool(withheld.any()) else arrays


def _is_blank(classes: NDArray[np.uint8], table: Mapping[int, int] | None) -> bool:
    """Whether a LAS file was never classified: all points 0 or all 1 (the standard's two words for it), or all 255."""
    only = int(classes[0]) if len(classes) and bool((classes == classes[0]).all()) else None
    return only in _LAS_BLANK and (table is None or only not in table)


def _renamed(path: Path, columns: Mapping[str, NDArray[Any]], labels: OwnLabels) -> dict[str, NDArray[Any]]:
    """Return columns under our names, whatever the writing program called them."""
    lower = {name.lower(): name for name in columns}
    aliases = {name: _ALIASES.get(name, (name,)) for name in COLUMNS}
    if labels.label:
        aliases["label"] = (labels.label.lower(),)
    return {
        what: columns[lower[_one(path, what, keys, lower)]] for what, keys in aliases.items() if set(keys) & set(lower)
    }


def _one(path: Path, what: str, keys: tuple[str, ...], found: Mapping[str, Any]) -> str:
    present = [key for key in keys if key in found]
    if len(present) > 1:
        advice = "set `label` in labels.yaml" if what == "label" else "keep one of them"
        raise PointCloudFileError(path, f"{', '.join(present)}, which all mean {what}", "one of them", advice)
    return present[0]


def _group(path: Path, columns: dict[str, NDArray[Any]], labels: OwnLabels) -> dict[str, NDArray[Any]]:
    """Join single columns to xyz, color and normal."""
    arrays: dict[str, NDArray[Any]] = {}
    for what, parts in (("xyz", ("x", "y", "z")), ("color", _COLOR), ("normal", _NORMAL)):
        present = [name for name in parts if name in columns]
        if present and len(present) < 3:
            raise PointCloudFileError(path, f"only {', '.join(present)}", f"{', '.join(parts)}", "add or skip columns")
        if present:
            arrays[what] = np.stack([columns[name] for name in parts], axis=1)
    return {**arrays, **{name: columns[name] for name in ("intensity", "label") if name in columns}}


def write_own_scan(path: Path, scan: RawScan) -> None:
    """Write ``scan`` in the format of the path's ending; labels are indices, intensity is in [0, 1].

    A .npy file becomes a structured array (one named field per column), which needs no ``columns`` to be read again.
    A .las or .laz file keeps millimetres, no normals, and has class 255 for points without a label.

    Raises:
        ValueError: the ending is not one that can be written.
    """
    points = scan.xyz if not any(scan.origin) else scan.world_xyz()
    if path.suffix in (".las", ".laz"):
        _write_las(path, scan)
        return
    if path.suffix == ".npz":
        arrays = {"xyz": points, "color": scan.color, "normal": scan.normal, "intensity": scan.intensity}
        label = scan.label if scan.labelled else None
        write_npz(path, {key: value for key, value in {**arrays, "label": label}.items() if value is not None})
        return
    columns: dict[str, NDArray[Any]] = dict(zip("xyz", points.T, strict=True))
    for names, values in ((_COLOR, scan.color), (_NORMAL, scan.normal)):
        if values is not None:
            columns.update(zip(names, values.T, strict=True))
    if scan.intensity is not None:
        columns["intensity"] = scan.intensity
    if scan.labelled:
        columns["label"] = scan.label.astype(np.int32)
    if path.suffix == ".ply":
        write_ply(path, columns, comments=tuple(f"label {index} {name}" for index, name in enumerate(scan.names)))
    elif path.suffix == ".npy":
        rows = np.empty(len(scan), [(name, column.dtype) for name, column in columns.items()])
        for name, column in columns.items():
            rows[name] = column
        write_npy(path, rows)
    else:
        raise ValueError(f"{path.name}: no writer for {path.suffix!r}; allowed: {', '.join(FORMATS)}")


def _write_las(path: Path, scan: RawScan) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    zero = np.zeros(len(scan), np.float32)
    write_las(
        path,
        scan.world_xyz(),
        classification=np.where(scan.label < 0, 255, scan.label).astype(np.uint8),
        intensity=np.rint((zero if scan.intensity is None else scan.intensity) * _LAS_FULL_SCALE).astype(np.uint16),
        rgb=None if scan.color is None else scan.color.astype(np.uint16) * 257,  # 255 -> 65535
        point_format=6 if scan.color is None else 7,
    )


def write_own_labels(path: Path, labels: OwnLabels) -> None:
    """Write ``labels.yaml``."""
    content: dict[str, Any] = {"names": list(labels.names)}
    if labels.table is not None:
        content["names"] = {key: labels.names[index] for key, index in labels.table.items()}
    content["unit"] = labels.unit
    for key in ("intensity_max", "ignore", "columns", "label", "drop_invalid"):
        if value := getattr(labels, key):
            content[key] = list(value) if isinstance(value, tuple) else value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
