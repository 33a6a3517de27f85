# SPDX-License-Identifier: Apache-2.0
"""Memory and time bounded before they are taken: what a file promises is compared with what it is.

A file of a few bytes may ask for gigabytes (a compressed archive, a header with a large count, YAML whose names stand
for one another), and a pipe or a device that is called like a file never ends. What is not bounded by its own size is
refused here, before any memory is taken.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from moeapps.text import plain

YAML_BYTES = 4_000_000
"""Largest YAML file: a configuration of millions of characters is a mistake."""
YAML_VALUES = 200_000
"""Most values of a YAML file, each alias counted as all that it stands for."""
JSON_BYTES = 1_000_000_000
DEEPEST = 200
"""Most levels of lists and mappings inside one another."""
RATIO, FLOOR = 10, 200_000_000
"""An archive may give this many bytes for each of its own, beyond what any archive may give."""
FREE_BYTES, PER_BYTE = 256_000_000, 10
"""A reader may take this memory beyond ten times a file's size."""


ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, RuntimeError),
    *(ValueError, OverflowError, KeyError, IndexError),
)
"""What zipfile and the decompressors of its parts answer damage with."""


class BoundError(ValueError):
    """A file asks for more than it can need, or is no file at all."""


def require_file(path: Path | str) -> int:
    """Return the size of an ordinary file.

    Raises:
        BoundError: a pipe, a device, a socket or a folder, also behind a link: reading it may never end; or a name
            that no file can have.
        FileNotFoundError: nothing there.
    """
    try:
        about = os.stat(path)
    except ValueError as error:  # a zero byte, or a sign that no encoding has, in a name that a file gives
        raise BoundError(f"{plain(path)} is no name of a file ({error}); correct it") from error
    if not stat.S_ISREG(about.st_mode):
        kind = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe, device or socket"
        raise BoundError(f"{path} is {kind}, not a file; give an ordinary file")
    return about.st_size


def read_text(path: Path, most: int) -> str:
    """Read a file of UTF-8.

    Raises:
        BoundError: larger than ``most`` bytes, no ordinary file, or no UTF-8.
        OSError: it cannot be read.
    """
    size = require_file(path)
    if size > most:
        raise BoundError(f"{path} has {size:,} bytes, at most {most:,} are read; is it the right file?")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BoundError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); save it so") from error


def check_rows(path: Path, line: int, cell: int = 0) -> None:
    """Refuse a table of so many short lines that its rows would fill memory, before any is made; see `check_parts`.

    Args:
        path: a CSV file.
        line: bytes of memory that are held of a line.
        cell: bytes beyond that for each comma.

    Raises:
        BoundError: they would, or no ordinary file.
        OSError: it cannot be read.
    """
    size, lines, cells = require_file(path), 1, 0
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            lines += max(block.count(b"\n"), block.count(b"\r"))
            cells += block.count(b",")
    check_parts(path, size, 0, {"lines": (lines, line), "cells": (cells, cell)}, "split it into several files")


def check_parts(
    path: Path | str,
    size: int,
    held: int,
    parts: Mapping[str, tuple[int, int]],
    advice: str = "write them as an array (.npz), or in several files",
) -> None:
    """Refuse a file whose many small parts (rows, cells) would need more memory than a file of its size may take.

    Args:
        path: the file.
        size: its bytes.
        held: bytes of memory that hold it already.
        parts: kind of part -> how many there are, and the bytes of memory of each.
        advice: what to do.

    Raises:
        BoundError: they need more.
    """
    if held + sum(count * each for count, each in parts.values()) > FREE_BYTES + PER_BYTE * size:
        told = " and ".join(f"{count:,} {kind}" for kind, (count, each) in parts.items() if each)
        raise BoundError(f"{path} has {told} in {size:,} bytes, which would fill memory; {advice}")


