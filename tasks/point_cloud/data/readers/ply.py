# SPDX-License-Identifier: Apache-2.0
"""PLY files: ascii and binary of either byte order, any scalar properties, and ScanNet's labelled meshes.

A PLY file is a text header (elements with counts, each with typed properties) and a body in the header's order.
Vertices are read as named columns; faces and other elements are measured, so that a truncated or lengthened file is
noticed, and skipped. ``list`` properties are allowed everywhere but in vertices.

Source: Turk 1994, "The PLY polygon file format"; written from the format's description.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.point_cloud.data.readers.arrays import COPY_AGAIN, read_bytes
from tasks.point_cloud.data.readers.scan import PointCloudFileError

PlyFormat = Literal["ascii", "binary_little_endian", "binary_big_endian"]
_ORDER: dict[str, Literal["<", ">"]] = {"ascii": "<", "binary_little_endian": "<", "binary_big_endian": ">"}
_TYPES: dict[str, str] = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"},
    **{"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}
_NAMES = {
    "i1": "char",
    "u1": "uchar",
    "i2": "short",
    "u2": "ushort",
    "i4": "int",
    "u4": "uint",
    "f4": "float",
    "f8": "double",
}
_MAX_HEADER = 65_536


@dataclass(frozen=True)
class _Property:
    name: str
    dtype: str
    count_dtype: str | None = None  # set for lists


@dataclass(frozen=True)
class _Element:
    name: str
    count: int
    properties: tuple[_Property, ...]

    @property
    def has_lists(self) -> bool:
        return any(prop.count_dtype is not None for prop in self.properties)

    def row(self, order: str) -> np.dtype[Any]:
        return np.dtype([(prop.name, order + prop.dtype) for prop in self.properties])


@dataclass(frozen=True, eq=False)
class PlyCloud:
    """Vertices of one PLY file.

    Args:
        vertex: column per property, in native byte order, each [R].
        comments: comment lines of the header.
    """

    vertex: dict[str, NDArray[Any]]
    comments: tuple[str, ...] = ()

    def stack(self, *names: str) -> NDArray[Any] | None:
        """Return the named columns side by side [R, len(names)], or None when the first is missing."""
        if names[0] not in self.vertex:
            return None
        return np.stack([self.vertex[name] for name in names], axis=1)


def read_ply(path: Path) -> PlyCloud:
    """Read the vertices of ``path``.

    Raises:
        PointCloudFileError: no PLY file, a header or body that cannot be right, or x, y, z missing.
    """
    return parse_ply(read_bytes(path), path)


def parse_ply(data: bytes, path: Path) -> PlyCloud:
    """Read the vertices from the bytes of a PLY file; ``path`` is named in errors.

    Raises:
        PointCloudFileError: as ``read_ply``.
    """
    layout, elements, comments, start = _parse_header(path, data)
    _require_vertex(path, elements)
    if layout == "ascii":
        return PlyCloud(_ascii_body(path, data[start:], elements), comments)
    return PlyCloud(_binary_body(path, data, start, elements, _ORDER[layout]), comments)


def _bad(path: Path, given: str, allowed: str = "a PLY file", advice: str = COPY_AGAIN) -> PointCloudFileError:
    return PointCloudFileError(path, given, allowed, advice)


def _parse_header(path: Path, data: bytes) -> tuple[str, list[_Element], tuple[str, ...], int]:
    stop = data.find(b"end_header", 0, _MAX_HEADER)
    newline = data.find(b"\n", stop)
    if (
        not data.startswith((b"ply\n", b"ply\r\n"))
        or stop < 0
        or newline < 0
        or data[stop:newline].strip() != b"end_header"
    ):
        raise _bad(path, "no complete PLY header", "'ply' ... 'end_header'")
    try:
        lines = [line.strip() for line in data[:stop].decode("utf-8").split("\n")][1:]
    except UnicodeDecodeError:
        raise _bad(path, "a header that is not text") from None
    comments = tuple(line.partition(" ")[2] for line in lines if line.startswith("comment"))
    words = [line.split() for line in lines if line and not line.startswith(("comment", "obj_info"))]
    if (
        not words
        or words[0][:1] != ["format"]
        or len(words[0]) != 3
        or words[0][1] not in _ORDER
        or words[0][2] != "1.0"
    ):
        raise _bad(
            path, f"the first header line {' '.join(words[0]) if words else ''!r}", f"format {'|'.join(_ORDER)} 1.0"
        )
    elements: list[_Element] = []
    for line in words[1:]:
        _add_line(path, elements, line)
    return words[0][1], elements, comments, newline + 1


def _add_line(path: Path, elements: list[_Element], words: list[str]) -> None:
    """Add one ``element`` or ``property`` line to what has been read."""
    match words:
        case ["element", name, count] if count.isascii() and count.isdigit() and len(count) <= 12:
            elements.append(_Element(name, int(count), ()))
            return
        case ["property", "list", counts, items, name] if elements and {counts, items} <= set(_TYPES):
            added = _Property(name, _TYPES[items], _TYPES[counts])
        case ["property", kind, name] if elements and kind in _TYPES:
            added = _Property(name, _TYPES[kind])
        case _:
            raise _bad(path, f"the header line {' '.join(words)!r}", "element NAME COUNT or property TYPE NAME")
    last = elements[-1]
    if added.name in {prop.name for prop in last.properties} or (added.count_dtype or "i4")[0] == "f":
        raise _bad(path, f"the header line {' '.join(words)!r}", "each property once, list lengths as integers")
    elements[-1] = _Element(last.name, last.count, (*last.properties, added))


def _require_vertex(path: Path, elements: list[_Element]) -> None:
    vertices = [element for element in elements if element.name == "vertex"]
    names = {prop.name for element in vertices for prop in element.properties}
    if len(vertices) != 1 or vertices[0].has_lists or not {"x", "y", "z"} <= names:
        raise _bad(path, f"vertex properties {sorted(names)}", "one element vertex with x, y, z and no lists")
    for group in (("red", "green", "blue"), ("nx", "ny", "nz")):
        present = names & set(group)
        if present and len(present) < 3:
            raise _bad(path, f"only {', '.join(sorted(present))}", f"all of {', '.join(group)} or none")


def _binary_body(path: Path, data: bytes, start: int, elements: list[_Element], order: str) -> dict[str, NDArray[Any]]:
    vertex: dict[str, NDArray[Any]] = {}
    for element in elements:
        if element.has_lists:
            start = _skip_lists(path, data, start, element, order)
            continue
        row = element.row(order)
        stop = start + element.count * row.itemsize
        if stop > len(data):
            raise _bad(path, f"{len(data)} bytes", f"at least {stop} for {element.count} x {element.name}")
        if element.name == "vertex":
            rows = np.frombuffer(data, row, count=element.count, offset=start)
            vertex = {name: rows[name].astype(rows[name].dtype.newbyteorder("=")) for name in rows.dtype.names or ()}
        start = stop
    if start != len(data):
        raise _bad(path, f"{len(data)} bytes", f"exactly {start} by its header")
    return vertex


def _skip_lists(path: Path, data: bytes, start: int, element: _Element, order: str) -> int:
    """Return where the rows of an element with list properties end."""
    truncated = _bad(path, f"a body that ends inside {element.name!r}", f"{element.count} rows of it")
    if len(element.properties) == 1 and element.count:
        stop = _equal_lists(data, start, element, order)
        if stop is not None:
            return stop
    for _ in range(element.count):
        for prop in element.properties:
            length = 1
            if prop.count_dtype is not None:
                size = np.dtype(prop.count_dtype).itemsize
                if start + size > len(data):
                    raise truncated
                length = int(np.frombuffer(data, order + prop.count_dtype, count=1, offset=start)[0])
                start += size
            start += max(length, 0) * np.dtype(prop.dtype).itemsize
        if start > len(data):
            raise truncated
    return start


def _equal_lists(data: bytes, start: int, element: _Element, order: str) -> int | None:
    """Return the end of lists that are all as long as the first (triangle meshes), or None."""
    prop = element.properties[0]
    head = np.dtype(order + str(prop.count_dtype))
    if start + head.itemsize > len(data):
        return None
    length = int(np.frombuffer(data, head, count=1, offset=start)[0])
    width = head.itemsize + max(length, 0) * np.dtype(prop.dtype).itemsize
    stop = start + element.count * width
    if length < 0 or stop > len(data):
        return None
    rows = np.frombuffer(data, np.dtype((np.void, width)), count=element.count, offset=start)
    lengths = np.ndarray(element.count, head, rows, strides=(width,))
    return stop if bool((lengths == length).all()) else None


def _ascii_body(path: Path, body: bytes, elements: list[_Element]) -> dict[str, NDArray[Any]]:
    lines = [line for line in body.split(b"\n") if line.strip()]
    if len(lines) != sum(element.count for element in elements):
        raise _bad(path, f"{len(lines)} lines of data", f"{sum(element.count for element in elements)} by its header")
    vertex: dict[str, NDArray[Any]] = {}
    start = 0
    for element in elements:
        rows = lines[start : start + element.count]
        start += element.count
        if element.name == "vertex":
            vertex = _ascii_columns(path, rows, element)
    return vertex


def _ascii_columns(path: Path, lines: list[bytes], element: _Element) -> dict[str, NDArray[Any]]:
    width = len(element.properties)
    tokens = [line.split() for line in lines]
    wrong = next((number for number, row in enumerate(tokens) if len(row) != width), None)
    if wrong is not None:
        raise _bad(path, f"{len(tokens[wrong])} values in vertex {wrong}", f"{width}")
    table = np.array(tokens, dtype=bytes).reshape(-1, width)
    return {prop.name: _ascii_numbers(path, table[:, place], prop) for place, prop in enumerate(element.properties)}


def _ascii_numbers(path: Path, words: NDArray[Any], prop: _Property) -> NDArray[Any]:
    dtype = np.dtype(prop.dtype)
    try:
        numbers = words.astype(np.float64 if dtype.kind == "f" else np.int64)
    except (ValueError, OverflowError):
        raise _bad(path, f"a value of {prop.name!r} that is not a {_NAMES[prop.dtype]}", "numbers") from None
    bounds = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    if dtype.kind != "f" or bool(np.isfinite(numbers).all()):
        outside = (numbers < bounds.min) | (numbers > bounds.max)
        if bool(outside.any()):
            raise _bad(
                path, f"{prop.name} = {numbers[outside][0]}", f"{_NAMES[prop.dtype]} within {bounds.min}..{bounds.max}"
            )
    return numbers.astype(dtype)


def write_ply(
    path: Path,
    vertex: Mapping[str, NDArray[Any]],
    *,
    layout: PlyFormat = "binary_little_endian",
    comments: tuple[str, ...] = (),
) -> None:
    """Write vertices as a PLY file, making its folder.

    Args:
        path: file to write.
        vertex: columns of equal length; int64 is written as int, bool as uchar.
        layout: format of the body; ascii numbers are written with as many digits as they need to come back equal.
        comments: comment lines.

    Raises:
        ValueError: columns of different length, of a type that PLY has no name for, or a line break in a comment.
    """
    columns = {name: _storable(name, column) for name, column in vertex.items()}
    if len({len(column) for column in columns.values()}) > 1 or any("\n" in comment for comment in comments):
        raise ValueError("vertex columns must be equally long and comments single lines; check what is written")
    rows = np.empty(len(next(iter(columns.values()))), [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        rows[name] = column
    header = [
        *("ply", f"format {layout} 1.0", *(f"comment {comment}" for comment in comments)),
        *(
            f"element vertex {len(rows)}",
            *(f"property {_NAMES[c.dtype.str[1:]]} {name}" for name, c in columns.items()),
        ),
        "end_header",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout == "ascii":
        body = "".join(" ".join(str(value) for value in row) + "\n" for row in rows).encode("ascii")
    else:
        body = rows.astype(rows.dtype.newbyteorder(_ORDER[layout])).tobytes()
    path.write_bytes("\n".join(header).encode("utf-8") + b"\n" + body)


def _storable(name: str, column: NDArray[Any]) -> NDArray[Any]:
    if column.dtype == np.int64 and (not len(column) or np.abs(column).max() < 2**31):
        column = column.astype(np.int32)
    if column.dtype == np.bool_:
        column = column.astype(np.uint8)
    if column.ndim != 1 or column.dtype.str[1:] not in _NAMES:
        raise ValueError(
            f"column {name!r} ({column.dtype}, {column.ndim} dimensions) has no PLY type; "
            "give integers or floats of up to 4 bytes, or doubles"
        )
    return column
