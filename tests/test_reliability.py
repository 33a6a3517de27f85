# SPDX-License-Identifier: Apache-2.0
"""docs/reliability.md promises nothing that no test holds, and READMEs nothing that it lacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path("docs") / "reliability.md"
READMES = [Path("README.md"), *sorted(Path("tasks").glob("*/README.md"))]
# Words that promise something about faults, strangers' files or errors: a README may use one that the page has.
PROMISES = (
    *("resum", "goes on after an interruption", "goes on where", "bit-equal", "to the bit", "crash", "is lost"),
    *("half-written", "whole or not at all", "damaged", "malicious", "untrusted", "trusted", "pickle", "sandbox"),
    *("traceback", "one sentence", "clear error", "exit code", "out of memory", "memory leak"),
)


def test_every_promise_names_a_test_that_exists() -> None:
    tests = {
        name
        for path in Path("tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    text = PAGE.read_text(encoding="utf-8")
    tables = re.findall(r"^\| promise \| test \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    promises = [line.strip("|").split("|") for table in tables for line in table.splitlines()]

    assert len(promises) >= 16
    for row in promises:
        named = re.findall(r"`(test_\w+)`", row[1])
        assert named, row[0]
        assert set(named) <= tests, (row[0], set(named) - tests)


def test_every_test_that_the_page_names_is_there() -> None:
    text = PAGE.read_text()
    files = {str(path): path.read_text() for path in Path("tests").rglob("*.py")}
    known = {name for held in files.values() for name in re.findall(r"^ *def (test_\w+)\(", held, flags=re.MULTILINE)}
    named = set(re.findall(r"\b(test_\w+)\b(?!\.py)", text))
    paths = set(re.findall(r"tests/[\w/]+\.py", text))

    assert "test_a_chain_of_killed_and_interrupted_processes_takes_every_step_to_the_bit" in named
    assert sorted(named - known) == []
    assert sorted(paths - set(files)) == []
    # A name beside its file, as pytest writes it, is in that file.
    pairs = re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", text)
    assert [pair for pair in pairs if f"def {pair[1]}(" not in files[pair[0]]] == []


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_a_readme_promises_nothing_that_the_page_lacks(readme: Path) -> None:
    said, page = (" ".join(path.read_text().lower().split()) for path in (readme, PAGE))

    assert [word for word in PROMISES if word in said and word not in page] == []
