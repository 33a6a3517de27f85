# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from moeapps.data.cache import build_once, cache_dir, config_hash


def test_folder_comes_from_argument_then_environment_then_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEAPPS_CACHE", str(tmp_path / "env"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    assert cache_dir("a", "b", root=tmp_path / "given") == tmp_path / "given" / "a" / "b"
    assert cache_dir("a") == tmp_path / "env" / "a"
    monkeypatch.delenv("MOEAPPS_CACHE")
    assert cache_dir() == tmp_path / "home" / ".cache" / "moeapps"
    assert cache_dir().is_dir()


def test_folder_that_cannot_be_made_names_the_variable_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="MOEAPPS_CACHE"):
        cache_dir("x", root=tmp_path / "file")


@dataclass(frozen=True)
class _Config:
    size: int
    name: str = "a"


def test_hash_depends_on_content_only() -> None:
    assert config_hash({"a": 1, "b": [2.5, None]}) == config_hash({"b": [2.5, None], "a": 1})
    assert config_hash(_Config(3)) == config_hash({"name": "a", "size": 3})
    assert config_hash(_Config(3)) != config_hash(_Config(4))
    assert config_hash({"a": 1, "b": 2}) == "43258cff783f"  # the same on every machine
    assert config_hash(Path("x")) == config_hash("x")


def test_what_json_cannot_say_is_refused() -> None:
    with pytest.raises(TypeError, match="object in a configuration"):
        config_hash({"a": object()})


def test_file_is_built_once(tmp_path: Path) -> None:
    calls = []

    def write(path: Path) -> None:
        calls.append(path)
        path.write_text("data")

    for _ in range(3):
        assert build_once(tmp_path / "sub" / "x.npz", write).read_text() == "data"
    assert len(calls) == 1
    assert calls[0] != tmp_path / "sub" / "x.npz"
    assert calls[0].suffix == ".npz"


@pytest.mark.parametrize("crash", [RuntimeError, KeyboardInterrupt])
def test_crash_leaves_no_partial_file_and_the_next_try_succeeds(tmp_path: Path, crash: type[BaseException]) -> None:
    def half(path: Path) -> None:
        path.write_text("ha")
        raise crash

    with pytest.raises(crash):
        build_once(tmp_path / "x", half)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []
    assert build_once(tmp_path / "x", lambda path: path.write_text("whole") and None).read_text() == "whole"


def test_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="without writing"):
        build_once(tmp_path / "x", lambda path: None)
    assert not (tmp_path / "x").exists()


