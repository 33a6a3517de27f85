# SPDX-License-Identifier: Apache-2.0
"""The commits a run names, of moeapps and of the user's package: marked when code changed, not when results came in."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from moeapps.training.run import git_commit, own_packages


def git(folder: Path, *words: str) -> None:
    name = ("-c", "user.name=n", "-c", "user.email=n@example.org")
    subprocess.run(["git", "-C", str(folder), *name, *words], check=True, capture_output=True)


def test_only_changed_code_marks_the_commit_as_changed(tmp_path: Path) -> None:
    files = {"moeapps/core.py": "a", "docs/evidence.md": "a", "benchmarks/results/toy.json": "a"}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    git(tmp_path, "init")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-m", "first")
    inside = tmp_path / "moeapps"
    clean = git_commit(inside)

    (tmp_path / "docs/evidence.md").write_text("b")
    (tmp_path / "benchmarks/results/toy.json").write_text("b")
    assert clean is not None
    assert git_commit(inside) == clean

    (tmp_path / "moeapps/core.py").write_text("b")
    assert git_commit(inside) == f"{clean}-dirty"


def test_a_folder_outside_of_any_checkout_has_no_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None


def test_a_package_in_no_commit_has_none_although_its_folder_lies_in_a_checkout(tmp_path: Path) -> None:
    for path in ("mine/code.py", "env/lib/theirs/code.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("a")
    (tmp_path / ".gitignore").write_text("env/")
    git(tmp_path, "init")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-m", "first")

    commit = git_commit(tmp_path / "mine")
    assert commit is not None
    (tmp_path / "link").symlink_to("mine")
    assert git_commit(tmp_path / "link") == commit
    assert git_commit(tmp_path / "env" / "lib" / "theirs") is None


def test_the_user_s_own_packages_are_named_with_commit_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, module = tmp_path / "own_package_of_a_test", tmp_path / "own_module_of_a_test.py"
    package.mkdir()
    for file in (package / "__init__.py", package / "model.py", module):
        file.write_text("class Net: pass\n")
    info = tmp_path / "own_package_of_a_test-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package-of-a-test\nVersion: 1.5\n")
    (info / "top_level.txt").write_text("own_package_of_a_test\n")
    git(tmp_path, "init")
    git(tmp_path, "add", "own_package_of_a_test", module.name)
    git(tmp_path, "commit", "-m", "first")
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{package.name}.model", module.stem):
        importlib.import_module(name)
    try:
        config = {
            "model": {"class_path": f"{package.name}.model.Net", "init_args": {"moe": "moeapps.moe.presets.switch"}},
            "data": {"init_args": {"sources": [f"{module.stem}.Net", "collections.Counter", "not.imported.Net"]}},
            "metric": "val.accuracy",
        }
        commit = git_commit(package)

        assert commit is not None
        assert not commit.endswith("-dirty")
        assert own_packages(config) == {
            module.stem: {"version": None, "commit": commit},
            package.name: {"version": "1.5", "commit": commit},
        }

        (package / "more.py").write_text("a")  # in no commit, and may be what ran
        assert own_packages(config)[package.name]["commit"] == f"{commit}-dirty"
    finally:
        for name in (package.name, f"{package.name}.model", module.stem):
            del sys.modules[name]
