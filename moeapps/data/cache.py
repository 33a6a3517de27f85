# SPDX-License-Identifier: Apache-2.0
"""Build a file once, under a lock, and again if it is damaged; and the folder for such files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from moeapps.files import WholeFile, sha256_of

log = logging.getLogger("moeapps")
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


def build_once(
    path: Path | str, writer: Callable[[Path], None], beside: Callable[[], Iterable[Path]] | None = None
) -> Path:
    """Return ``path``, calling ``writer`` to make it unless it is there and whole.

    ``writer`` receives the temporary name of a `WholeFile`: a crash leaves no half-written ``path``. A second process
    that wants the same file waits and then finds it. A digest in a hidden file beside it says that it is whole; one
    that is damaged, or has no digest, is made again.

    Args:
        path: file to return.
        writer: function that writes a whole file to the path given to it.
        beside: further files, in the folder of ``path`` or below, that the writer has made at their places; they are
            whole or made again together with it.

    Raises:
        RuntimeError: ``writer`` returned without writing.
    """
    path = Path(path)
    if is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if is_whole(path):
            return path
        if path.exists():
            log.warning("%s is damaged, or was not finished: it is made again", path)
        with WholeFile(path) as temporary:
            writer(temporary)
            if temporary.exists():
                further = beside() if beside else ()
                files = {path.name: temporary, **{file.relative_to(path.parent).as_posix(): file for file in further}}
                digests_of(temporary).write_text(digest_lines(files), encoding="utf-8")
    return path


def digests_of(path: Path) -> Path:
    """Return where the digests of a file or folder of the cache are."""
    return path.with_name(f".{path.name}.sha256")


def digest_lines(files: Mapping[str, Path]) -> str:
    """Return the digests of files by their names, in the form of `sha256sum`."""
    return "".join(f"{sha256_of(file)}  {name}\n" for name, file in files.items())


def is_whole(path: Path) -> bool:
    """Whether a file (and what was made beside it) or a folder is what its digests say.

    A process reads a file through once, unless it changes.
    """
    try:
        lines = digests_of(path).read_text(encoding="utf-8").splitlines()
        named = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        own = path.name in named or any(name.startswith(f"{path.name}/") for name in named)
        return own and all(_known(path.parent / name) == digest for name, digest in named.items())
    except (OSError, UnicodeDecodeError):
        return False


def _known(file: Path) -> str:
    status = file.stat()
    return _digest(file, (status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=100_000)
def _digest(file: Path, state: tuple[int, int, int]) -> str:
    return sha256_of(file)
