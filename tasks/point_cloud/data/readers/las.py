# SPDX-License-Identifier: Apache-2.0
"""Read and write LAS, the exchange format of airborne laser scanning (ASPRS LAS 1.0 - 1.4, point formats 0 - 10).

The reader needs numpy only. LAZ, the compressed form, needs laspy with a LAZ backend (``pip install -e '.[points]'``).
Per-point extra attributes ("extra bytes", e.g. the expert that a point was sent to) go both ways.

Source: ASPRS, LAS Specification 1.4 - R15, tables 3 (header), 7 - 17 (point formats) and 24 (extra bytes).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.point_cloud.data.readers.las_format import EXTRA_TYPES, FORMATS, RESERVED, LasCloud, LasError
from tasks.point_cloud.data.readers.las_write import write_las

__all__ = ["LasCloud", "LasError", "read_las", "write_las"]

_Field = tuple[str, str, tuple[int, ...]]
_HEADER_SIZE = {(1, 0): 227, (1, 1): 227, (1, 2): 227, (1, 3): 235, (1, 4): 375}


@dataclass(frozen=True)
class _Header:
    point_offset: int
    point_format: int
    record_length: int
    count: int
    scale: npt.NDArray[np.float64]
    offset: npt.NDArray[np.float64]
    header_size: int
    num_vlrs: int


def read_las(path: Path | str) -> LasCloud:
    """Read a LAS file (a LAZ file through laspy).

    Raises:
        LasError: missing, cut short, damaged or not LAS; LAZ without laspy.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LasError(f"cannot read {path} ({error.strerror}); give the path of a .las file") from error
    if data[:4] != b"LASF":
        raise LasError(f"{path.name} is not a LAS file: it does not begin with LASF")
    if len(data) < 227:
        raise LasError(f"{path.name} is cut short: {len(data)} bytes, a LAS header has at least 227; fetch it again")
    if data[104] & 0xC0:  # bit 7; old writers set bit 6 too
        if len(data) < (size := int.from_bytes(data[94:96], "little")):
            raise LasError(f"{path.name} is cut short: {len(data)} bytes, its header alone has {size}; fetch it again")
        return _read_laz(path)
    header = _parse_header(data, path.name)
    end = header.point_offset + header.count * header.record_length
    if end > len(data):
        raise LasError(
            f"{path.name} is cut short: {header.count} points of {header.record_length} bytes end at byte {end}, "
            f"the file has {len(data)}; fetch it again"
        )
    if end < len(data) and not _may_hold_more(data, header):
        raise LasError(
            f"{path.name} is damaged: {header.count} points of {header.record_length} bytes end at byte {end}, but "
            f"{len(data) - end} bytes follow that no header field announces; fetch it again"
        )
    fields = list(FORMATS[header.point_format])
    extras = _extra_fields(data, header)
    known = np.dtype(fields).itemsize
    if np.dtype([*fields, *extras]).itemsize > header.record_length:
        extras = []
    used = np.dtype([*fields, *extras]).itemsize if extras else known
    padding = [("pad", f"V{header.record_length - used}")] if header.record_length > used else []
    records = np.frombuffer(data, np.dtype([*fields, *extras, *padding]), header.count, header.point_offset)
    cloud = _cloud(records, header, [item[0] for item in extras])
    _check_bounds(cloud, header, data, path.name)
    return cloud


def _may_hold_more(data: bytes, header: _Header) -> bool:
    """Whether something may follow the points: waveforms (formats 4, 5, 9, 10) or, since 1.4, further records."""
    wave = header.point_format in (4, 5, 9, 10)
    return wave or (data[25] == 4 and struct.unpack_from("<I", data, 243)[0] > 0)


def _check_bounds(cloud: LasCloud, header: _Header, data: bytes, name: str) -> None:
    """Refuse points far outside the box that the header gives: then scale or offset is damaged.

    Boxes larger than the points (clipped files), boxes without volume and boxes in stored integers (lazy writers) are
    met and harmless.
    """
    box = np.frombuffer(data, "<f8", 6, 179).reshape(3, 2)
    high, low = box[:, 0], box[:, 1]
    if not len(cloud) or not np.isfinite(box).all() or (high <= low).any():
        return
    slack = 0.05 * (high - low) + 1
    for pos in (cloud.pos, (cloud.pos - header.offset) / header.scale):
        if (pos.min(0) >= low - slack).all() and (pos.max(0) <= high + slack).all():
            return
    raise LasError(
        f"{name} is damaged: points from {cloud.pos.min(0).round(2).tolist()} to {cloud.pos.max(0).round(2).tolist()}, "
        f"but its header says {low.round(2).tolist()} to {high.round(2).tolist()}; fetch it again"
    )


