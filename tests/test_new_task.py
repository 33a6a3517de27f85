# SPDX-License-Identifier: Apache-2.0
"""``moeapps new-task``: what it writes works as it is, wherever it is written; a name that is taken is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moeapps.cli import main
from moeapps.commands import new_task
from moeapps.commands.boundary import UsageError
from moeapps.commands.listing import systems
from moeapps.commands.new_task import TEMPLATES, write_task

ROOT = Path(__file__).resolve().parents[1]


def call(folder: Path, *words: str) -> str:
    """Run Python in a folder as a user would whose moeapps is this one."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "MOEAPPS_RUNS": "runs", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "no name for a task"),
        ("My_Task", "no name for a task"),
        ("2d", "no name for a task"),
        ("my-task", "no name for a task"),
        ("a.b", "no name for a task"),
        ("../up", "no name for a task"),
        ("my_", "no name for a task"),
        ("x" * 41, "no name for a task"),
        ("lambda", "no name for a task"),
        ("match", "no name for a task"),
        ("naïve", "no name for a task"),
        ("json", "is a package already"),
        ("torch", "is a package already"),
        ("mpl_toolkits", "is a package already"),  # without a file of its own
        ("tests", "is a package already"),
        ("tasks", "is a package already"),
        ("configs", "is a package already"),
        (systems()[0].name, "comes with moeapps"),
    ],
)
def test_a_name_that_cannot_be_had_is_refused_and_nothing_is_written(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        write_task(name, tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_what_is_there_is_left_as_it_is(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "my_task"
    if kind == "folder":
        (place / "mine").mkdir(parents=True)
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))

    assert main(["new-task", "my_task"]) == 2

    assert "there already" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_of_many_that_ask_for_one_name_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_task, "check_name", lambda *_: None)  # all have looked before one is there

    def ask(_: int) -> bool:
        try:
            return bool(write_task("my_task", tmp_path))
        except UsageError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 1

    assert (tmp_path / "my_task" / "my_task" / "model.py").is_file()


def test_a_disk_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    write = Path.write_text

    def full(path: Path, *args: str, **options: str) -> int:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        return write(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_task("my_task", tmp_path)

    assert len(written) == 3
    assert list(tmp_path.iterdir()) == []


def test_the_readme_is_in_order_whatever_the_length_of_the_name(tmp_path: Path) -> None:
    for name in ("a", "x" * 40):
        write_task(name, tmp_path)
        text = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        block = text.split("```")[1].splitlines()

        assert [line for line in block if " #" in line] == [], "a comment beside a command would not stand in a column"
        assert len([line for line in block if line.startswith("#")]) == 4


def test_what_is_written_is_formatted_and_holds_no_placeholder(tmp_path: Path) -> None:
    for name in ("a", "x" * 40):
        files = write_task(name, tmp_path)
        folder = tmp_path / name
        assert len(files) == len([path for path in TEMPLATES.rglob("*") if path.is_file()])
        assert not [path for path in files if "$" in (tmp_path / path).read_text() or "__NAME__" in path.name]
        for command in (["check"], ["format", "--check"]):
            done = subprocess.run(
                [sys.executable, "-m", "ruff", *command, str(folder)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout


@pytest.mark.medium
def test_the_package_passes_its_tests_and_trains_outside_the_repository(tmp_path: Path) -> None:
    call(tmp_path, "-m", "moeapps", "new-task", "my_task")
    folder = tmp_path / "my_task"

    assert "4 passed" in call(folder, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider")
    shown = call(
        folder, "-m", "moeapps", "fit", "--config", "configs/my_task.yaml", "--config", "configs/debug/tiny.yaml"
    )

    assert "mean unseen" in shown
    assert (folder / "runs" / "my_task" / "base" / "version_0" / "metrics" / "experts.json").is_file()
