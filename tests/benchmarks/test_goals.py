# SPDX-License-Identifier: Apache-2.0
"""The page of speed names every goal with what became of it; what was missed has three tries and a limit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import goals
from benchmarks.machines import known_here, with_elsewhere

LINES = [line for line in re.split(r"\n(?=- |\n)", goals.text()) if line.startswith("- ")]
HERE = [re.split(r" On [A-Z0-9]+: ", " ".join(line.split()))[0] for line in LINES]
MISSED = [line for line in HERE if ", missed." in line]


def test_the_page_tells_the_committed_goals() -> None:
    assert goals.text() in goals.PAGE.read_text(encoding="utf-8")
    assert all(file.is_file() for _, _, file, _ in goals.GROUPS)


def test_every_goal_is_either_reached_or_missed() -> None:
    assert len(LINES) > 30
    goals_alone = [" ".join(line.split()) for line in LINES if ", goal at " in " ".join(line.split())]
    assert len(goals_alone) == len(LINES) - 1  # one more says how HoME stands where memory is kept
    assert all((", reached." in line) != (", missed." in line) for line in HERE if ", goal at " in line)


@pytest.mark.parametrize("line", MISSED, ids=lambda line: line[2:].split(":")[0])
def test_what_was_missed_has_three_tries_and_a_limit(line: str) -> None:
    tried = re.search(r"Tried: (.*?)\. The limit: ", line)

    assert tried is not None, line
    assert len(re.findall(r" [\d.]+(?:e[+-]\d+)?(?: kB| s| %)?(?:,|$)", tried[1])) >= 3, line


def test_a_missed_goal_is_told_with_what_was_tried_and_the_limit() -> None:
    row = {"ok": False, "tried": {"another way": 2.0}, "limit": {"products alone": 1.2}}

    missed, reached = goals.Goal("x", 1.9, 1.5, row), goals.Goal("x", 1.4, 1.5, {"ok": True}, " s")

    tried = "- x: **1.9**, goal at most 1.5, missed. Tried: another way 2. The limit: products alone 1.2."
    assert goals.told(missed) == tried
    assert goals.told(reached) == "- x: **1.4 s**, goal at most 1.5 s, reached."
    assert goals.told(missed, {"AVX9": reached}) == f"{tried} On AVX9: 1.4 s, reached."


def test_a_file_keeps_what_was_measured_on_other_kinds_of_processors(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    first, second = {"machine": {"cpu": "A"}, "rows": [1]}, {"cpu": "B", "rows": [2]}

    for report, others in ((first, {}), (second, {"A": first}), ({**first, "rows": [3]}, {"B": second})):
        written = with_elsewhere(report, file)
        assert written == {**report, **({"elsewhere": others} if others else {})}
        file.write_text(json.dumps(written))
    assert known_here({"cpu": "A"}, file)["rows"] == [3]
    assert known_here({"cpu": "B"}, file) == {}
