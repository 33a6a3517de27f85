# SPDX-License-Identifier: Apache-2.0
"""A folder of classes: every file below a class folder is read, is known to be none of the data, or is an error."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from moeapps.data.images.arrays import ImageFileError
from moeapps.files import is_clutter
from moeapps.text import plain

NOTES = (".txt", ".caption", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".html", ".pdf")
"""Endings of what people lay beside their data: captions, tables, licences."""
_SHOWN = 40


def class_files(folder: Path, endings: Sequence[str], what: str = "picture") -> dict[str, list[Path]]:
    """Find the files of every class of one domain, class folders at any depth included.

    Hidden files and folders and the notes beside data are left out; anything else that is not read is an error, so that
    no file is lost in silence. Names are compared as people read them (Unicode's composed form).

    Args:
        folder: its folders are the classes.
        endings: of the files that are read, in small letters.
        what: a file is called this in messages.

    Returns:
        class -> sorted files, classes in the order of their names, none without a file.

    Raises:
        ImageFileError: no class, a class without a file, a file that is not read, or files beside the classes.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if is_clutter(path):
            continue
        if path.is_dir():
            name = unicodedata.normalize("NFC", path.name)
            found[name] = sorted(found.get(name, []) + files_below(path, endings, f"class {name!r}"))
        elif path.suffix.lower() not in NOTES:
            raise ImageFileError(
                f"{path} lies beside the class folders and is not read; move it into the folder of its class, or out"
            )
    if not found:
        raise ImageFileError(f"{folder} holds no class folder; put a {what} of each class into <class>/ below it")
    for name, files in found.items():
        if not files:
            raise ImageFileError(
                f"class {name!r} in {folder} holds no {what}; allowed endings: {', '.join(endings)}. Fill or remove it"
            )
    return dict(sorted(found.items()))


def files_below(folder: Path, endings: Sequence[str], where: str, above: tuple[str, ...] = ()) -> list[Path]:
    """Find the files of one class at any depth; links to folders are followed, but not in a circle.

    Args:
        folder: of the class.
        endings: of the files that are read, in small letters.
        where: for messages.
        above: folders that this one lies in, as the system resolves them.

    Raises:
        ImageFileError: a file that is neither read nor a note, or a link to nothing.
    """
    real = os.path.realpath(folder)
    if real in above:
        return []
    files = []
    with os.scandir(folder) as scan:
        entries = list(scan)
    for entry in entries:
        path = Path(entry.path)
        if is_clutter(path):
            continue
        if entry.is_dir():
            files += files_below(path, endings, where, (*above, real))
        elif entry.is_symlink() and not path.exists():
            raise ImageFileError(f"{where}: {path} is a link to nothing; mend or remove it")
        elif path.suffix.lower() in endings:
            files.append(path)
        elif path.suffix.lower() not in NOTES:
            raise ImageFileError(
                f"{where}: {path} is not read; allowed endings: {', '.join(endings)}. Convert, move or remove it"
            )
    return files


def found_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Say how many items of each class every domain has.

    Args:
        counts: domain -> class -> number of items; a class that a domain lacks is left out.

    Returns:
        a line of totals, then one line per class, a column per domain; of more than forty classes the first forty, and
        the least and largest number of the others.
    """
    names = list(dict.fromkeys(name for classes in counts.values() for name in classes))
    said = {name: plain(name) for name in names}
    head = ["class", *counts]
    rows = [["all classes", *(str(sum(classes.values())) for classes in counts.values())]]
    rows += [[said[name], *(str(classes.get(name, 0)) for classes in counts.values())] for name in names[:_SHOWN]]
    rest = names[_SHOWN:]
    if rest:
        spans = [[classes.get(name, 0) for name in rest] for classes in counts.values()]
        rows.append([f"{len(rest)} more, each", *(f"{min(span)} to {max(span)}" for span in spans)])
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in [head, *rows]
    )
