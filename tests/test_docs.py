# SPDX-License-Identifier: Apache-2.0
"""What README and docs say holds: their Python runs, their links lead somewhere, their YAML parses."""

from __future__ import annotations

import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import moeapps.moe
from benchmarks import choosing
from benchmarks.markdown import WIDTH, wrapped
from benchmarks.readme import RESULTS, write_readme
from moeapps.moe import presets

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("tasks/*/README.md")),
]
EVERY_PAGE = [*PAGES, *sorted((ROOT / "docs" / "papers").glob("*.md"))]
LINKED = sorted({*EVERY_PAGE, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})
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


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in a link, as repositories and the site both make it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if not re.match(r"[a-z]+:", t)]

    missing = []
    for target in targets:
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_site_shows_every_page(page: Path) -> None:
    listed = set()
    for index in (ROOT / "docs/index.md", ROOT / "docs/api/index.md"):
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", index.read_text(), flags=re.MULTILINE | re.DOTALL):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            names = [re.sub(r".*<(.+)>", r"\1", entry) for entry in entries]
            listed |= {(index.parent / f"{name}.md").resolve() for name in names}

    assert page in listed | {ROOT / "docs/index.md"}


def test_every_public_module_has_its_place_in_the_reference() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    told = re.findall(r"^\.\. automodule:: (\S+)$", text, flags=re.MULTILINE)
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "moeapps").rglob("*.py")]
    modules = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    hidden = ("moeapps.commands", "moeapps.cli", "moeapps.__main__", "moeapps.moe.fast")  # as docs/api/index.md says

    assert sorted(told) == sorted(name for name in modules if not name.startswith(hidden))


def test_the_tables_on_routers_are_the_committed_results(tmp_path: Path) -> None:
    copy = tmp_path / "choosing.md"
    shutil.copy(choosing.PAGE, copy)

    choosing.write_page(copy)

    assert copy.read_text() == choosing.PAGE.read_text()
    assert "### Which score?" in copy.read_text()


def test_classes_that_the_page_on_routers_names_are_there() -> None:
    table = choosing.PAGE.read_text().partition("<!-- choosing:begin -->")[0]
    rows = [line.split("|")[2:4] for line in table.splitlines() if line.startswith("| ")][1:]

    names = [re.match(r"\w+", name)[0] for row in rows for name in re.findall(r"`([A-Z][^`]+)`", row[0])]  # type: ignore[index]
    presets_of = [re.sub(r"^presets\.", "", name) for row in rows for name in re.findall(r"`([^`]+)`", row[1])]
    assert len(rows) > 8
    assert {name for name in names if not hasattr(moeapps.moe, name)} <= {"RoutingContrast"}  # of a task
    for name in presets_of:
        if name.endswith(".yaml"):
            assert (ROOT / name).is_file()
        elif name.startswith("tasks."):
            module, _, attribute = name.rpartition(".")
            assert hasattr(import_module(module), attribute)
        else:
            assert hasattr(presets, name)


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
