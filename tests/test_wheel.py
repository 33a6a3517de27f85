# SPDX-License-Identifier: Apache-2.0
"""What is built works without a checkout: in an empty environment, in another folder, with the wheel and nothing else.

The environment borrows the packages of this one, which are 7 GB, by a path file; pip checks that they are what the
wheel asks for.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TOP = ("moeapps", "tasks", "configs", "tests", "benchmarks", "docs", "notebooks")


def call(*words: str | Path, folder: Path) -> str:
    """Run a program as a user would, without what this process has in its environment; return what it prints."""
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MOEAPPS_RUNS")}
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source archive from a copy of this checkout, and the wheel from the source archive."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in TOP:
        shutil.copytree(name, source / name, ignore=ignored)
    for file in (path for path in Path.cwd().iterdir() if path.is_file() and path.name != ".git"):
        shutil.copy(file, source)
    for hidden in (".ci", ".github"):
        shutil.copytree(hidden, source / hidden)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, folder=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


def test_the_wheel_holds_every_source_and_config(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}

    code = {str(path) for top in ("moeapps", "tasks") for path in Path(top).rglob("*.py")}
    configs = {f"moeapps/{path}" for path in Path("configs").rglob("*.yaml")}
    tables = {str(path) for top in ("moeapps", "tasks") for path in Path(top).rglob("*.json")}
    readmes = {str(path) for path in Path("tasks").glob("*/README.md")}
    templates = {str(path) for path in Path("moeapps").glob("**/templates/**/*") if path.is_file()}
    assert templates
    assert held == code | configs | tables | readmes | templates | {"moeapps/py.typed"}


def test_a_package_index_shows_no_link_of_readme_that_leads_nowhere(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        shown = archive.read(name).decode()

    assert "make demo" in shown
    assert not re.search(r"\]\((?!https?:|#)", shown)


def test_the_source_archive_holds_the_tests_and_what_they_read(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}

    wanted = [
        path for top in TOP for path in Path(top).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {str(path) for path in wanted} | {
        ".ci/run",
        "Makefile",
        "CHANGELOG.md",
        "constraints.txt",
        "Dockerfile",
    } <= held


def test_the_wheel_alone_trains_and_lists_in_a_bare_environment(wheel: Path, tmp_path: Path) -> None:
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare", folder=tmp_path)
    programs = tmp_path / "bare" / "bin"
    packages = call(programs / "python", "-c", "import site; print(site.getsitepackages()[0])", folder=tmp_path).strip()
    # Path files in a folder that a path file names are not read: the editable moeapps of this environment stays out.
    (Path(packages) / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", programs / "python"]
    call(*pip, "install", "--no-index", "--no-compile", wheel, folder=tmp_path)
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    where = call(
        programs / "python", "-c", "import moeapps, tasks; print(moeapps.__file__, tasks.__file__)", folder=folder
    )
    assert [Path(word).parents[1] for word in where.split()] == [Path(packages)] * 2
    systems = [str(path) for path in sorted(Path("configs").glob("*.yaml"))]
    lines = call(programs / "moeapps", "list", folder=folder).splitlines()
    assert [line.split()[0] for line in lines[: len(systems)]] == systems
    assert "sample" in call(programs / "moeapps", "--help", folder=folder)
    call(programs / "moeapps", "new-task", "my_task", folder=folder)
    assert (folder / "my_task" / "my_task" / "model.py").is_file()
    call(
        programs / "lightning",
        "fit",
        "--config",
        "configs/home.yaml",
        "--config",
        "configs/debug/tiny.yaml",
        folder=folder,
    )
    assert (folder / "runs" / "home" / "base" / "version_0" / "metrics" / "test.json").is_file()
    assert "1 run, " in call(programs / "moeapps", "report", "runs/home/base", folder=folder)
    assert "Ranked impressions" in (folder / "report.html").read_text(encoding="utf-8")
