# SPDX-License-Identifier: Apache-2.0
"""The commit a run names: marked when code has changed, not when results of other runs have come in."""

from __future__ import annotations

import subprocess
from pathlib import Path

from moeapps.training.run import git_commit


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
