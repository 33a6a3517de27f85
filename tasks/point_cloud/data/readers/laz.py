# SPDX-License-Identifier: Apache-2.0
"""What a LAZ file says about its own sizes, checked before the decompressor takes memory for it.

The decompressor believes every number: a table of four thousand million chunks ends the process, a layer of four
gigabytes fills the memory. The bytes that are there bound both.

Source: the LAZ 1.4 specification of rapidlasso (record 22204 of "laszip encoded", chunk table, layers of items 10-14).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import lazrs

_RECORD = ("laszip encoded", 22204)
_POINTWISE, _LAYERED = 2, 3
_VARIABLE = 2**32 - 1
_LAYERS = {10: 9, 11: 1, 12: 2, 13: 1}  # of an item's type; extra bytes (14) have one per byte
_ANY_SIZE = 32_000_000
"""Bytes of points that a file of any size may give: a second of work, where 64 MB took three."""
_MOST_RATIO = 60
"""Most bytes of points for one of the file, beyond the bytes that any file may take."""


class LazSizeError(ValueError):
    """The sizes that a LAZ file tells do not fit one another or the file."""


@dataclass(frozen=True)
class _Setup:
    compressor: int
    chunk_size: int
    items: tuple[tuple[int, int], ...]
    raw: bytes


def check_laz(stream: io.BufferedIOBase, size: int, records: tuple[int, int], start: int, count: int) -> None:
    """Refuse a LAZ file that asks for more memory than its bytes can fill.

    Args:
        stream: the file.
        size: its bytes.
        records: where its variable-length records begin, and how many there are.
        start: where its points begin.
        count: how many points the header tells of, each as long as the items say.

    Raises:
        LazSizeError: sizes that do not fit; the text says which.
    """
    setup = _setup(stream, records, start)
    length = sum(width for _, width in setup.items)
    if count * length > max(_ANY_SIZE, _MOST_RATIO * size):
        raise LazSizeError(f"its header tells of {count} points of {length} bytes in a file of {size}")
    place, told = start + 8, 0
    for points, width in _chunks(stream, setup, size, start, count):
        told += points
        if points > max(count, setup.chunk_size if setup.chunk_size != _VARIABLE else 0) or place + width > size:
            raise LazSizeError(f"a chunk of {points} points and {width} bytes at byte {place} of {size}")
        if setup.compressor == _LAYERED and width:
            _check_layers(stream, setup, place, width, length)
        place += width
    if told < count:  # the decompressor would go on behind the last chunk that was looked at
        raise LazSizeError(f"its table of chunks tells of {told} points, its header of {count}")


def _setup(stream: io.BufferedIOBase, records: tuple[int, int], start: int) -> _Setup:
    """Find the record that tells how points are compressed."""
    place, count = records
    for _ in range(count):
        stream.seek(place)
        head = stream.read(54)
        if len(head) < 54 or place + 54 > start:
            break
        user, record, length = struct.unpack_from("<16sHH", head, 2)
        if (user.split(b"\0")[0].decode("latin-1"), record) == _RECORD:
            return _parsed(stream.read(min(length, start - place - 54)))
        place += 54 + length
    raise LazSizeError("no record tells how its points are compressed")


def _parsed(raw: bytes) -> _Setup:
    if len(raw) < 34:
        raise LazSizeError(f"the record of its compression has {len(raw)} bytes, at least 34 are needed")
    compressor, chunk_size, number = struct.unpack("<H10xI16xH", raw[:34])
    if len(raw) < 34 + 6 * number or not number:
        raise LazSizeError(f"the record of its compression tells of {number} items in {len(raw)} bytes")
    items = tuple(struct.unpack_from("<HH", raw, 34 + 6 * k) for k in range(number))
    if compressor not in (_POINTWISE, _LAYERED) or not chunk_size:
        raise LazSizeError(f"compressor {compressor} with chunks of {chunk_size} points; known are compressors 2 and 3")
    return _Setup(compressor, chunk_size, items, raw)


def _chunks(stream: io.BufferedIOBase, setup: _Setup, size: int, start: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield points and bytes of every chunk, after the length of their table was checked."""
    stream.seek(start)
    (table,) = struct.unpack("<q", stream.read(8).ljust(8, b"\0"))
    if table == -1:  # written to something that could not go back
        stream.seek(size - 8)
        (table,) = struct.unpack("<q", stream.read(8).ljust(8, b"\0"))
    if not start + 8 <= table <= size - 8:
        raise LazSizeError(f"its table of chunks should begin at byte {table} of {size}")
    stream.seek(table)
    _, number = struct.unpack("<II", stream.read(8))
    most = count if setup.chunk_size == _VARIABLE else -(-count // setup.chunk_size)
    if number > max(1, most):
        raise LazSizeError(f"its table tells of {number} chunks, {max(1, most)} at most hold {count} points")
    if number:
        stream.seek(start)
        yield from lazrs.read_chunk_table(stream, lazrs.LazVlr(setup.raw))


def _check_layers(stream: io.BufferedIOBase, setup: _Setup, place: int, width: int, length: int) -> None:
    """Refuse a chunk whose layers are longer than it is."""
    layers = sum(_LAYERS.get(kind, size) for kind, size in setup.items)
    head = length + 4 + 4 * layers
    stream.seek(place + length + 4)
    sizes = stream.read(4 * layers)
    if head > width or len(sizes) < 4 * layers or head + sum(struct.unpack(f"<{layers}I", sizes)) > width:
        raise LazSizeError(f"the layers of the chunk at byte {place} are longer than its {width} bytes")