def _parse_header(data: bytes, name: str) -> _Header:
    version = (data[24], data[25])
    header_size, point_offset, num_vlrs = struct.unpack_from("<HII", data, 94)
    point_format, record_length, count = struct.unpack_from("<BHI", data, 104)
    scale, offset = np.frombuffer(data, "<f8", 6, 131).reshape(2, 3)
    if version not in _HEADER_SIZE:
        raise LasError(f"{name} says it is LAS {version[0]}.{version[1]}; versions 1.0 to 1.4 can be read")
    if point_format >= len(FORMATS):
        raise LasError(f"{name} has point format {point_format}; formats 0 to 10 can be read")
    least = np.dtype(FORMATS[point_format]).itemsize
    if record_length < least:
        raise LasError(f"{name} is damaged: records of {record_length} bytes, format {point_format} needs {least}")
    if header_size < _HEADER_SIZE[version] or point_offset < header_size:
        raise LasError(f"{name} is damaged: header of {header_size} bytes, points at byte {point_offset}")
    if point_format >= 6 and version != (1, 4):
        raise LasError(
            f"{name} is damaged: point format {point_format} in LAS {version[0]}.{version[1]}, it came with 1.4"
        )
    if version == (1, 4) and len(data) >= 255:
        # The 64-bit count rules, but some writers fill the old one only, which must be zero from format 6 on.
        large = struct.unpack_from("<Q", data, 247)[0]
        if point_format < 6 and count != large and 0 < large < 2**32:
            raise LasError(
                f"{name} is damaged: its header gives both {count} and {large} points in format {point_format}"
            )
        count = large or count
    finite = np.isfinite(scale).all() and np.isfinite(offset).all() and (np.abs(scale) > 1e-12).all()
    if not finite or np.abs(scale).max() > 1e6 or np.abs(offset).max() > 1e15:
        raise LasError(f"{name} is damaged: scale {scale.tolist()}, offset {offset.tolist()}")
    return _Header(point_offset, point_format, record_length, count, scale, offset, header_size, num_vlrs)


def _extra_fields(data: bytes, header: _Header) -> list[_Field]:
    """Return (name, dtype, shape) of the extra bytes; an unreadable list gives none, the points stay readable."""
    position = header.header_size
    for _ in range(min(header.num_vlrs, 1000)):
        if position + 54 > min(header.point_offset, len(data)):
            break
        user, record, length = struct.unpack_from("<2x16sHH", data, position)
        body = data[position + 54 : position + 54 + length]
        if user.rstrip(b"\0") == b"LASF_Spec" and record == 4:
            return _describe_extras(body)
        position += 54 + length
    return []


def _describe_extras(body: bytes) -> list[_Field]:
    fields: list[_Field] = []
    for start in range(0, len(body) - 191, 192):
        kind, options = body[start + 2], body[start + 3]
        name = body[start + 4 : start + 36].split(b"\0")[0].decode("ascii", "replace")
        if kind > 30 or not name or name in RESERVED or any(name == other[0] for other in fields):
            return []
        # Kinds 11 - 30, pairs and triples of kinds 1 - 10, are withdrawn but still met.
        times, base = divmod(kind - 1, 10)
        fields.append(
            (name, f"V{options}", ()) if kind == 0 else (name, EXTRA_TYPES[base], (times + 1,) if times else ())
        )
    return fields


def _cloud(records: npt.NDArray[Any], header: _Header, extras: list[str]) -> LasCloud:
    new = header.point_format >= 6
    returns, names = records["returns"], records.dtype.names or ()
    return LasCloud(
        pos=records["xyz"] * header.scale + header.offset,
        intensity=records["intensity"].copy(),
        classification=(records["classification"] & (255 if new else 31)).astype(np.uint8),
        return_number=(returns & (15 if new else 7)).astype(np.uint8),
        num_returns=((returns >> 4) if new else (returns >> 3) & 7).astype(np.uint8),
        rgb=records["rgb"].copy() if "rgb" in names else None,
        extra={name: records[name].copy() for name in extras},
        scale=(float(header.scale[0]), float(header.scale[1]), float(header.scale[2])),
    )


def _read_laz(path: Path) -> LasCloud:
    try:
        import laspy
    except ImportError as error:
        raise LasError(f"{path.name} is compressed (LAZ); install the reader: pip install -e '.[points]'") from error
    try:
        with laspy.open(path) as file:
            count = file.header.point_count
            _check_laz_count(count, path)
            cloud = file.read()
    except LasError:
        raise
    except (laspy.errors.LaspyException, RuntimeError, ValueError, OSError, MemoryError) as error:
        raise _unreadable_laz(path, error) from error
    except BaseException as error:
        # The decompressor is Rust: a damaged chunk can end in its panic, which does not derive from Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise _unreadable_laz(path, error) from error
    if len(cloud.points) != count:
        raise LasError(f"{path.name} is damaged: {len(cloud.points)} of {count} points can be read; fetch it again")
    names = set(cloud.point_format.dimension_names)
    rgb = np.stack([np.asarray(cloud[c]) for c in ("red", "green", "blue")], 1) if "red" in names else None
    return LasCloud(
        pos=np.asarray(cloud.xyz, np.float64),
        intensity=np.asarray(cloud.intensity, np.uint16),
        classification=np.asarray(cloud.classification, np.uint8),
        return_number=np.asarray(cloud.return_number, np.uint8),
        num_returns=np.asarray(cloud.number_of_returns, np.uint8),
        rgb=rgb,
        extra={name: np.asarray(cloud[name]) for name in cloud.point_format.extra_dimension_names},
        scale=tuple(float(s) for s in cloud.header.scales),  # type: ignore[arg-type]
    )


_LAZ_POINTS_PER_BYTE = 100
"""More than any compressor reaches on points that differ: a larger count in a header is damage."""


def _check_laz_count(count: int, path: Path) -> None:
    size = path.stat().st_size
    if count > _LAZ_POINTS_PER_BYTE * size:
        raise LasError(f"{path.name} is damaged: its header tells of {count} points in {size} bytes; fetch it again")


def _unreadable_laz(path: Path, error: BaseException) -> LasError:
    return LasError(f"laspy cannot read {path.name} ({error}); is a LAZ backend installed, is the file whole?")
