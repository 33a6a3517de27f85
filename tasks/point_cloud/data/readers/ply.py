# SPDX-License-Identifier: Apache-2.0
"""PLY files through plyfile: ascii and binary of either byte order, lists, meshes, elements of any name.

plyfile takes headers as the description of 1994 has them: ASCII, lower case, single blanks. Programs write more than
that, and counts can be damaged, so the header is read here first: its text is made plain, and the body must be long
enough for what it promises before memory is taken. Points are the element ``vertex``, or the only one with x, y, z.

Source: Turk 1994, "The PLY polygon file format".
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from plyfile import PlyData, PlyElementParseError, PlyParseError

from moeapps.bounds import BoundError, require_file
from tasks.point_cloud.data.readers.arrays import COPY_AGAIN
from tasks.point_cloud.data.readers.scan import PointCloudFileError

PlyFormat = Literal["ascii", "binary_little_endian", "binary_big_endian"]
_ORDER: dict[str, Literal["<", ">"]] = {"ascii": "<", "binary_little_endian": "<", "binary_big_endian": ">"}
_TYPES: dict[str, str] = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"},
    **{"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}
_NAMES = {code: name for name, code in reversed(_TYPES.items())}
_MAX_HEADER = 65_536
_TRIANGLE = 3


@dataclass
class _Element:
    """One element of a header; ``kinds``: per property its types, two for a list (length, items)."""

    name: str
    count: int
    names: list[str] = field(default_factory=list)
    kinds: list[list[str]] = field(default_factory=list)

    @property
    def scalars(self) -> dict[str, str]:
        """Name for plyfile of each property that is no list, by its own name."""
        return {
            name: f"p{i}" for i, (name, kind) in enumerate(zip(self.names, self.kinds, strict=True)) if not kind[1:]
        }

    @property
    def least_bytes(self) -> int:
        """Bytes of a row with empty lists."""
        return sum(np.dtype(_TYPES[kind[0]]).itemsize for kind in self.kinds)

    def plain(self, number: int) -> str:
        """The header's lines with names that plyfile takes."""
        words = [["list", *kind] if kind[1:] else kind for kind in self.kinds]
        lines = [f"property {' '.join(kind)} p{place}\n" for place, kind in enumerate(words)]
        return f"element e{number} {self.count}\n{''.join(lines)}"


@dataclass(frozen=True)
class _Header:
    layout: str
    elements: list[_Element]
    comments: tuple[str, ...]
    length: int

    @property
    def plain(self) -> bytes:
        parts = "".join(element.plain(number) for number, element in enumerate(self.elements))
        return f"ply\nformat {self.layout} 1.0\n{parts}end_header\n".encode("ascii")


