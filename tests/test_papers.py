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
_BREAK = r"\s+(?:#\s+)?"
_NUMBERS = rf"((?:\d+(?: to \d+)?(?:,?{_BREAK}(?:and{_BREAK})?(?=\d))?)+)"
CITATION = re.compile(rf"docs/papers/(\w+)\.md(?:,{_BREAK}equations?{_BREAK}{_NUMBERS})?")


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
    """``3``, ``1, 2 and 5``, ``2 to 4`` or ``1 to 3 and 5`` as numbers."""
    found = re.findall(r"(\d+)(?: to (\d+))?", text)
    return [number for first, last in found for number in range(int(first), int(last or first) + 1)]


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


LISTS = {"3": [3], "1, 2 and 5": [1, 2, 5], "2 to 4": [2, 3, 4], "1 to 3 and 5": [1, 2, 3, 5]}


@pytest.mark.parametrize("text", LISTS)
def test_lists_of_equations_are_read(text: str) -> None:
    assert numbers(text) == LISTS[text]
    word = "equation" if text == "3" else "equations"
    assert CITATION.findall(f"(docs/papers/home.md, {word} {text}; a decay of 0.95)") == [("home", text)]


def test_no_source_is_cited_that_a_reader_does_not_have() -> None:
    hidden = re.compile(r"\bcards?\b|\b" + "DES" + r"IGN\b")
    own = Path(__file__).resolve()
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("moeapps", "tasks", "configs", "benchmarks", "tests", "docs", "notebooks")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".yaml", ".md", ".ipynb") and path != own
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if hidden.search(line)
    ]

    assert wrong == []


TASKS = {
    "point_cloud": "point_moe",
    "image_diffusion": "promoe",
    "recommendation": "home",
    "dynamics": "mixer",
    "audio": "unimoe_audio",
    "adaptation": "meta_dmoe",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_is_found_from_the_map_of_the_house(page: Path) -> None:
    assert f"(papers/{page.name})" in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("task", "system"), [*TASKS.items(), ("recommendation", "aw_moe")])
def test_the_page_of_a_task_is_found_from_its_readme_and_the_projects(task: str, system: str) -> None:
    assert f"docs/papers/{system}.md)" in (ROOT / "tasks" / task / "README.md").read_text(encoding="utf-8")
    assert f"(docs/papers/{system}.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


ROOMS = ["model.py", "nets/", "module.py", "losses.py", "metrics.py", "datamodule.py", "data/", "data/readers/"]
ROOMS += ["rivals/", "report/", "commands.py", "packages.py"]


@pytest.mark.parametrize("task", TASKS)
def test_a_readme_shows_all_rooms_of_its_task_in_one_order(task: str) -> None:
    folder = ROOT / "tasks" / task
    text = (folder / "README.md").read_text(encoding="utf-8").split("## How it reads")[1].split("```")[0]
    rows = re.findall(r"^\| (`.+`) \| (.+) \|$", text, re.MULTILINE)
    shown = [name for room, _ in rows for name in re.findall(r"`(.+?)`", room)]

    assert shown == [name for name in ROOMS if (folder / name).exists()]
    named = [(folder / room.strip("`"), name) for room, told in rows for name in re.findall(r"`(\w+\.py)`", told)]
    assert [f"{place}{name}" for place, name in named if not (place / name).exists()] == []


def test_the_map_of_the_house_names_files_that_hold_what_it_says() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Where is what")[1]
    rows = re.findall(r"^\| .+ \| `([\w/]+\.py)` \| (.+) \|$", text.split("\n## ")[0], re.MULTILINE)

    assert len(rows) > 15
    lost = [
        f"{file}: {name}"
        for file, names in rows
        for name in re.findall(r"`(\w+)`", names)
        if name not in names_of(ROOT / file)
    ]
    assert lost == []
