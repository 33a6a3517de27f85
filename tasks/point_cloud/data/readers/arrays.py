# SPDX-License-Identifier: Apache-2.0
"""Raw records, .npy and .npz files, read safely: a bad file is refused and nothing in it is run.

``numpy.load`` would unpickle on request, answers damage with a dozen exception types, and allocates what a header
promises. Here numpy reads the header alone: plain numeric types only, and the block of numbers behind it must be
exactly as long as the header says.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from moeapps.bounds import FLOOR, RATIO, ZIP_ERRORS, BoundError, require_file
from tasks.point_cloud.data.readers.scan import PointCloudFileError

_PLAIN = re.compile(r"\|[biu]1|<[iu][248]|<f[248]")
_ONE, _TWO = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
_HEADERS = {(1, 0): _ONE, (2, 0): _TWO, (3, 0): _TWO}  # 3 differs from 2 in the encoding of columns' names alone
COPY_AGAIN = "copy or export the file again"


def read_bytes(path: Path) -> bytes:
    """Return the contents of ``path``.

    Raises:
        PointCloudFileError: it is missing, a folder, or may not be read.
    """
    try:
        require_file(path)
        return path.read_bytes()
    except BoundError as error:
        raise PointCloudFileError(
            path, str(error).removeprefix(f"{path} "), "a file", "give an ordinary file"
        ) from None
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
    shape, columns_first, dtype, start = _header(data, path)
    parts = [dtype] if dtype.fields is None else [field[0] for field in dtype.fields.values()]
    if not parts or not all(_PLAIN.fullmatch(part.str) for part in parts):
        allowed = "plain little-endian numbers (pickled objects are never loaded)"
        advice = "save it again as float32, uint8 or int16"
        raise PointCloudFileError(path, f"an array of type {dtype}", allowed, advice)
    expected = start + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise PointCloudFileError(path, f"{len(data)} bytes", f"{expected} bytes (shape {shape}, {dtype})", COPY_AGAIN)
    flat = np.frombuffer(data, dtype, offset=start)
    return flat.reshape(shape, order="F" if columns_first else "C")


def _header(data: bytes, path: Path | str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether columns lie one after another, type, and where the numbers begin."""
    stream = io.BytesIO(data)
    try:
        with warnings.catch_warnings(action="error"):  # numpy warns of types it will drop and of headers it mended
            version = np.lib.format.read_magic(stream)
            shape, columns_first, dtype = _HEADERS[version](stream, max_header_size=65_536)
        if version == (3, 0) and dtype.names is not None:
            dtype.names = tuple(name.encode("latin-1").decode("utf-8") for name in dtype.names)
        if any(size < 0 for size in shape):
            raise ValueError
    # numpy answers damage with nearly any error, those of Python's parser among them.
    except Exception as error:
        raise PointCloudFileError(path, "no readable .npy header", "a numpy array file", COPY_AGAIN) from error
    return shape, columns_first, dtype, stream.tell()


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
            if sum(part.file_size for part in archive.infolist()) > FLOOR + RATIO * len(data):
                raise PointCloudFileError(
                    path,
                    f"{len(data):,} bytes that unpack to far more",
                    f"at most {FLOOR:,} bytes and {RATIO} for each of its own",
                    "save it without compression if its data are good",
                )
            # testzip reads every member against its checksum, also those that are not asked for.
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            contents = {key: archive.read(members[key]) for key in keys if key in members}
    except PointCloudFileError:
        raise
    except (*ZIP_ERRORS, MemoryError):
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
