# SPDX-License-Identifier: Apache-2.0
"""Unpack untrusted archives and pickles without running or overwriting anything.

Only listed members are written; a listed member must be a plain file with a relative name below the target. Bytes are
counted while they are unpacked, not read from headers. Pickles may hold numpy arrays and plain containers, no more.
"""

from __future__ import annotations

import bz2
import fnmatch
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

ArchiveKind = Literal["tar", "zip", "deb"]
_CHUNK = 1 << 16
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError)


# What pickle and numpy raise on damaged input; MemoryError comes from a length field gone wrong.
_BAD_PICKLE = (pickle.UnpicklingError, ValueError, TypeError, LookupError, AttributeError, ImportError, MemoryError)


class ArchiveError(RuntimeError):
    """An archive cannot be fetched, has the wrong content, or is not safe to unpack."""


class _Counted(io.RawIOBase):
    """A stream that refuses to give more than ``limit`` bytes: a bomb ends here, whatever its headers say."""

    def __init__(self, stream: IO[bytes], limit: int, what: str) -> None:
        self._stream, self._left, self._what, self._limit = stream, limit, what, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise ArchiveError(f"{self._what} unpacks to more than {self._limit} bytes; refused")
        buffer[: len(data)] = data
        return len(data)


def safe_extract(
    archive: Path, target: Path, members: Sequence[str], *, kind: ArchiveKind = "tar", max_bytes: int = 1 << 30
) -> list[Path]:
    """Unpack the listed members of ``archive`` below ``target``.

    Args:
        archive: a .tar(.gz|.bz2|.xz), .zip or .whl, or .deb file.
        target: existing folder.
        members: names or shell patterns (``*`` crosses folders); each must match at least one member.
        kind: form of the archive.
        max_bytes: most bytes unpacked, listed or passed over on the way.

    Returns:
        the files written, in the order of the archive.

    Raises:
        ArchiveError: broken archive; a listed member that is missing, not a plain file, or whose name is absolute or
            leaves ``target``; too many bytes.
    """
    try:
        if kind == "zip":
            written = _unpack_zip(archive, target, members, max_bytes)
        else:
            stream = _data_member(archive) if kind == "deb" else open(archive, "rb")  # noqa: SIM115 - closed below
            with stream:
                written = _unpack_tar(stream, archive.name, target, members, max_bytes)
    except _BROKEN as error:
        raise ArchiveError(f"{archive.name} cannot be unpacked ({error}); it is damaged: fetch it again") from error
    names = [name for name, _ in written]
    for wanted in members:
        if not fnmatch.filter(names, wanted):
            raise ArchiveError(f"{archive.name} holds no file {wanted!r}; it is not the listed release")
    return [path for _, path in written]


def _listed(name: str, members: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, wanted) for wanted in members)


def _place(name: str, target: Path, archive: str) -> Path:
    """Return where a member goes.

    Raises:
        ArchiveError: the name is absolute, has a drive, a backslash or NUL, or climbs out of ``target``.
    """
    parts = PurePosixPath(name).parts
    bad = name.startswith("/") or "\\" in name or "\0" in name or ".." in parts or not parts or ":" in parts[0]
    if bad or not (target / name).resolve().is_relative_to(target.resolve()):
        raise ArchiveError(f"{archive} holds {name!r}, which would be written outside its folder; refused")
    return target / name


