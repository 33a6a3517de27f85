# SPDX-License-Identifier: Apache-2.0
"""Raw records, .npy and .npz files, read safely: a bad file is refused and nothing in it is run.

``numpy.load`` would unpickle on request and answers damage with a dozen exception types. The .npy header is a line
of text before a block of numbers (numpy's format document, "NEP 1"), so it is read here: plain numeric types only,
and the block must be exactly as long as the header says before anything is allocated.
"""

from __future__ import annotations

import ast
import io
import lzma
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tasks.point_cloud.data.readers.scan import PointCloudFileError

_MAGIC = b"\x93NUMPY"
_PLAIN = re.compile(r"\|[biu]1|<[iu][248]|<f[248]")
_LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, OSError, EOFError),
    *(ValueError, OverflowError, KeyError, IndexError, MemoryError),
)
COPY_AGAIN = "copy or export the file again"


def read_bytes(path: Path) -> bytes:
    """Return the contents of ``path``.

    Raises:
        PointCloudFileError: it is missing, a folder, or may not be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PointCloudFileError(path, "no such file", "a file", "check the path and the layout of the root") from None
    except OSError as error:
        raise PointCloudFileError(path, f"cannot be read ({error.strerror})", "a readable file", COPY_AGAIN) from None


def read_text(path: Path) -> str:
    """Return the contents of ``path`` as UTF-8 text, without the mark that some programs put before it.

    Raises:
        PointCloudFileError: it cannot be read, or is not text.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PointCloudFileError(path, "bytes that are not text", "UTF-8 text", COPY_AGAIN) from None


def read_records(path: Path, dtype: DTypeLike, columns: int) -> NDArray[Any]:
    """Read a headerless file of ``columns`` numbers per row into an array [R, columns].

    Raises:
        PointCloudFileError: the size is not a multiple of the row's.
    """
    data = read_bytes(path)
    row = np.dtype(dtype).itemsize * columns
    if len(data) % row:
        raise PointCloudFileError(
            path,
            f"{len(data)} bytes",
            f"a multiple of {row} bytes ({columns} x {np.dtype(dtype)} per point)",
            COPY_AGAIN,
        )
    return np.frombuffer(data, dtype).reshape(-1, columns)


def read_npy(path: Path) -> NDArray[Any]:
    """Read one .npy file of plain numbers.

    Raises:
        PointCloudFileError: damaged, truncated, or of a type that is not plain numbers.
    """
    return parse_npy(read_bytes(path), path)


def parse_npy(data: bytes, path: Path | str) -> NDArray[Any]:
    """Read the bytes of one .npy file; ``path`` is named in errors.

    Structured types (named columns of plain numbers) are allowed, pickled objects and big-endian numbers are not:
    no tool writes the latter on today's machines, and one flipped bit turns ``<f4`` into ``>f4``.

    Raises:
        PointCloudFileError: damaged, truncated, or of a type that is not plain numbers.
    """
    header, start = _header(data, path)
    dtype, shape = _dtype(header, path), header["shape"]
    expected = start + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise PointCloudFileError(path, f"{len(data)} bytes", f"{expected} bytes (shape {shape}, {dtype})", COPY_AGAIN)
    flat = np.frombuffer(data, dtype, offset=start)
    return flat.reshape(shape, order="F" if header["fortran_order"] else "C")


def _header(data: bytes, path: Path | str) -> tuple[dict[str, Any], int]:
    refused = PointCloudFileError(path, "no readable .npy header", "a numpy array file", COPY_AGAIN)
    if data[:6] != _MAGIC or len(data) < 12 or data[6:8] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise refused
    width = 2 if data[6] == 1 else 4
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if start > len(data) or start > 65_536:
        raise refused
    try:
        header = ast.literal_eval(data[8 + width : start].decode("utf-8").strip())
    except _LITERAL_ERRORS:
        raise refused from None
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise refused
    shape = header["shape"]
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise refused
    if type(header["fortran_order"]) is not bool:
        raise refused
    return header, start


def _dtype(header: dict[str, Any], path: Path | str) -> np.dtype[Any]:
    descr = header["descr"]
    fields = [("", descr)] if isinstance(descr, str) else descr
    # Checked as text: numpy.dtype would take objects, sub-arrays, deprecated aliases and byte-swapped numbers as well.
    plain = isinstance(fields, list) and all(
        isinstance(field, tuple)
        and len(field) == 2
        and all(isinstance(part, str) for part in field)
        and _PLAIN.fullmatch(field[1])
        for field in fields
    )
    if not plain or not fields or len({name for name, _ in fields}) < len(fields):
        raise PointCloudFileError(
            path,
            f"an array of type {descr!r}",
            "plain little-endian numbers (pickled objects are never loaded)",
            "save it again as float32, uint8 or int16",
        )
    dtype: np.dtype[Any] = np.dtype(descr)
    return dtype


def write_npy(path: Path, array: NDArray[Any]) -> None:
    """Write one .npy file of plain numbers, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=False)


def read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Read those of ``keys`` that an .npz archive holds.

    Raises:
        PointCloudFileError: the archive or one of the members is damaged.
    """
    data = read_bytes(path)
    found: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # testzip reads every member against its checksum, also those that are not asked for.
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            contents = {key: archive.read(members[key]) for key in keys if key in members}
    except _ZIP_ERRORS:
        raise PointCloudFileError(path, "a damaged archive", "an .npz file of arrays", COPY_AGAIN) from None
    for key, content in contents.items():
        found[key] = parse_npy(content, f"{path}:{key}")
    return found


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a compressed .npz archive of plain numbers, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            # A fixed date makes equal scans equal files.
            archive.writestr(
                zipfile.ZipInfo(f"{key}.npy", (1980, 1, 1, 0, 0, 0)), buffer.getvalue(), zipfile.ZIP_DEFLATED
            )
