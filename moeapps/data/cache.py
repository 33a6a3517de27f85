# SPDX-License-Identifier: Apache-2.0
"""Build a file once, under a lock; and the folder for such files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from moeapps.files import WholeFile

_ENV = "MOEAPPS_CACHE"


def cache_dir(*parts: str, root: Path | str | None = None) -> Path:
    """Return (and create) a folder of the cache.

    Args:
        parts: sub-folders.
        root: root of the cache; default ``$MOEAPPS_CACHE``, else ``~/.cache/moeapps``.

    Raises:
        ValueError: the folder cannot be made.
    """
    base = Path(root) if root is not None else Path(os.environ.get(_ENV) or Path.home() / ".cache" / "moeapps")
    folder = base.expanduser().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot make the cache folder {folder} ({error}); set {_ENV} to a folder you can write"
        ) from error
    return folder


def config_hash(config: Any, length: int = 12) -> str:
    """Return a hexadecimal hash of a plain configuration.

    Dictionaries are hashed without regard to order, dataclasses as dictionaries, paths as text. Equal configurations
    give equal hashes on every machine and Python version.

    Raises:
        TypeError: the configuration holds something that JSON cannot say.
    """
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} in a configuration cannot be hashed; use numbers, text, lists, dicts")


def build_once(path: Path | str, writer: Callable[[Path], None]) -> Path:
    """Return ``path``, calling ``writer`` to make it if it is not there.

    ``writer`` receives the temporary name of a `WholeFile`: a crash leaves no half-written ``path``. A second process
    that wants the same file waits and then finds it.

    Args:
        path: file to return.
        writer: function that writes a whole file to the path given to it.

    Raises:
        RuntimeError: ``writer`` returned without writing.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return path
        with WholeFile(path) as temporary:
            writer(temporary)
    return path
