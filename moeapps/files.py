# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all: text, JSON, arrays, and whatever else a writer makes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

_CLUTTER = ("thumbs.db", "desktop.ini", "__macosx", "@eadir")


def is_clutter(path: Path) -> bool:
    """Whether a file or folder is hidden, or one that systems lay into folders by themselves: never data."""
    return path.name.startswith(".") or path.name.lower() in _CLUTTER


def place_of(path: Path) -> str:
    """Return the folder and the name of a data file, for errors: each domain may have a file of that name."""
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def absent(path: Path) -> str:
    """Say what of the way to a file is not there: a wrong root reads unlike a wrong name.

    Args:
        path: of a file or, in it, the pattern of files that is not met.

    >>> absent(Path("/nowhere/seen/a.csv"))
    'no folder /nowhere, where seen/a.csv is looked for'
    >>> absent(Path("/a.csv"))
    'no file /a.csv'
    """
    folder = missing_part(path)
    if folder == path:
        return f"no file {path}"
    what = f"{folder} is no folder" if folder.exists() else f"no folder {folder}"
    return f"{what}, where {path.relative_to(folder).as_posix()} is looked for"


def missing_part(path: Path) -> Path:
    """Return the first folder on the way to a path that is not there, else the path itself."""
    return next((part for part in reversed(path.parents) if not part.is_dir() and "*" not in part.name), path)


class WholeFile:
    """A file that appears under its name once it is complete; a crash before that leaves no half-written one.

    It is written under its own name into a hidden folder beside its place, flushed to the disk, and renamed. Files that
    the writer puts beside it there move along, before it::

        with WholeFile(path) as temporary:
            figure.savefig(temporary)

    Args:
        path: where the file will be; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        self.temporary = self._folder / path.name

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.finish()
            return
        self.drop()
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise self._named(error) from error

    def finish(self) -> None:
        """Give the file its name.

        Raises:
            RuntimeError: nothing was written.
            OSError: it cannot be written to the end.
        """
        try:
            if not self.temporary.exists():
                raise RuntimeError(f"the writer of {self.path.name} returned without writing its file")
            for file in sorted(self._folder.iterdir(), key=lambda file: file.name == self.path.name):
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
                file.replace(self.path.parent / file.name)
        except OSError as error:
            if error.filename is None and error.errno is not None:
                raise self._named(error) from error
            raise
        finally:
            self.drop()

    def _named(self, error: OSError) -> OSError:
        """The same error with the file in it: the system tells of a full disk and a quota without a name."""
        return OSError(error.errno, error.strerror, str(self.path))

    def drop(self) -> None:
        """Leave nothing behind of what is not finished."""
        shutil.rmtree(self._folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all."""
    with WholeFile(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON whole or not at all; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def write_arrays(path: Path, **arrays: Any) -> Path:
    """Write name -> array (anything numpy takes) as npz, whole or not at all.

    Args:
        path: file to write.
        arrays: what to write.
    """
    import numpy as np

    with WholeFile(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return path


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def finite(value: Any) -> Any:
    """Return a copy of a JSON value in which every number that is not finite is None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
