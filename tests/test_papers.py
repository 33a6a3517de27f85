# SPDX-License-Identifier: Apache-2.0
"""What the code cites can be opened: every equation of docs/papers names its code, every citation names an equation."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "papers").glob("*.md"))
CITING = [
    path
    for folder in ("moeapps", "tasks", "configs", "benchmarks", "tests", "docs")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml", ".md") and "results" not in path.parts
    if "docs/papers/" in path.read_text(encoding="utf-8")
]
ROW = re.compile(r"^\| (\d+) \| (.+) \|$", re.MULTILINE)
PLACE = re.compile(r"`([\w/]+\.py): ([\w.]+)`")
CITATION = re.compile(r"docs/papers/(\w+)\.md(?:,\s+(?:#\s+)?equations? ([\d, and\n#]*\d(?: to \d+)?))?")


@cache
def names_of(path: Path) -> frozenset[str]:
    """Classes, functions, methods and constants of a Python file, as ``name`` or ``Class.name``."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], before: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(before + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{before}{node.name}.")
            elif isinstance(node, ast.Assign):
                found.update(before + t.id for t in node.targets if isinstance(t, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(before + node.target.id)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def rows(page: Path) -> dict[int, list[tuple[str, str]]]:
    """Equation -> (file, name) of its code."""
    return {int(number): PLACE.findall(cell) for number, cell in ROW.findall(page.read_text(encoding="utf-8"))}


def numbers(text: str) -> list[int]:
    """``3``, ``1, 2 and 5`` or ``2 to 4`` as numbers."""
    found = [int(number) for number in re.findall(r"\d+", text)]
    return list(range(found[0], found[1] + 1)) if " to " in text else found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_equations_are_numbered_in_order_and_each_names_code_that_exists(page: Path) -> None:
    written = [int(number) for number in re.findall(r"^\((\d+)\) ", page.read_text(encoding="utf-8"), re.MULTILINE)]
    table = rows(page)

    assert written == list(range(1, len(written) + 1))
    assert list(table) == written
    assert [number for number, places in table.items() if not places] == []
    missing = [
        f"{file}: {name}"
        for places in table.values()
        for file, name in places
        if not (ROOT / file).exists() or name not in names_of(ROOT / file)
    ]
    assert missing == []


@pytest.mark.parametrize("path", CITING, ids=lambda path: str(path.relative_to(ROOT)))
def test_citations_name_a_page_and_equations_that_lead_back_to_the_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    file = str(path.relative_to(ROOT))
    for name, cited in CITATION.findall(text):
        page = ROOT / "docs" / "papers" / f"{name}.md"
        assert page.exists(), f"docs/papers/{name}.md is cited but not there"
        table = rows(page)
        for number in numbers(cited) if cited else []:
            assert number in table, f"docs/papers/{name}.md has no equation {number}"
        if cited and file.startswith(("moeapps/", "tasks/")) and path.suffix == ".py":
            led = {place for number in numbers(cited) for place, _ in table[number]}
            assert file in led, f"equations {cited} of docs/papers/{name}.md name {sorted(led)}, not {file}"


@pytest.mark.parametrize("text", ["3", "1, 2 and 5", "2 to 4"])
def test_lists_of_equations_are_read(text: str) -> None:
    assert numbers(text) == {"3": [3], "1, 2 and 5": [1, 2, 5], "2 to 4": [2, 3, 4]}[text]
