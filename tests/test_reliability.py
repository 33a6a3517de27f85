# SPDX-License-Identifier: Apache-2.0
"""docs/reliability.md promises nothing that no test holds."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path("docs") / "reliability.md"


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