@dataclass(frozen=True, eq=False)
class PlyCloud:
    """Points of one PLY file.

    Args:
        vertex: column per property that is no list, in native byte order, each [R]; names in lower case.
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
    """Read the points of ``path``.

    Raises:
        PointCloudFileError: no PLY file, a header or body that cannot be right, or x, y, z missing.
    """
    try:
        require_file(path)
        with path.open("rb") as file:
            header = _parse_header(path, file.read(_MAX_HEADER))
            points = _points(path, header.elements)
            data = _body(path, header, file)
    except FileNotFoundError:
        raise _bad(path, "no such file", "a file", "check the path and the layout of the root") from None
    except OSError as error:
        raise _bad(path, f"cannot be read ({error.strerror})", "a readable file") from None
    except BoundError as error:
        raise _bad(path, str(error).removeprefix(f"{path} "), "an ordinary file") from None
    except (PlyParseError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, PointCloudFileError):
            raise
        raise _bad(path, f"a body that does not fit its header ({error})") from None
    rows = data.elements[points].data
    columns = {
        name.lower(): np.asarray(rows[plain]).astype(rows[plain].dtype.newbyteorder("="))
        for name, plain in header.elements[points].scalars.items()
    }
    return PlyCloud(columns, header.comments)


def _bad(path: Path, given: str, allowed: str = "a PLY file", advice: str = COPY_AGAIN) -> PointCloudFileError:
    return PointCloudFileError(path, given, allowed, advice)


def _parse_header(path: Path, data: bytes) -> _Header:
    first = re.match(rb"ply[ \t]*(\r\n|\n|\r)", data, re.IGNORECASE)
    last = first and re.compile(rb"(?<=[\r\n])[ \t]*end_header[ \t]*" + first[1], re.IGNORECASE).search(data)
    if not first or not last:
        raise _bad(path, "no complete PLY header", "'ply' ... 'end_header'")
    comments: list[str] = []
    elements: list[_Element] = []
    layout = ""
    for line in data[first.end() : last.start()].splitlines():
        keyword = line.split(None, 1)[0].lower() if line.strip() else b""
        if keyword == b"comment":
            comments.append(_text(line.strip().partition(b" ")[2]))
        elif keyword not in (b"", b"obj_info"):
            layout = _add_line(path, elements, line, layout)
    return _Header(layout, elements, tuple(comments), last.end())


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _add_line(path: Path, elements: list[_Element], line: bytes, layout: str) -> str:
    """Add one ``element`` or ``property`` line to what has been read; return the format."""
    shown = f"the header line {_text(line.strip())!r}"
    try:
        words = line.decode("utf-8").split()
    except UnicodeDecodeError:
        raise _bad(path, shown, "UTF-8 text") from None
    lower = [word.lower() for word in words]
    match lower:
        case ["format", name, "1.0"] if name in _ORDER and not layout:
            return name
        case ["element", _, count] if layout and count.isascii() and count.isdigit() and len(count) <= 12:
            elements.append(_Element(lower[1], int(count)))
            return layout
        case ["property", "list", counts, items, _, *_] if elements and {counts, items} <= set(_TYPES):
            kind, name = [counts, items], " ".join(words[4:])
        case ["property", single, _, *_] if elements and single in _TYPES:
            kind, name = [single], " ".join(words[2:])
        case _:
            raise _bad(path, shown, f"format {'|'.join(_ORDER)} 1.0, element NAME COUNT or property TYPE NAME")
    taken = {other.lower() for other in elements[-1].names}
    if name.lower() in taken or (kind[1:] and _TYPES[kind[0]][0] == "f"):
        raise _bad(path, shown, "each property once, list lengths as integers")
    elements[-1].names.append(name)
    elements[-1].kinds.append(kind)
    return layout


def _points(path: Path, elements: list[_Element]) -> int:
    """Return which element holds the points."""
    columns = [{name.lower() for name in element.scalars} for element in elements]
    fit = [place for place, names in enumerate(columns) if {"x", "y", "z"} <= names]
    named = [place for place in fit if elements[place].name == "vertex"] or fit
    if len(named) != 1:
        given = "; ".join(f"{e.name}: {', '.join(e.names)}" for e in elements) or "no element"
        raise _bad(path, given, "x, y, z in an element vertex, or in one element alone")
    for group in (("red", "green", "blue"), ("nx", "ny", "nz")):
        present = columns[named[0]] & set(group)
        if present and len(present) < len(group):
            raise _bad(path, f"only {', '.join(sorted(present))}", f"all of {', '.join(group)} or none")
    return named[0]


def _body(path: Path, header: _Header, file: BinaryIO) -> PlyData:
    """Have plyfile read the body, straight from the file where no list is in the way."""
    size = file.seek(0, io.SEEK_END)
    file.seek(header.length)
    if header.layout == "ascii":
        lines = [line for line in file.read().splitlines() if line.strip()]
        promised = sum(element.count for element in header.elements)
        if len(lines) != promised:
            raise _bad(path, f"{len(lines)} lines of data", f"{promised} by its header")
        with warnings.catch_warnings():  # plyfile reads the items of a list by loadtxt, which warns of empty ones
            warnings.simplefilter("ignore", UserWarning)
            return PlyData.read(io.BytesIO(header.plain + b"\n".join(lines)))
    least = header.length + sum(element.count * element.least_bytes for element in header.elements)
    if least > size:
        raise _bad(path, f"{size} bytes", f"at least {least} by its header")
    triangles = {
        f"e{number}": {f"p{place}": _TRIANGLE for place, kind in enumerate(element.kinds) if kind[1:]}
        for number, element in enumerate(header.elements)
    }
    try:
        data, end = PlyData.read(_PlainHeader(file, header.plain), known_list_len=triangles), file.tell()
    except PlyElementParseError:  # lists of other lengths, which plyfile reads row by row, or damage
        file.seek(header.length)
        stream = io.BytesIO(header.plain + file.read())
        data = PlyData.read(stream)
        end = header.length + stream.tell() - len(header.plain)
    if end != size:
        raise _bad(path, f"{size} bytes", f"exactly {end} by its header")
    return data


class _PlainHeader:
    """A file that begins with another header; plyfile maps the rest of it into memory."""

    def __init__(self, file: BinaryIO, header: bytes) -> None:
        self._file, self._header = file, io.BytesIO(header)
        self.seek, self.tell, self.fileno = file.seek, file.tell, file.fileno

    def read(self, size: int = -1) -> bytes:
        return self._header.read(size) or self._file.read(size)


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
