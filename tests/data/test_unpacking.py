# SPDX-License-Identifier: Apache-2.0
"""Archives and pickles of strangers: nothing leaves its folder, fills the disk or runs, and damage is one error."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moeapps.data.archives import ArchiveError
from moeapps.data.unpacking import load_numpy_pickle, safe_extract
from tests.data.archives_common import PAYLOAD, _tar

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
