# SPDX-License-Identifier: Apache-2.0
"""Write the goals of speed and what became of them into docs/performance.md: ``python -m benchmarks.goals``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from benchmarks import few_rows, recommendation_speed
from benchmarks.markdown import wrapped
from benchmarks.readme import ROOT
from moeapps.files import write_text

PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- goals:begin -->\n).*?(<!-- goals:end -->)", re.DOTALL)


def told(name: str, value: float, gate: float, row: dict[str, Any]) -> str:
    """One line: the goal, what was reached and, where it was missed, what was tried and how far one could come."""
    line = f"- {name}: **{value:.2f}**, goal {'at least' if row.get('at_least') else 'at most'} {gate:g}"
    tried = row.get("tried") or {}
    if not isinstance(tried, dict):
        tried = {way["way"]: way["ratio"] for way in tried}
    if row["ok"] or not tried:
        return line + (", reached." if row["ok"] else ", missed.")
    line += ", missed. Tried: " + ", ".join(f"{way} {ratio:.2f}" for way, ratio in tried.items()) + "."
    limit = ", ".join(f"{what} {ratio:.2f}" for what, ratio in row.get("limit", {}).items()) or row.get("reason", "")
    return f"{line} The limit: {limit}." if limit else line


def lines() -> Iterator[str]:
    """Yield the lines of the block, from both committed results."""
    ranking = json.loads(recommendation_speed.RESULTS.read_text(encoding="utf-8"))
    layers = json.loads(few_rows.RESULTS.read_text(encoding="utf-8"))
    yield "### HoME (`python -m benchmarks.recommendation_speed`)\n"
    for row in ranking["rows"]:
        if row["gate"] is not None:
            yield told(row["text"], row["value"], row["gate"], row)
    yield "\n### Layers of few rows (`python -m benchmarks.few_rows --before FOLDER`)\n"
    one = layers["one_row"]
    if "python_left" in one:
        yield told(
            "What a call on one row costs above a plain module, over before", one["python_left"], one["gate"], one
        )
    for row in (*layers["rows"], *layers["auto"]):
        if row["gate"] is not None and row["ratio"] is not None:
            yield told(f"{row['name']}, {row['mode']}", row["ratio"], row["gate"], row)


def text() -> str:
    """The block of the page."""
    return wrapped("\n" + "\n".join(lines()) + "\n")


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, BLOCK.sub(lambda found: found[1] + text() + found[2], page))
