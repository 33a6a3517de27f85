# SPDX-License-Identifier: Apache-2.0
"""What README and docs say holds: their Python runs, their links lead somewhere, their YAML parses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from benchmarks.markdown import WIDTH, wrapped
from benchmarks.readme import RESULTS, write_readme

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("tasks/*/README.md")),
]
EVERY_PAGE = [*PAGES, *sorted((ROOT / "docs" / "papers").glob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_blocks_of_a_page_run_in_order(page: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}

    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_yaml_blocks_of_a_page_parse(page: Path) -> None:
    for block in blocks(page, "yaml"):
        assert yaml.safe_load(block) is not None


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_relative_links_of_a_page_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())

    missing = [t for t in targets if not re.match(r"[a-z]+:", t) and not (page.parent / t).exists()]

    assert not missing


@pytest.mark.parametrize("page", sorted(ROOT.glob("tasks/*/README.md")), ids=lambda page: page.parent.name)
def test_files_that_a_task_names_are_there(page: Path) -> None:
    named = re.findall(r"`([\w/]+\.py)`", page.read_text())
    folder = page.parent

    # With a folder it is a path, in the task or in the repository; a bare name stands for some file of the task.
    missing = [
        name
        for name in named
        if not (folder / name).exists() and not ((ROOT / name).exists() if "/" in name else any(folder.rglob(name)))
    ]

    assert named
    assert not missing


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_a_page_have_at_most_120_columns_tables_aside(page: Path) -> None:
    lines = page.read_text().splitlines()

    assert not [line for line in lines if len(line) > WIDTH and not line.lstrip().startswith("|")]


def test_wrapping_breaks_lines_and_changes_nothing_else() -> None:
    words = "- " + "several words with `code that stays whole` and a number " * 5 + "- 7. 8"

    lines = wrapped(f"| {'a' * 130} |\n\n{words}\n").splitlines()

    assert lines[0] == f"| {'a' * 130} |"
    assert max(map(len, lines[1:])) <= WIDTH
    assert " ".join(line.strip() for line in lines[2:]) == words
    assert all(line.startswith("  ") and "`" in line for line in lines[3:])
    assert wrapped("\n".join(lines)) == "\n".join(lines)


def test_the_table_of_the_demo_is_the_committed_result(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", copy)

    write_readme(json.loads(RESULTS.read_text()), copy)

    assert copy.read_text() == (ROOT / "README.md").read_text()
