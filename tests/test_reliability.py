# SPDX-License-Identifier: Apache-2.0
"""docs/reliability.md promises nothing that no test holds, and READMEs nothing that it lacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.reliability.__main__ import RESULTS, read
from benchmarks.reliability.counted import count_cases

PAGE = Path("docs") / "reliability.md"
READMES = [Path("README.md"), *sorted(Path("tasks").glob("*/README.md"))]
SLOW = {
    name
    for path in Path("tests").rglob("test_*.py")
    for name in re.findall(
        r"^@pytest\.mark\.slow\n(?:@.*\n|[ )].*\n)*def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
}
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


@pytest.mark.slow
def test_every_test_that_the_page_names_is_collected_as_often_as_it_says() -> None:
    """Collecting everything takes half a minute, so this is of `make test-slow`."""
    cases = count_cases(PAGE)

    assert [name for name, found in cases.items() if not found] == []
    assert read(RESULTS)["tests"] == cases, "run python -m benchmarks.reliability tests"


def test_every_promise_has_a_count_of_cases_and_slow_tests_are_called_so() -> None:
    text, cases = PAGE.read_text(encoding="utf-8").partition("## Measured")[0], read(RESULTS)["tests"]
    rows = re.findall(r"^\|.*`test_\w+`.*\|$", text, re.MULTILINE)

    assert len(rows) >= 45
    for row in rows:
        named = re.findall(r"`(test_\w+)`( \(slow\))?", row)
        assert row.rsplit("|", 2)[1].strip() == f"{sum(cases[name] for name, _ in named):,}"
        assert [name for name, slow in named if bool(slow) != (name in SLOW)] == []


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