def test_others_wait_and_find_the_file(tmp_path: Path) -> None:
    calls, read = [], []

    def slow(path: Path) -> None:
        calls.append(1)
        path.write_text("ha")
        time.sleep(0.05)
        path.write_text("whole")

    threads = [
        threading.Thread(target=lambda: read.append(build_once(tmp_path / "x", slow).read_text())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (len(calls), read) == (1, ["whole"] * 4)


def test_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise KeyError(path)

    with pytest.raises(KeyError):
        build_once(tmp_path / "l", fail)

    assert build_once(tmp_path / "l", lambda path: path.write_text("there")).read_text() == "there"


def test_two_processes_build_a_file_once_and_both_read_it_whole(tmp_path: Path) -> None:
    code = """
import pathlib, sys, time
from moeapps.data.cache import build_once

folder, me, other = pathlib.Path(sys.argv[1]), *sys.argv[2:]

def write(path):
    (folder / f"built by {me}").touch()
    path.write_text("ha")
    time.sleep(0.2)
    path.write_text("whole")

(folder / f"ready {me}").touch()
while not (folder / f"ready {other}").exists():
    time.sleep(0.001)
print(build_once(folder / "x", write).read_text())
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen([*command, *names], stdout=subprocess.PIPE, text=True) for names in ("ab", "ba")]
    read = [process.communicate(timeout=120)[0] for process in both]

    assert read == ["whole\n"] * 2
    assert len(list(tmp_path.glob("built by *"))) == 1


# Damage ----------------------------------------------------------------------------------------------------------


def counted(path: Path, calls: list[str], text: str = "whole") -> str:
    """Build a small file and read it, noting whether it was written."""

    def write(target: Path) -> None:
        calls.append(path.name)
        target.write_text(text)

    return build_once(path, write).read_text(errors="replace")


def test_a_file_with_any_single_bit_flipped_is_made_again(tmp_path: Path) -> None:
    calls: list[str] = []
    counted(tmp_path / "x", calls)
    for bit in range(8 * len("whole")):
        content = bytearray(b"whole")
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / "x").write_bytes(content)
        assert counted(tmp_path / "x", calls) == "whole"
    assert len(calls) == 1 + 8 * len("whole")


@pytest.mark.parametrize("damage", [b"", b"whol", b"whole ", b"another text of another length"])
def test_a_file_of_another_length_is_made_again_and_a_line_says_so(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    counted(tmp_path / "x", calls)
    (tmp_path / "x").write_bytes(damage)

    assert [counted(tmp_path / "x", calls) for _ in range(3)] == ["whole"] * 3
    assert calls == ["x"] * 2
    assert caplog.messages == [f"{tmp_path / 'x'} is damaged, or was not finished: it is made again"]


@pytest.mark.parametrize("digest", [None, "", "0" * 64 + "  x\n", "no digest", "\x00\xff"])
def test_existence_alone_does_not_say_that_a_file_is_whole(tmp_path: Path, digest: str | None) -> None:
    calls: list[str] = []
    counted(tmp_path / "x", calls)
    beside = tmp_path / ".x.sha256"
    if digest is None:
        beside.unlink()
    else:
        beside.write_text(digest, encoding="latin-1")

    assert counted(tmp_path / "x", calls) == "whole"
    assert len(calls) == 2
    assert beside.read_text() == f"{hashlib.sha256(b'whole').hexdigest()}  x\n"


def test_what_is_made_beside_a_file_is_whole_or_made_again_with_it(tmp_path: Path) -> None:
    folder, calls = tmp_path / "log", []

    def write(path: Path) -> None:
        calls.append(1)
        for part in ("train", "test"):
            (folder / part).mkdir(exist_ok=True)
            (folder / part / "a.parquet").write_text(part)
        path.write_text("{}")

    def build() -> None:
        build_once(folder / "rows.json", write, beside=lambda: folder.glob("*/*.parquet"))

    for spoil in (lambda path: path.write_text("tesT"), Path.unlink):
        build()
        before = len(calls)
        build()
        assert len(calls) == before
        spoil(folder / "test" / "a.parquet")
        build()
        assert len(calls) == before + 1
        assert (folder / "test" / "a.parquet").read_text() == "test"


def test_a_crash_between_the_moves_of_file_and_digest_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    counted(tmp_path / "x", calls)
    (tmp_path / "x").write_text("wHole")
    replace = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if Path(target).name == "x":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        counted(tmp_path / "x", calls, "other")
    monkeypatch.undo()

    assert counted(tmp_path / "x", calls) == "whole"


def test_a_file_that_is_whole_is_read_through_once_by_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    counted(tmp_path / "x", calls)
    counted(tmp_path / "x", calls)
    monkeypatch.setattr("moeapps.data.cache.sha256_of", lambda path: pytest.fail(f"{path} is read again"))

    assert counted(tmp_path / "x", calls) == "whole"
    assert calls == ["x"]


def test_every_cache_of_every_task_is_built_in_this_way() -> None:
    found = {path: path.read_text(encoding="utf-8") for path in Path("tasks").rglob("*.py")}
    users = [path for path, text in found.items() if "cache_dir(" in text]

    assert len({path.parts[1] for path in users}) == 6  # all tasks
    assert [path for path in users if "build_once(" not in found[path]] == []
