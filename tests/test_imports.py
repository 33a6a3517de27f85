# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read from the source: tasks -> moeapps, never back, never task -> task."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

LIBRARY = sorted(Path("moeapps").rglob("*.py"))
TASKS = sorted(Path("tasks").rglob("*.py"))
HEAVY = ("lightning", "torchmetrics", "pytorch_lightning")


@cache
def imported(path: Path) -> frozenset[str]:
    """Return the dotted names of all modules that a file imports anywhere, ``importlib`` calls with text included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.with_suffix("").parts[: -node.level]) if node.level else ""
            names.add(".".join(part for part in (package, node.module or "") if part))
    return frozenset(names)


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_the_library_imports_no_task(path: Path) -> None:
    assert not [name for name in imported(path) if inside(name, "tasks", "tests", "benchmarks")]


@pytest.mark.parametrize("path", TASKS, ids=str)
def test_a_task_imports_no_other_task(path: Path) -> None:
    own = ".".join(path.parts[:2]) if len(path.parts) > 2 else "tasks"
    wrong = [name for name in imported(path) if inside(name, "tasks") and not inside(name, own)]

    assert not [name for name in wrong if name != "tasks"]
    assert not [name for name in imported(path) if inside(name, "tests", "benchmarks")]


@pytest.mark.parametrize("path", [path for path in TASKS if path.name == "model.py"], ids=str)
def test_a_model_file_imports_no_lightning_and_no_training(path: Path) -> None:
    wrong = [name for name in imported(path) if inside(name, *HEAVY, "moeapps.training", "moeapps.commands")]

    assert not wrong


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.parts[1] in ("moe", "nn")], ids=str)
def test_the_core_imports_torch_and_itself(path: Path) -> None:
    allowed = ("torch", "numpy", "moeapps.moe", "moeapps.nn")

    assert not [n for n in imported(path) if n.split(".")[0] not in sys.stdlib_module_names and not inside(n, *allowed)]


def test_importing_the_core_loads_neither_lightning_nor_torchmetrics() -> None:
    code = f"import sys, moeapps.moe; sys.exit(any(name in sys.modules for name in {HEAVY!r}))"

    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", [Path("moeapps/cli.py"), *sorted(Path("moeapps/commands").glob("[dlx]*.py"))], ids=str)
def test_the_command_line_imports_the_standard_library_at_module_level(path: Path) -> None:
    top: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            top.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            top.add(node.module or "")
    outside = {name for name in top if name.split(".")[0] not in sys.stdlib_module_names}

    assert outside <= {"moeapps"}
