# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moeapps.data import archives
from moeapps.data.archives import ArchiveError, Package, archive_name, collect_packages, fetch_package, is_fetched
from moeapps.data.unpacking import load_numpy_pickle, safe_extract

PAYLOAD = b"points" * 100


def _tar(path: Path, entries: dict[str, bytes], extra: Callable[[tarfile.TarFile], None] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        if extra:
            extra(file)
    return path


def _package(path: Path, members: tuple[str, ...] = ("pkg-1.0/data/*.las",), **options: object) -> Package:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    base = {"name": "pkg", "version": "1.0", "kind": "sdist", "sha256": digest, "size": 1, "licence": "BSD"}
    return Package(**{**base, "members": members, **options})  # type: ignore[arg-type]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return _tar(tmp_path / "pkg.tar.gz", {"pkg-1.0/data/a.las": PAYLOAD, "pkg-1.0/setup.py": b"raise SystemExit(1)"})


# Fetching --------------------------------------------------------------------------------------------------------


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


# Hostile archives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../out.las", "a/../../out.las", "/tmp/out.las", "C:/out.las", "a\\..\\out.las"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    archive, target = tmp_path / "bad", tmp_path / "in" / "target"
    target.mkdir(parents=True)
    if kind == "tar":
        _tar(archive, {name: PAYLOAD})
    else:
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(name, PAYLOAD)

    with pytest.raises(ArchiveError, match="outside its folder"):
        safe_extract(archive, target, ["*"], kind=kind)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bad", "in", "target"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_devices_and_folders_are_refused(tmp_path: Path, kind: bytes) -> None:
    def extra(file: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("data/x.las")
        info.type, info.linkname = kind, "/etc/passwd"
        file.addfile(info)

    archive = _tar(tmp_path / "bad.tar.gz", {"data/ok.txt": b""}, extra)
    (tmp_path / "t").mkdir()
    with pytest.raises(ArchiveError, match="not a plain file"):
        safe_extract(archive, tmp_path / "t", ["data/x.las"])


def test_file_below_a_link_cannot_be_reached(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "t" / "data")
    archive = _tar(tmp_path / "bad.tar.gz", {"data/x.las": PAYLOAD})

    with pytest.raises(ArchiveError, match="outside its folder"):
        safe_extract(archive, tmp_path / "t", ["data/x.las"])
    assert not list((tmp_path / "elsewhere").iterdir())


def test_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("x.las")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
    (tmp_path / "t").mkdir()
    with pytest.raises(ArchiveError, match="not a plain file"):
        safe_extract(tmp_path / "bad.zip", tmp_path / "t", ["*"], kind="zip")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_bomb_is_stopped_by_the_bytes_it_gives(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "bomb"
    zeros = bytes(3_000_000)
    if kind == "tar":
        _tar(archive, {"x.las": zeros})
    else:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("x.las", zeros)
    assert archive.stat().st_size < 10_000
    (tmp_path / "t").mkdir()

    with pytest.raises(ArchiveError, match="refused"):
        safe_extract(archive, tmp_path / "t", ["x.las"], kind=kind, max_bytes=1_000_000)  # type: ignore[arg-type]
    assert sum(p.stat().st_size for p in (tmp_path / "t").iterdir()) <= 1_000_000


def test_bomb_among_unlisted_members_is_stopped_too(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "bomb", {"huge": bytes(3_000_000), "x.las": PAYLOAD})
    (tmp_path / "t").mkdir()
    with pytest.raises(ArchiveError, match="more than 1000000 bytes"):
        safe_extract(archive, tmp_path / "t", ["x.las"], max_bytes=1_000_000)


def test_member_given_twice_is_not_overwritten(tmp_path: Path) -> None:
    def extra(file: tarfile.TarFile) -> None:
        info = tarfile.TarInfo("x.las")
        info.size = 3
        file.addfile(info, io.BytesIO(b"bad"))

    archive = _tar(tmp_path / "a", {"x.las": PAYLOAD}, extra)
    (tmp_path / "t").mkdir()
    with pytest.raises(ArchiveError, match="cannot be unpacked"):
        safe_extract(archive, tmp_path / "t", ["x.las"])
    assert (tmp_path / "t" / "x.las").read_bytes() == PAYLOAD


@pytest.mark.parametrize("kind", ["tar", "zip", "deb"])
def test_cut_or_foreign_archive_is_one_clear_error(good: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "t").mkdir()
    whole = good.read_bytes()
    for data in (b"", b"not an archive", whole[: len(whole) // 2], whole[:-9]):
        good.write_bytes(data)
        with pytest.raises(ArchiveError):
            safe_extract(good, tmp_path / "t", ["pkg-1.0/data/*.las"], kind=kind)  # type: ignore[arg-type]


def test_missing_member_is_an_error(good: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with pytest.raises(ArchiveError, match="holds no file"):
        safe_extract(good, tmp_path / "t", ["pkg-1.0/data/*.las", "pkg-1.0/data/b.las"])


def test_debian_package_is_unpacked(tmp_path: Path) -> None:
    inner = _tar(tmp_path / "data.tar.gz", {"./usr/share/x/a.png": PAYLOAD}).read_bytes()

    def entry(name: str, data: bytes) -> bytes:
        return f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)

    deb = tmp_path / "x.deb"
    deb.write_bytes(
        b"!<arch>\n" + entry("debian-binary", b"2.0\n") + entry("control.tar", b"odd") + entry("data.tar.gz", inner)
    )
    (tmp_path / "t").mkdir()
    assert [p.read_bytes() for p in safe_extract(deb, tmp_path / "t", ["usr/share/x/*"], kind="deb")] == [PAYLOAD]


# Pickles ---------------------------------------------------------------------------------------------------------


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_pickles_are_read_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    value = {"x": np.arange(6.0).reshape(2, 3), "y": [np.int64(3), "name", None], "z": np.array(["a", "b"])}
    (tmp_path / "a.pkl.gz").write_bytes(gzip.compress(pickle.dumps(value, protocol)))
    read = load_numpy_pickle(tmp_path / "a.pkl.gz")

    np.testing.assert_array_equal(read["x"], value["x"])
    assert read["y"] == value["y"]
    np.testing.assert_array_equal(read["z"], value["z"])


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: [np.zeros(2), e], lambda e: np.array([e], dtype=object)])
def test_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Callable[[object], object]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(wrap(_Evil())))

    with pytest.raises(ArchiveError, match=r"posix\.system|nt\.system"):
        load_numpy_pickle(tmp_path / "a.pkl")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("name", ["builtins eval", "numpy load", "numpy.f2py compile", "subprocess Popen", "os system"])
def test_named_objects_other_than_arrays_are_refused(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    (tmp_path / "a.pkl").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(ArchiveError, match="only numpy arrays"):
        load_numpy_pickle(tmp_path / "a.pkl")


def test_damaged_pickles_are_one_clear_error(tmp_path: Path) -> None:
    whole = pickle.dumps(np.arange(50))
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole[: rng.integers(1, len(whole))])
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.pkl").write_bytes(data)
        with pytest.raises(ArchiveError):
            load_numpy_pickle(tmp_path / "a.pkl")


def test_pickle_bomb_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "a.pkl.gz").write_bytes(gzip.compress(pickle.dumps(np.zeros(1_000_000))))
    with pytest.raises(ArchiveError, match="more than 1000 bytes"):
        load_numpy_pickle(tmp_path / "a.pkl.gz", max_bytes=1000)
