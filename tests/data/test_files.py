# SPDX-License-Identifier: Apache-2.0
"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import numpy as np
import pytest

from moeapps.commands.boundary import sentence
from moeapps.files import WholeFile, absent, write_arrays, write_json, write_text


def test_a_file_is_seen_only_when_it_is_whole_and_what_was_there_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.txt"
    write_text(path, "before")

    with WholeFile(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
        assert temporary.name == path.name

    assert path.read_text() == "after"
    assert [file.name for file in path.parent.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("crash", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path, crash: type[BaseException]) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "before")

    def crashing() -> None:
        with WholeFile(path) as temporary:
            temporary.write_text("ha")
            raise crash

    with pytest.raises(crash):
        crashing()

    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.txt", "before")]


def test_what_is_written_beside_a_file_comes_along(tmp_path: Path) -> None:
    with WholeFile(tmp_path / "x.las") as temporary:
        temporary.write_text("points")
        temporary.with_suffix(".txt").write_text("classes")

    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.las", "x.txt"]


def test_a_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="without writing"), WholeFile(tmp_path / "x"):
        pass
    assert not list(tmp_path.iterdir())


def test_json_is_strict_and_arrays_come_back(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5], "b": (float("inf"),)})
    write_arrays(tmp_path / "x", a=[1, 2], names=["p"])

    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": [None]}
    with np.load(tmp_path / "x", allow_pickle=False) as found:
        assert (found["a"].tolist(), found["names"].tolist()) == ([1, 2], ["p"])


def test_a_full_disk_is_told_with_the_file_and_costs_nothing(tmp_path: Path) -> None:
    """The system's own text, "[Errno 27] File too large", does not say which file."""
    path, before = tmp_path / "a.txt", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_text(path, "old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))  # as a full disk: the write breaks off in the file
    try:
        with pytest.raises(OSError, match="File too large") as told:
            write_text(path, "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.value.filename == str(path)
    assert told.value.errno == errno.EFBIG
    assert sentence(told.value) == f"{path}: file too large"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_what_is_told_of_a_missing_file_is_the_first_part_of_its_path_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "own" / "seen").mkdir(parents=True)
    (tmp_path / "flat").touch()
    for given, told in (
        ("own/seen/a.csv", f"no file {tmp_path}/own/seen/a.csv"),
        ("own/other/a.csv", f"no folder {tmp_path}/own/other, where a.csv is looked for"),
        ("none/other/a.csv", f"no folder {tmp_path}/none, where other/a.csv is looked for"),
        ("flat/a.csv", f"{tmp_path}/flat is no folder, where a.csv is looked for"),
        ("own/*/a.csv", f"no file {tmp_path}/own/*/a.csv"),
    ):
        assert absent(tmp_path / given) == told
