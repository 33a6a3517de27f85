# SPDX-License-Identifier: Apache-2.0
"""Write LAS files, with extra attributes per point."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.point_cloud.data.readers.las_format import EXTRA_TYPES, FORMATS, RESERVED


def write_las(
    path: Path | str,
    pos: npt.ArrayLike,
    *,
    classification: npt.ArrayLike = 0,
    intensity: npt.ArrayLike = 0,
    return_number: npt.ArrayLike = 1,
    num_returns: npt.ArrayLike = 1,
    rgb: npt.ArrayLike | None = None,
    extra: Mapping[str, npt.NDArray[Any]] | None = None,
    point_format: int = 6,
    scale: float = 0.001,
) -> None:
    """Write an uncompressed LAS file: version 1.2 for formats 0 - 3, 1.4 for formats 6 - 8.

    Args:
        path: file to write.
        pos: [N, 3] coordinates.
        classification: [N] or one ASPRS class (formats 0 - 3: at most 31).
        intensity: [N] or one, 0 - 65535.
        return_number: [N] or one; first is 1.
        num_returns: [N] or one; echoes of the pulse.
        rgb: [N, 3], 0 - 65535; only with formats 2, 3, 7 and 8.
        extra: further attributes by name ([N] integers or floats), e.g. the expert of every point.
        point_format: 0 - 3 or 6 - 8.
        scale: resolution of the stored coordinates.

    Raises:
        ValueError: a format without this field, coordinates that are not finite or too far apart for the resolution,
            an attribute of another length or type.
    """
    pos = np.asarray(pos, np.float64).reshape(-1, 3)
    extra = dict(extra or {})
    dtype = _record_dtype(point_format, rgb is not None, extra, len(pos))
    if not np.isfinite(pos).all():
        raise ValueError("coordinates hold NaN or infinity; drop those points before writing")
    offset = np.floor(pos.min(0)) if len(pos) else np.zeros(3)
    steps = np.round((pos - offset) / scale)
    if len(steps) and steps.max() > 2**31 - 1:
        raise ValueError(
            f"the cloud spans {np.ptp(pos, 0).max():.0f}, too far for steps of {scale}; use a larger scale"
        )
    records = np.zeros(len(pos), dtype)
    new = point_format >= 6
    records["xyz"] = steps
    records["intensity"] = intensity
    records["classification"] = np.asarray(classification) if new else np.asarray(classification) & 31
    records["returns"] = np.asarray(return_number) | (np.asarray(num_returns) << (4 if new else 3))
    if rgb is not None:
        records["rgb"] = rgb
    for name, values in extra.items():
        records[name] = values
    vlr = _extra_vlr(extra)
    header = _header(point_format, dtype.itemsize, pos, offset, scale, len(vlr))
    echoes = np.bincount(np.broadcast_to(np.asarray(return_number, np.int64), len(pos)), minlength=16)[1:16]
    struct.pack_into("<15Q" if new else "<5I", header, 255 if new else 111, *echoes[: 15 if new else 5].tolist())
    Path(path).write_bytes(bytes(header) + vlr + records.tobytes())


def _record_dtype(point_format: int, with_rgb: bool, extra: dict[str, npt.NDArray[Any]], count: int) -> np.dtype[Any]:
    if point_format not in (0, 1, 2, 3, 6, 7, 8):
        raise ValueError(f"point_format={point_format} cannot be written; use 0 - 3 or 6 - 8")
    if with_rgb and point_format not in (2, 3, 7, 8):
        raise ValueError(f"point_format={point_format} has no colour; use 2, 3, 7 or 8")
    fields = list(FORMATS[point_format])
    for name, values in extra.items():
        kind = np.dtype(values.dtype).newbyteorder("<")
        if kind not in [np.dtype(t) for t in EXTRA_TYPES] or values.shape != (count,):
            raise ValueError(f"extra {name!r} has dtype {values.dtype}, shape {values.shape}; use [{count}] numbers")
        if name in RESERVED or not name.isascii() or not 0 < len(name) < 32:
            raise ValueError(f"extra name {name!r} is taken or is not 1 - 31 ASCII letters")
        fields.append((name, kind.str))
    return np.dtype(fields)


def _extra_vlr(extra: dict[str, npt.NDArray[Any]]) -> bytes:
    if not extra:
        return b""
    known = [np.dtype(t) for t in EXTRA_TYPES]
    body = b"".join(
        struct.pack("<2xBB32s156x", known.index(np.dtype(v.dtype).newbyteorder("<")) + 1, 0, name.encode())
        for name, v in extra.items()
    )
    return struct.pack("<2x16sHH32s", b"LASF_Spec", 4, len(body), b"extra bytes") + body


def _header(
    point_format: int,
    length: int,
    pos: npt.NDArray[np.float64],
    offset: npt.NDArray[np.float64],
    scale: float,
    vlr: int,
) -> bytearray:
    new = point_format >= 6
    size, count = (375 if new else 227), len(pos)
    low, high = (pos.min(0), pos.max(0)) if count else (np.zeros(3), np.zeros(3))
    data = bytearray(size)
    struct.pack_into("<4s", data, 0, b"LASF")
    struct.pack_into("<BB32s32sHH", data, 24, 1, 4 if new else 2, b"OTHER", b"moeapps", 1, 2026)
    struct.pack_into("<HII", data, 94, size, size + vlr, 1 if vlr else 0)
    struct.pack_into("<BHI", data, 104, point_format, length, 0 if new else count)
    struct.pack_into("<6d", data, 131, scale, scale, scale, *offset)
    struct.pack_into("<6d", data, 179, high[0], low[0], high[1], low[1], high[2], low[2])
    if new:
        struct.pack_into("<H", data, 6, 16)  # the specification asks formats 6 - 10 for WKT, if any reference system
        struct.pack_into("<Q", data, 247, count)
    return data
