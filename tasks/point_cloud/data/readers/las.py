# SPDX-License-Identifier: Apache-2.0
"""LAS and LAZ, the exchange formats of airborne laser scanning, read and written by laspy.

laspy believes the header: it takes the memory that the header asks for, and reads on when the file ends early. So sizes
and counts are checked against the file here before laspy sees it, and the coordinates against the box of the header
afterwards.

Source: ASPRS, LAS Specification 1.4 - R15, table 3 (header).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import laspy
import lazrs
import numpy as np
import numpy.typing as npt

from moeapps.bounds import BoundError, require_file
from moeapps.files import place_of
from tasks.point_cloud.data.readers.laz import LazSizeError, check_laz

_LAZ_POINTS_PER_BYTE = 100
"""More than any compressor reaches on points that differ: a larger count in a header is damage."""
_FULL_CIRCLE = 360.0
_GEOGRAPHIC, _MODEL_KEY = 2, 1024  # GeoTIFF: GTModelTypeGeoKey, ModelTypeGeographic
WRITABLE = (0, 1, 2, 3, 6, 7, 8)
"""Point formats that can be written."""


class LasError(ValueError):
    """A file is not LAS or LAZ, is damaged, or is not in metres."""


@dataclass(frozen=True, eq=False)
class LasCloud:
    """Points of one file.

    Args:
        pos: [N, 3] float64 coordinates in the unit of the file.
        points: all fields as laspy gives them.
        geographic: the header says that x and y are degrees, and they may be.
    """

    pos: npt.NDArray[np.float64]
    points: Any
    geographic: bool = False

    def __len__(self) -> int:
        return len(self.pos)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Fields by laspy's names, extra attributes by their own."""
        return tuple(self.points.point_format.dimension_names)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return one field [N], scaled and moved as the file says; capitals and blanks of its name do not matter.

        Raises:
            LasError: the file has no such field, or it holds several numbers per point.
        """
        found = sorted(
            (known for known in self.names if _plain(known) == _plain(name)), key=lambda known: known != name
        )
        if not found:
            raise LasError(f"no field {name!r}; there are {', '.join(self.names)}")
        field = next(kind for kind in self.points.point_format.dimensions if kind.name == found[0])
        # A copy: a view would keep the whole records in memory.
        values = np.array(self.points[field.name] if field.is_standard else self.points.array[field.name])
        if values.ndim > 1:
            raise LasError(f"field {name!r} holds {values.shape[1]} numbers per point; name one of one number")
        scaled = not field.is_standard and field.is_scaled
        return values * field.scales[0] + field.offsets[0] if scaled else values

    @property
    def classification(self) -> npt.NDArray[np.uint8]:
        """[N] ASPRS class."""
        return self.column("classification").astype(np.uint8)

    @property
    def intensity(self) -> npt.NDArray[np.uint16]:
        """[N] uint16."""
        return self.column("intensity")

    @property
    def withheld(self) -> npt.NDArray[np.bool_]:
        """[N] points that the producer says should not be used."""
        return self.column("withheld").astype(bool)

    @property
    def rgb(self) -> npt.NDArray[np.uint16] | None:
        """[N, 3] uint16, or None where the point format has no colour."""
        return np.stack([self.column(c) for c in ("red", "green", "blue")], 1) if "red" in self.names else None

    def require_metres(self, name: str) -> None:
        """Refuse degrees.

        Raises:
            LasError: the header says that x and y are longitude and latitude.
        """
        if self.geographic:
            low, high = self.pos.min(0).round(5).tolist(), self.pos.max(0).round(5).tolist()
            raise LasError(
                f"{name} holds degrees (its header names a geographic system; x, y, z from {low} to {high}); "
                "project it to metres, e.g. to UTM"
            )


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def read_las(path: Path | str) -> LasCloud:
    """Read a LAS or LAZ file.

    Raises:
        LasError: missing, cut short, damaged or neither LAS nor LAZ.
    """
    path = Path(path)
    count = _checked_count(path)
    try:
        # The parallel form starts threads that a forked loader worker would wait for in vain.
        with laspy.open(path, read_evlrs=False, laz_backend=laspy.LazBackend.Lazrs) as file:
            file.header.point_count = count  # laspy reads the new count alone, some writers fill the old one alone
            _rename_doubles(file.header.point_format)
            points = file.read_points(-1)
            header = file.header
    except (laspy.errors.LaspyException, RuntimeError, ValueError, OSError, MemoryError, struct.error) as error:
        raise LasError(f"{place_of(path)} cannot be read: {error}; fetch it again") from error
    except BaseException as error:
        # The decompressor is Rust: a damaged chunk can end in its panic, which does not derive from Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise LasError(f"{place_of(path)} is damaged: {error}; fetch it again") from error
    if len(points) != count:
        raise LasError(f"{place_of(path)} is damaged: {len(points)} of {count} points can be read; fetch it again")
    pos = np.empty((count, 3))
    for axis, (name, scale, offset) in enumerate(zip("XYZ", header.scales, header.offsets, strict=True)):
        pos[:, axis] = points.array[name] * scale + offset
    _check_bounds(pos, header, place_of(path))
    return LasCloud(pos, points, _is_geographic(header, pos))


def _checked_count(path: Path) -> int:
    """Return how many points the file holds, after checking that it can hold what its header says."""
    try:
        size = require_file(path)
        with path.open("rb") as file:
            head = file.read(375)
    except BoundError as error:
        raise LasError(str(error)) from error
    except OSError as error:
        raise LasError(
            f"cannot read {path} ({str(error.strerror).lower()}); give the path of a .las or .laz file"
        ) from error
    if head[:4] != b"LASF":
        raise LasError(f"{place_of(path)} is not a LAS file: it does not begin with LASF")
    header_size, start, num_vlrs, kind, length, count = struct.unpack_from("<HIIBHI", head.ljust(375, b"\0"), 94)
    if len(head) < 227 or size < max(header_size, start):
        raise LasError(f"{place_of(path)} is cut short: {size} bytes, its points begin at byte {start}; fetch it again")
    if start < header_size or num_vlrs * 54 > start - header_size:
        raise LasError(
            f"{place_of(path)} is damaged: header of {header_size} bytes, {num_vlrs} records, points at byte {start}"
        )
    minor, compressed, kind = head[25], bool(kind & 0xC0), kind & 0x3F  # bit 7; old writers set bit 6 too
    if minor >= 4:
        large = struct.unpack_from("<Q", head.ljust(375, b"\0"), 247)[0]
        if kind < 6 and count != large and 0 < large < 2**32 and not compressed:
            raise LasError(f"{place_of(path)} is damaged: its header gives both {count} and {large} points")
        count = large or count
    elif kind >= 6:
        raise LasError(f"{place_of(path)} is damaged: point format {kind} in LAS 1.{minor}, it came with 1.4")
    scale, offset = np.frombuffer(head, "<f8", 6, 131).reshape(2, 3)
    finite = np.isfinite([scale, offset]).all() and (np.abs(scale) > 1e-12).all()
    if not finite or np.abs(scale).max() > 1e6 or np.abs(offset).max() > 1e15:
        raise LasError(f"{place_of(path)} is damaged: scale {scale.tolist()}, offset {offset.tolist()}")
    # Waveforms (formats 4, 5, 9, 10) and, since 1.4, further records may follow the points.
    more = kind in (4, 5, 9, 10) or (minor >= 4 and any(head[243:247]))
    room = (size, start, int(count), length)
    _require_room(path, *room, records=(header_size, num_vlrs), compressed=compressed, more=more)
    return int(count)


def _check_compression(path: Path, size: int, records: tuple[int, int], start: int, count: int) -> None:
    try:
        with path.open("rb") as file:
            check_laz(file, size, records, start, count)
    except (LazSizeError, lazrs.LazrsError, struct.error, OSError, ValueError, OverflowError) as error:
        raise LasError(f"{place_of(path)} is damaged: {error}; fetch it again") from error
    except BaseException as error:  # as in read_las
        if type(error).__name__ != "PanicException":
            raise
        raise LasError(f"{place_of(path)} is damaged: {error}; fetch it again") from error


def _require_room(
    path: Path,
    size: int,
    start: int,
    count: int,
    length: int,
    *,
    records: tuple[int, int],
    compressed: bool,
    more: bool,
) -> None:
    """Refuse a count of points that the file cannot hold; ``more``: other records may follow the points."""
    if compressed:
        if count > _LAZ_POINTS_PER_BYTE * size:
            raise LasError(
                f"{place_of(path)} is damaged: its header tells of {count} points in {size} bytes; fetch it again"
            )
        _check_compression(path, size, records, start, count)
        return
    end = start + count * length
    if end > size or (end < size and not more):
        raise LasError(
            f"{place_of(path)} is {'cut short' if end > size else 'damaged'}: {count} points of {length} bytes end "
            f"at byte {end}, the file has {size}; fetch it again"
        )


def _rename_doubles(point_format: Any) -> None:
    """Give extra attributes that are called like a standard field, or like one another, a name of their own."""
    taken = {*point_format.standard_dimension_names, *laspy.PointFormat(point_format.id).dtype().names}
    for place, field in enumerate(point_format.dimensions):
        if not field.is_standard:
            name = field.name
            while name in taken:
                name += " (extra)"
            point_format.dimensions[place] = field._replace(name=name)
            taken.add(name)


def _check_bounds(pos: npt.NDArray[np.float64], header: Any, name: str) -> None:
    """Refuse points far outside the box that the header gives: then scale or offset is damaged.

    Boxes larger than the points (clipped files), boxes without volume and boxes in stored integers (lazy writers) are
    met and harmless.
    """
    low, high = np.asarray(header.mins), np.asarray(header.maxs)
    if not len(pos) or not np.isfinite([low, high]).all() or (high <= low).any():
        return
    slack = 0.05 * (high - low) + 1
    least, most = pos.min(0), pos.max(0)
    for move, scale in ((0, 1), (header.offsets, header.scales)):
        if ((least - move) / scale >= low - slack).all() and ((most - move) / scale <= high + slack).all():
            return
    raise LasError(
        f"{name} is damaged: points from {least.round(2).tolist()} to {most.round(2).tolist()}, "
        f"but its header says {low.round(2).tolist()} to {high.round(2).tolist()}; fetch it again"
    )


def _is_geographic(header: Any, pos: npt.NDArray[np.float64]) -> bool:
    if not len(pos) or np.abs(pos[:, :2]).max() > _FULL_CIRCLE:
        return False
    texts = [vlr.string.upper() for vlr in header.vlrs.get("WktCoordinateSystemVlr")]
    if texts:
        return "PROJC" not in texts[0] and any(word in texts[0] for word in ("GEOGCS", "GEOGCRS", "GEODCRS"))
    keys = [key for vlr in header.vlrs.get("GeoKeyDirectoryVlr") for key in vlr.geo_keys]
    return any(key.id == _MODEL_KEY and key.value_offset == _GEOGRAPHIC for key in keys)


def write_las(
    path: Path | str,
    pos: npt.ArrayLike,
    *,
    rgb: npt.ArrayLike | None = None,
    extra: Mapping[str, npt.NDArray[Any]] | None = None,
    point_format: int = 6,
    scale: float = 0.001,
    **fields: npt.ArrayLike,
) -> None:
    """Write a LAS file, or a LAZ file if the path ends so: version 1.2 for formats 0 - 3, 1.4 for formats 6 - 8.

    Args:
        path: file to write.
        pos: [N, 3] coordinates.
        rgb: [N, 3], 0 - 65535; only with formats 2, 3, 7 and 8.
        extra: further attributes by name ([N] integers or floats), e.g. the expert of every point.
        point_format: 0 - 3 or 6 - 8.
        scale: resolution of the stored coordinates.
        fields: standard fields by laspy's names, [N] or one number: classification, intensity, withheld ...

    Raises:
        ValueError: a format without this field, coordinates that are not finite or too far apart for the resolution,
            an attribute of another length or type.
    """
    pos = np.asarray(pos, np.float64).reshape(-1, 3)
    if point_format not in WRITABLE or (rgb is not None and point_format not in (2, 3, 7, 8)):
        what = "has no colour; use 2, 3, 7 or 8" if point_format in WRITABLE else f"cannot be written; use {WRITABLE}"
        raise ValueError(f"point_format={point_format} {what}")
    if not np.isfinite(pos).all():
        raise ValueError("coordinates hold NaN or infinity; drop those points before writing")
    offset = np.floor(pos.min(0)) if len(pos) else np.zeros(3)
    if len(pos) and (span := (pos.max(0) - offset).max()) / scale > 2**31 - 1:
        raise ValueError(f"the cloud spans {span:.0f}, too far for steps of {scale}; use a larger scale")
    header = laspy.LasHeader(point_format=point_format, version="1.4" if point_format >= 6 else "1.2")
    header.scales, header.offsets = np.full(3, scale), offset
    header.generating_software, header.creation_date = "moeapps", date(2026, 1, 1)  # equal clouds are equal files
    taken = {*header.point_format.dimension_names, *"xyz"}
    for name, values in (extra or {}).items():
        if values.dtype.kind not in "iuf" or values.shape != (len(pos),):
            raise ValueError(f"extra {name!r} has dtype {values.dtype}, shape {values.shape}; use [{len(pos)}] numbers")
        if name in taken or not 0 < len(name.encode()) < 32:
            raise ValueError(f"extra name {name!r} is taken or is not 1 - 31 bytes long")
        header.add_extra_dim(laspy.ExtraBytesParams(name, values.dtype))
    las = laspy.LasData(header, laspy.ScaleAwarePointRecord.zeros(len(pos), header=header))
    las.x, las.y, las.z = pos.T
    colours = {} if rgb is None else dict(zip(("red", "green", "blue"), np.asarray(rgb).T, strict=True))
    for name, column in {"return_number": 1, "number_of_returns": 1, **fields, **colours}.items():
        las[name][:] = np.broadcast_to(column, len(pos))
    for name, values in (extra or {}).items():
        las.points.array[name][:] = values
    buffer = io.BytesIO()
    las.write(buffer, do_compress=Path(path).suffix.lower() == ".laz", laz_backend=laspy.LazBackend.Lazrs)
    Path(path).write_bytes(buffer.getbuffer())
