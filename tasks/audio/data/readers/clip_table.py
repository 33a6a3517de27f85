# SPDX-License-Identifier: Apache-2.0
"""The table of a user's clips: one row per file, with its domain, its kind, its text and its labels."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from moeapps.bounds import BoundError, check_rows
from moeapps.data.domain import Split
from moeapps.files import absent
from tasks.audio.data.prompt import Prompt
from tasks.audio.data.readers.audio_files import AudioFileError

_NEEDED = ("file", "domain", "kind")
_KNOWN = (*_NEEDED, "text", "split")
_PLAIN = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
"""Paths that are their own normal form."""


@dataclass(frozen=True)
class ClipRow:
    """One row: the file below the folder, its domain, what it is, and its split where the table says it."""

    file: str
    domain: str
    prompt: Prompt
    split: Split | None


def read_clip_table(path: Path) -> list[ClipRow]:
    """Read a CSV file, UTF-8, with a header: file, domain, kind; text and split if wanted; other columns are labels.

    An empty cell of a label says that the clip has no such label.

    Raises:
        AudioFileError: no such table, a column that is missing or twice, no row, a row that says too much or too
            little, a kind or split that does not exist, a file twice, or a path that leaves the folder.
    """
    if not path.is_file():
        raise AudioFileError(f"{absent(path)}; write a table with the columns {', '.join(_NEEDED)}, text")
    try:
        check_rows(path, line=420, cell=60)  # a ClipRow, and a text and a place in a dict for each cell
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            _check_header(path, reader.fieldnames)
            rows = [_row(f"{path}, line {reader.line_num}", row) for row in reader]
    except BoundError as error:
        raise AudioFileError(str(error)) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise AudioFileError(f"{path} is not a readable table ({error}); save it as CSV in UTF-8") from error
    if not rows:
        raise AudioFileError(f"{path} has no row below its header; name at least one file")
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if row.file in first:
            raise AudioFileError(f"{path} names {row.file} in rows {first[row.file]} and {number}; name a file once")
        first[row.file] = number
    return rows


def _check_header(path: Path, names: object) -> None:
    columns = [str(name).strip() for name in names] if isinstance(names, list | tuple) else []
    wrong = [name for name in _NEEDED if name not in columns]
    if wrong:
        raise AudioFileError(f"{path} has no column {', '.join(wrong)}; it has {', '.join(columns) or 'none'}")
    if len({*columns}) < len(columns) or "" in columns:
        raise AudioFileError(f"{path} has a column twice or without a name: {', '.join(columns)}; name each once")


def _row(where: str, row: dict[str, str | None]) -> ClipRow:
    if None in row or None in row.values():
        raise AudioFileError(f"{where}: more or fewer cells than the header has; quote cells that hold a comma")
    cells = {str(name).strip(): str(cell).strip() for name, cell in row.items()}
    file = _below(cells["file"])
    if file is None:
        raise AudioFileError(f"{where}: file {cells['file']!r} is not a path below the folder")
    split = cells.get("split", "")
    if split and split not in get_args(Split):
        raise AudioFileError(f"{where}: split {split!r} is not allowed; use train, val, test or nothing")
    labels = {name: cell for name, cell in cells.items() if name not in _KNOWN and cell}
    try:
        prompt = Prompt(cells["kind"], labels, cells.get("text", ""))  # type: ignore[arg-type]
    except ValueError as error:
        raise AudioFileError(f"{where}: {error}") from error
    return ClipRow(file, cells["domain"], prompt, split or None)  # type: ignore[arg-type]


def _below(file: str) -> str | None:
    """The path as pathlib writes it; None where it is none below a folder."""
    if _PLAIN.fullmatch(file) and ".." not in file:  # most are, and pathlib takes as long as all else together
        return file
    path = Path(file)
    return None if not file or path.is_absolute() or ".." in path.parts else path.as_posix()
