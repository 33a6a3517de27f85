# SPDX-License-Identifier: Apache-2.0
"""The mutation run itself: on a toy project it finds the survivor, and its committed mutations still fit the core."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.mutate import MUTATIONS, ROOT, MutationError, mutated, run
from benchmarks.mutations import Mutation


def wrong(name: str, search: str, replace: str, tests: tuple[str, ...] = ("tests/moe/test_add.py",)) -> Mutation:
    return Mutation(name, "moeapps/moe/core.py", search, replace, tests, "sums are wrong")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    files = {
        "moeapps/__init__.py": "",
        "moeapps/moe/__init__.py": "",
        "moeapps/moe/core.py": "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return 2 * a\n",
        "tests/moe/test_add.py": "from moeapps.moe.core import add\n\n\ndef test_sum():\n    assert add(2, 3) == 5\n",
        "tests/moe/test_two.py": "from moeapps.moe.core import double\n\n\ndef test_2():\n    assert double(2) == 4\n",
        "configs/toy.yaml": "",
        "tasks/__init__.py": "",
        "pyproject.toml": "[tool.pytest.ini_options]\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def attempt(project: Path, *mutations: Mutation) -> tuple[int, str]:
    console = Console(file=io.StringIO(), record=True, width=160)
    return run(mutations, root=project, console=console), console.export_text()


@pytest.mark.medium
def test_killed_by_the_first_tests_or_by_the_rest_or_not_at_all(project: Path) -> None:
    fast = wrong("adds wrongly", "a + b", "a - b")
    slow = wrong("doubles wrongly", "2 * a", "3 * a")
    unseen = wrong("adds in another order", "a + b", "b + a")
    before = (project / "moeapps/moe/core.py").read_text()

    survivors, text = attempt(project, fast, slow, unseen)

    assert survivors == 1
    assert "test_add.py::test_sum" in text
    assert "test_two.py::test_2" in text
    assert "SURVIVED adds in another order (moeapps/moe/core.py): sums are wrong" in text
    assert "2 of 3 mutations killed." in text
    assert (project / "moeapps/moe/core.py").read_text() == before


def test_tests_that_fail_anyway_prove_nothing(project: Path) -> None:
    (project / "tests/moe/test_add.py").write_text("def test_sum():\n    assert False, 'broken'\n")
    with pytest.raises(MutationError, match="fail without any mutation"):
        attempt(project, wrong("adds wrongly", "a + b", "a - b"))


def test_a_mutation_that_does_not_import_is_an_error_not_a_kill(project: Path) -> None:
    with pytest.raises(MutationError, match="instead of passing or failing"):
        attempt(project, wrong("cannot be read", "def add(a, b):", "def add(a, b:"))


@pytest.mark.parametrize(("search", "replace"), [("a * b", "a"), ("return", "yield"), ("a + b", "a + b")])
def test_a_mutation_that_does_not_fit_exactly_once_is_an_error(project: Path, search: str, replace: str) -> None:
    with pytest.raises(MutationError, match="write the mutation anew"):
        attempt(project, wrong("stale", search, replace))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_committed_mutations_fit_the_core_and_leave_valid_python(mutation: Mutation) -> None:
    ast.parse(mutated((ROOT / mutation.path).read_text(encoding="utf-8"), mutation))
    for test in mutation.tests:
        assert (ROOT / test).is_file()


def test_there_are_at_least_a_dozen_mutations_with_names_of_their_own() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 12
