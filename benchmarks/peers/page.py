# SPDX-License-Identifier: Apache-2.0
"""Write the measured part of docs/performance.md: ``python -m benchmarks.peers.page`` reads results/peers.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.markdown import wrapped
from benchmarks.peers.environment import ROOT
from benchmarks.peers.rows import HEADINGS
from moeapps.files import write_text

RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- peers:begin -->\n).*?(<!-- peers:end -->)", re.DOTALL)


def block(report: dict[str, Any]) -> str:
    """The measured part of the page."""
    lines = [""]
    for group, heading in HEADINGS.items():
        rows = [row for row in report["rows"] if row["group"] == group]
        if not rows:
            continue
        lines += [f"## {heading}", "", *table(rows), ""]
        lines += [f"- {row['name']}: {told(row)}." for row in rows] + [""]
    machine, versions = report["machine"], report_versions(report)
    lines.append(
        f"`{report['command']}` ([results](../benchmarks/results/peers.json)), {report['pairs']} pairs, "
        f"{machine['machine']}, {machine['cpu']}, Python {machine['python']}, torch {machine['torch']}; {versions}."
    )
    return "\n".join([*lines, "", ""])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Ratio, spread, that of the commit before, gate, times and limit of each row."""
    lines = [
        "| ours / theirs | ratio | spread | before | at most | our ms | limit ms | ours / limit |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        if "ratio" not in row:
            lines.append(f"| {row['name']} | not measured |" + " |" * 6)
            continue
        before = f"{row['before']:.2f}" if "before" in row else ""
        ratio, gate = f"{row['ratio']:.2f}", "" if row["gate"] is None else f"{row['gate']:.2f}"
        ratio = f"**{ratio}**" if row["ok"] is False else ratio
        spread = " to ".join(f"{value:.2f}" for value in row["spread"])
        limit = f"{row['limit_ms']:.1f}" if row.get("limit_ms") else ""
        over = f"{row['over_limit']:.1f}" if row.get("over_limit") else ""
        lines.append(
            f"| {row['name']} | {ratio} | {spread} | {before} | {gate} | {row['our_ms']:.1f} | {limit} | {over} |"
        )
    return lines


def told(row: dict[str, Any]) -> str:
    """What was equal, or why a row has no number."""
    return str(row.get("equal") or row.get("absent") or f"the race broke ({row.get('failed')})")


def report_versions(report: dict[str, Any]) -> str:
    """The peers and their versions."""
    found = {name: version for row in report["rows"] for name, version in row.get("versions", {}).items()}
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))


def write_page(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Replace the block between the two marks."""
    text, report = page.read_text(encoding="utf-8"), json.loads(results.read_text(encoding="utf-8"))
    write_text(page, BLOCK.sub(lambda found: found[1] + wrapped(block(report)) + found[2], text))


if __name__ == "__main__":
    write_page()