def _write(source: IO[bytes], path: Path, left: int, archive: str) -> int:
    """Copy a member, and return how many bytes it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    total = 0
    with open(path, "xb") as sink:
        while data := source.read(_CHUNK):
            total += len(data)
            if total > left:
                raise ArchiveError(f"{archive} unpacks to more bytes than allowed; refused")
            sink.write(data)
    return total


def _unpack_zip(archive: Path, target: Path, members: Sequence[str], max_bytes: int) -> list[tuple[str, Path]]:
    written, left = [], max_bytes
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if not _listed(info.filename, members):
                continue
            path = _place(info.filename, target, archive.name)
            mode = info.external_attr >> 28  # file type bits of st_mode; 0 where the archive has none, 8 a plain file
            if info.is_dir() or mode not in (0, 8) or info.flag_bits & 1:
                raise ArchiveError(f"{archive.name}: {info.filename!r} is not a plain file; refused")
            with file.open(info) as source:
                left -= _write(source, path, left, archive.name)
            written.append((info.filename, path))
    return written


def _unpack_tar(
    stream: IO[bytes], label: str, target: Path, members: Sequence[str], max_bytes: int
) -> list[tuple[str, Path]]:
    written = []
    plain = io.BufferedReader(_Counted(_decompressed(stream), max_bytes, label))
    with tarfile.open(fileobj=plain, mode="r|", errorlevel=2) as file:
        for info in file:
            name = info.name.removeprefix("./")
            if not _listed(name, members):
                continue
            path = _place(name, target, label)
            source = file.extractfile(info) if info.isreg() else None
            if source is None:
                raise ArchiveError(f"{label}: {name!r} is a link, folder or device, not a plain file; refused")
            _write(source, path, max_bytes, label)
            written.append((name, path))
    return written


def _decompressed(stream: IO[bytes]) -> IO[bytes]:
    head = stream.read(6)
    stream.seek(-len(head), io.SEEK_CUR)
    if head[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    if head[:3] == b"BZh":
        return bz2.BZ2File(stream)
    if head == b"\xfd7zXZ\0":
        return lzma.LZMAFile(stream)
    if head[:4] == b"\x28\xb5\x2f\xfd":
        raise ArchiveError("the archive is packed with zstd, which Python 3.11 cannot read; unpack it by hand")
    return stream


def _data_member(archive: Path) -> IO[bytes]:
    """Open the ``data.tar.*`` inside a Debian package (an ``ar`` file)."""
    with open(archive, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ArchiveError(f"{archive.name} is not a Debian package; fetch it again")
        while len(header := file.read(60)) == 60:
            name = header[:16].rstrip(b" /").decode("ascii", "replace")
            if header[58:] != b"`\n" or not header[48:58].strip().isdigit():
                break
            size = int(header[48:58])
            if name.startswith("data.tar"):
                return io.BytesIO(file.read(size))
            file.seek(size + size % 2, io.SEEK_CUR)
    raise ArchiveError(f"{archive.name} holds no data.tar; it is damaged: fetch it again")


class _NumpyUnpickler(pickle.Unpickler):
    """An unpickler that can build numpy arrays and scalars, and nothing else that has a name."""

    _ALLOWED = frozenset(
        {
            *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
            *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),  # how protocol 2 writes the bytes of an array
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise ArchiveError(f"the pickle asks for {module}.{name}; only numpy arrays are allowed, refused")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)

    def persistent_load(self, pid: Any) -> Any:
        raise ArchiveError("the pickle refers to an object outside itself; only numpy arrays are allowed, refused")


def load_numpy_pickle(path: Path, *, encoding: str = "latin1", max_bytes: int = 1 << 30) -> Any:
    """Read a pickle (plain, .gz, .bz2 or .xz) of numpy arrays in lists, tuples and dictionaries.

    Args:
        path: the file.
        encoding: how Python 2 strings are read.
        max_bytes: most bytes after decompression.

    Raises:
        ArchiveError: damaged, too large, or it asks for anything but numpy arrays. Nothing of it is run.
    """
    with open(path, "rb") as stream:
        try:
            plain = io.BufferedReader(_Counted(_decompressed(stream), max_bytes, path.name))
            return _NumpyUnpickler(plain, encoding=encoding).load()
        except ArchiveError:
            raise
        except (*_BAD_PICKLE, *_BROKEN) as error:
            raise ArchiveError(f"{path.name} is not a readable pickle of numpy arrays ({error})") from error
