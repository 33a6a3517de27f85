# SPDX-License-Identifier: Apache-2.0
"""The page of speed names every goal with what became of it; what was missed has three tries and a limit."""

from __future__ import annotations

import re

import pytest

from benchmarks import goals

LINES = [line for line in re.split(r"\n(?=- |\n)", goals.text()) if line.startswith("- ")]
MISSED = [" ".join(line.split()) for line in LINES if " missed." in " ".join(line.split())]


def test_the_page_tells_the_committed_goals() -> None:
    assert goals.text() in goals.PAGE.read_text(encoding="utf-8")
    assert all(file.is_file() for _, _, file, _ in goals.GROUPS)


def test_every_goal_is_either_reached_or_missed() -> None:
    assert len(LINES) > 30
    goals_alone = [" ".join(line.split()) for line in LINES if ", goal at " in " ".join(line.split())]
    assert len(goals_alone) == len(LINES) - 1  # one more says how HoME stands where memory is kept
    assert all((" reached." in line) != (" missed." in line) for line in goals_alone)


@pytest.mark.parametrize("line", MISSED, ids=lambda line: line[2:].split(":")[0])
def test_what_was_missed_has_three_tries_and_a_limit(line: str) -> None:
    tried = re.search(r"Tried: (.*?)\. The limit: ", line)

    assert tried is not None, line
    assert len(re.findall(r" [\d.]+(?:e[+-]\d+)?(?: kB| s| %)?(?:,|$)", tried[1])) >= 3, line


def test_a_missed_goal_is_told_with_what_was_tried_and_the_limit() -> None:
    row = {"ok": False, "tried": {"another way": 2.0}, "limit": {"products alone": 1.2}}

    assert goals.told("x", 1.9, 1.5, row=row) == (
        "- x: **1.9**, goal at most 1.5, missed. Tried: another way 2. The limit: products alone 1.2."
    )
    assert goals.told("x", 1.4, 1.5, row={"ok": True}, unit=" s") == "- x: **1.4 s**, goal at most 1.5 s, reached."
