# SPDX-License-Identifier: Apache-2.0
"""docs/run_folders.md has a row for each file that a run writes, and no row for one that none writes."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from moeapps.cli import main
from tests import systems

PAGE = Path("docs/run_folders.md").read_text(encoding="utf-8")
TITLES = {
    "point_moe": "Point-MoE",
    "promoe": "ProMoE",
    "home": "HoME",
    "aw_moe": "AW-MoE",
    "mixer": "MixER",
    "unimoe_audio": "UniMoE-Audio",
    "meta_dmoe": "Meta-DMoE",
}


def rows(text: str) -> list[tuple[list[str], str]]:
    """What the first column of a table names, and its second column."""
    cells = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", names), told.strip()) for names, told in cells]


FILES, KEYS = (rows(part) for part in PAGE.split("## run.json"))
PATTERNS = [pattern for patterns, _ in FILES for pattern in patterns]


def written(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def without_a_row(files: set[str]) -> list[str]:
    return sorted(file for file in files if not any(fnmatch(file, pattern) for pattern in PATTERNS))


@pytest.mark.medium
def test_the_page_has_what_a_run_and_later_commands_in_its_folder_write(tmp_path: Path) -> None:
    assert main(["fit", "--config", "tests/toy.yaml"]) == 0
    folder = tmp_path / "runs" / "toy" / "base" / "version_0"
    for command in ("test", "validate", "predict"):
        assert main([command, "--run", str(folder)]) == 0

    files = written(folder)
    assert not without_a_row(files)
    everywhere = [
        patterns for patterns, told in FILES if not re.search(rf"\b(when|where|{'|'.join(TITLES.values())})\b", told)
    ]
    assert len(everywhere) > 8
    assert not [name for patterns in everywhere for name in patterns if not any(fnmatch(f, name) for f in files)]
    facts = json.loads((folder / "run.json").read_text())
    assert set(facts) == {name for names, _ in KEYS for name in names}
    assert facts["packages"] == {"tests": {"version": None, "commit": facts["packages"]["tests"]["commit"]}}
    header = json.loads((folder / "metrics" / "test.json").read_text())["header"]
    assert {key: header[key] for key in facts} == facts


@pytest.mark.slow
@pytest.mark.parametrize("base", systems.BASES, ids=systems.name)
def test_the_page_has_what_each_system_writes(base: Path, tmp_path: Path) -> None:
    assert main(["fit", *systems.tiny(base)]) == 0
    folder = tmp_path / "runs" / base.stem / "base" / "version_0"
    assert main(["predict", "--run", str(folder)]) == 0

    files = written(folder)
    assert not without_a_row(files)
    own = [name for names, told in FILES if re.search(rf"\b{TITLES[base.stem]}\b", told) for name in names]
    assert not [name for name in own if not any(fnmatch(file, name) for file in files)]
    assert any(file.startswith("predictions/") for file in files)
