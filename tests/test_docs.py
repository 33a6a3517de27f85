# SPDX-License-Identifier: Apache-2.0
"""What README and docs say holds: their Python runs, their links lead somewhere, their YAML parses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from benchmarks.readme import RESULTS, write_readme

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("tasks/*/README.md")),
]
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


def test_the_table_of_the_demo_is_the_committed_result(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", copy)

    write_readme(json.loads(RESULTS.read_text()), copy)

    assert copy.read_text() == (ROOT / "README.md").read_text()