# YAML 1.1 takes 010 for eight and 1:30 for ninety, which nobody means who writes them.
_OTHER_NUMBER = re.compile(r"[-+]?(?:0[0-9_]+|[0-9_]+(?::[0-9_]+)+(?:\.[0-9_]*)?)")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, for documents that say each thing once and whose aliases stand for few values."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _values(node, {}, 0)
            _said_once(node)
        return node


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        BoundError: too large, too deep, with aliases that stand for too much or for themselves, with a key twice, or
            with a number that YAML reads as another one.
        yaml.YAMLError: not YAML.
        OSError: it cannot be read.
    """
    return read_yaml_nodes(path)[0]


def read_yaml_nodes(path: Path) -> tuple[Any, yaml.Node | None]:
    """Read a YAML file with its nodes, which know their lines; None for an empty file. What `<<` names is merged.

    Raises:
        BoundError: too large, too deep, with aliases that stand for too much or for themselves, with a key twice, or
            with a number that YAML reads as another one.
        yaml.YAMLError: not YAML.
        OSError: it cannot be read.
    """
    text = read_text(path, YAML_BYTES)
    loader = _Loader(text)  # a safe loader
    try:
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except RecursionError as error:
        raise BoundError(f"{path}: lists or mappings lie too deep inside one another; flatten it") from error
    except BoundError as error:
        raise BoundError(f"{path}{', ' if str(error).startswith('line ') else ': '}{error}") from error
    except (ValueError, OverflowError) as error:  # PyYAML on dates and numbers that do not exist
        raise BoundError(f"{path}: a value that cannot be read ({error}); correct it") from error
    finally:
        loader.dispose()


def _said_once(root: yaml.Node) -> None:
    """Refuse keys that stand twice in a mapping, and numbers that YAML reads as another one; neither is ever told."""
    found, seen = [root], {id(root)}
    while found:
        node = found.pop()
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _NUMBERS and node.style is None and _OTHER_NUMBER.fullmatch(node.value):
                value = yaml.SafeLoader("").construct_object(node)
                if node.value.lstrip("+-0_") != str(abs(value)) and value:
                    told = f"line {node.start_mark.line + 1}: YAML reads {node.value} as {value}"
                    raise BoundError(
                        f"{told}; write the number that is meant, or {node.value!r} in quotes where it is a word"
                    )
            continue
        below: list[yaml.Node] = list(node.value)
        if isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                    continue
                word, line = (key.tag, key.value), key.start_mark.line + 1
                if word in lines:
                    told = f"line {line}: {key.value!r} stands in line {lines[word]} already"
                    raise BoundError(f"{told}, and of two the last would win in silence; keep one")
                lines[word] = line
            below = [part for pair in node.value for part in pair]
        found += [part for part in below if id(part) not in seen]
        seen |= {id(part) for part in below}


def _values(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Count the values below a node, those behind an alias each time that it is used."""
    if depth > DEEPEST:
        raise BoundError(f"more than {DEEPEST} levels of lists and mappings; flatten it")
    if id(node) in known:
        count = known[id(node)]
        if not count:
            raise BoundError("an alias stands for itself; write the value out")
        return count
    if isinstance(node, yaml.ScalarNode):
        return 1
    known[id(node)] = 0
    below: Iterable[Any] = node.value
    if isinstance(node, yaml.MappingNode):
        below = (part for pair in node.value for part in pair)
    count = 1
    for part in below:
        count += _values(part, known, depth + 1)
        if count > YAML_VALUES:
            raise BoundError(f"more than {YAML_VALUES:,} values, aliases counted; write less, or without aliases")
    known[id(node)] = count
    return count


def read_json(path: Path, most: int = JSON_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        BoundError: too large, too deep, or not JSON.
        OSError: it cannot be read.
    """
    text = read_text(path, most)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise BoundError(f"{path}: lists or mappings lie too deep inside one another; write it again") from error
    except ValueError as error:  # damage, and integers of thousands of digits
        raise BoundError(f"{path} is not JSON ({error}); write it again") from error


def check_zip(path: Path | str) -> None:
    """Refuse a zip archive whose parts would be larger than what its bytes can give.

    Raises:
        BoundError: it asks for more, or its list of parts is damaged.
        OSError: it cannot be read.
    """
    size = require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except ZIP_ERRORS as error:
        raise BoundError(f"{path} is no readable archive ({error}); write it again") from error
    total = sum(part.file_size for part in parts)
    if total > FLOOR + RATIO * size:
        raise BoundError(
            f"{path} has {size:,} bytes and unpacks to {total:,}, which may be made to fill memory; if the data are "
            "good, write them without compression"
        )


def check_npz(path: Path | str) -> None:
    """Refuse an npz or npy file whose arrays need more memory than its bytes can hold; no array is read.

    numpy takes the memory that the header of an array promises before it reads a number.

    Raises:
        BoundError: an array larger than its part of the file, pickled objects, or a damaged archive.
        OSError: it cannot be read.
    """
    size = require_file(path)
    with open(path, "rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            stream.seek(0)
            _check_array(stream, str(path), size)
            return
    check_zip(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                if part.filename.endswith(".npy"):
                    with archive.open(part) as stream:
                        _check_array(stream, f"{path}: {part.filename[:80]}", part.file_size)
    except BoundError:
        raise
    except ZIP_ERRORS as error:
        raise BoundError(f"{path} cannot be read ({error}); it is damaged: write it again") from error


def _check_array(stream: IO[bytes], where: str, size: int) -> None:
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, kind = read(stream)
    except Exception as error:  # of numpy's and Python's parsers, nearly any; only their calls stand in the try
        raise BoundError(f"{where} has a damaged header ({error}); write it again") from error
    if kind.hasobject:
        raise BoundError(f"{where} holds pickled objects, which are never loaded; write plain numbers")
    count = 1
    for side in shape:
        if side < 0:
            raise BoundError(f"{where} has the shape {shape}; write it again")
        count *= side
    if count * kind.itemsize > size:
        raise BoundError(
            f"{where} promises {count * kind.itemsize:,} bytes of numbers in {size:,}; it is damaged: write it again"
        )
