# SPDX-License-Identifier: Apache-2.0
"""Write the goals of speed and what became of them into docs/performance.md: ``python -m benchmarks.goals``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import few_rows, fit_share, point_moe_voxels, recommendation_speed
from benchmarks.machines import kind_of
from benchmarks.markdown import wrapped
from benchmarks.peers import page as peers
from benchmarks.readme import ROOT
from moeapps.files import write_text

PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- goals:begin -->\n).*?(<!-- goals:end -->)", re.DOTALL)
LIMIT = "The limit: "

Row = Mapping[str, Any]


class Goal(NamedTuple):
    """A goal and what became of it.

    Attributes:
        name: what is measured.
        value: what was reached.
        goal: what was to be reached.
        row: ``ok``; ``at_least``, whether larger is better; of a missed goal ``tried``, way -> the same measure with
            that way, and ``limit``, either what -> value or a sentence.
        unit: of value, goal and ways; nothing for a ratio.
    """

    name: str
    value: float
    goal: float
    row: Row
    unit: str = ""


def told(goal: Goal, elsewhere: Mapping[str, Goal] | None = None) -> str:
    """One line: the goal, what was reached and, where it was missed, what was tried and how far one could come.

    Args:
        goal: measured on one kind of processor.
        elsewhere: instruction set -> the same on others.
    """
    others = [
        f" On {kind}: {other.value:.3g}{other.unit}{', reached' if other.row['ok'] else ', missed'}."
        for kind, other in (elsewhere or {}).items()
    ]
    return _told_here(*goal) + "".join(others)


def _told_here(name: str, value: float, goal: float, row: Row, unit: str) -> str:
    line = f"- {name}: **{value:.3g}{unit}**, goal {'at least' if row.get('at_least') else 'at most'} {goal:g}{unit}"
    if row["ok"]:
        return line + ", reached."
    tried, limit = row.get("tried") or {}, row.get("limit") or row.get("reason") or ""
    if not isinstance(tried, dict):
        tried = {way["way"]: way["ratio"] for way in tried}
    if isinstance(limit, dict):
        limit = ", ".join(f"{what} {of:.3g}{unit}" for what, of in limit.items())
    line += ", missed."
    if tried:
        line += " Tried: " + ", ".join(f"{way} {of:.3g}{unit}" for way, of in tried.items()) + "."
    return f"{line} {LIMIT}{limit}." if limit else line


def of_voxels(report: Row) -> Iterator[Goal]:
    """Point-MoE's step: growth, time over the step before, memory."""
    goals, ok = report["goals"], report["ok"]
    name = "CPU time per voxel of a step, 150,000 voxels over 15,000"
    yield Goal(name, report["growth"]["ours"], goals["growth"], {"ok": ok["growth"]})
    for row in report["sizes"].values():
        size, ways, limit = f"{row['voxels']:,} voxels", row["other_ways"], row["limit"]
        told_over = {
            "ok": row["over"] <= goals["over_before"],
            "tried": {name: row["over"] * way["step"] for name, way in ways.items()}
            | {"glibc's own thresholds": row["over"] / row["allocator"]},
            "limit": {"its products alone, at this machine's full speed": limit["products_over_before"]},
        }
        yield Goal(f"a step over the step before, {size}", row["over"], goals["over_before"], told_over)
    for row in report["sizes"].values():
        size, ways, limit, kept = f"{row['voxels']:,} voxels", row["other_ways"], row["limit"], 1e-3
        mine = kept * row["ours"]["bytes_per_voxel"]
        memory = {
            "ok": row["ours"]["bytes_per_voxel"] <= goals["bytes_per_voxel"],
            "tried": {name: mine * way["memory"] for name, way in ways.items()}
            | {"the step before": kept * row["theirs"]["bytes_per_voxel"]},
            "limit": {"what is kept for the backward pass": kept * limit["kept_bytes_per_voxel"]},
        }
        goal = kept * goals["bytes_per_voxel"]
        yield Goal(f"memory of a step per voxel, {size}", mine, goal, memory, " kB")


def of_logs(report: Row) -> Iterator[Goal]:
    """Readers of logs over a plain loop of pyarrow."""
    for row in report["rows"]:
        if row.get("gate") is not None and row["group"] == "reading" and "ratio" in row:
            yield Goal(row["name"], row["ratio"], row["gate"], row)


def of_fits(report: Row) -> Iterator[Goal]:
    """Start of every system, and the share of training of two fits."""
    for system, row in sorted(report["starts"].items()):
        yield Goal(f"{system}, CPU until the first step", row["start_s"], row["goal"], row, " s")
    for system, fits in report["fits"].items():
        fit = fits["now"]
        share = {"ok": fit["share"] >= report["goals"]["share"], "at_least": True}
        share["tried"] = {way: 100 * found for way, found in fit.get("tried", {}).items()}
        share["limit"] = {"the bound in the table above": 100 * fit["bound"]}
        name = f"{system}, share of a fit that is training"
        yield Goal(name, 100 * fit["share"], 100 * report["goals"]["share"], share, " %")


def of_ranking(report: Row) -> Iterator[Goal]:
    """HoME beside MMoE and beside its arithmetic."""
    for row in report["rows"]:
        if row["gate"] is not None:
            yield Goal(row["text"], row["value"], row["gate"], row)


def kept(report: Row) -> str:
    """What has no goal: HoME beside MMoE as trainings run."""
    told = [f"{row['value']:.3g} at {row['name'].split()[1]} rows" for row in report["rows"] if "kept" in row["name"]]
    return (
        "- HoME's step / MMoE's where memory is kept from step to step, as the training commands do, which MMoE gains "
        f"more by: {', '.join(told)}."
    )


def of_layers(report: Row) -> Iterator[Goal]:
    """Layers of few rows, and what ``auto`` chooses."""
    one = report["one_row"]
    if "python_left" in one:
        name = "what a call on one row costs above a plain module, over before"
        yield Goal(name, one["python_left"], one["gate"], one)
    for row in (*report["rows"], *report["auto"]):
        if row["gate"] is not None and row["ratio"] is not None:
            ways = {name: row["ratio"] / over for name, over in row.get("auto_over", {}).items()}
            known = {"tried": ways, "limit": {"the best of them": 1.0}} if ways else {}
            yield Goal(layer_name(row), row["ratio"], row["gate"], {**known, **row})


def layer_name(row: Row) -> str:
    """A row of the core's benchmark, or of `few_rows`, in words."""
    mode = {"fwd+bwd": "forward and backward"}.get(row["mode"], row["mode"])
    if "n" not in row:
        return f"`auto` over the best backend, {row['name']}, {mode}"
    each = row["n"] * row["k"] // row["e"]
    return f"{each} rows for each of {row['e']} experts, {row['dtype']}, {mode}, over a dense network of equal FLOPs"


GROUPS = (
    ("Point-MoE", "point_moe_voxels --before FOLDER", point_moe_voxels.RESULTS, of_voxels),
    ("Logs, over a plain loop of pyarrow", "peers", peers.RESULTS, of_logs),
    ("Start, and fits outside of their steps", "fit_share --before FOLDER", fit_share.RESULTS, of_fits),
    ("HoME", "recommendation_speed", recommendation_speed.RESULTS, of_ranking),
    ("Layers of few rows", "few_rows --before FOLDER", few_rows.RESULTS, of_layers),
)


def elsewhere(report: Row) -> Mapping[str, Row]:
    """Instruction set -> the report of another kind of processor."""
    found: Mapping[str, Row] = report.get("elsewhere", {})
    return found


def text() -> str:
    """The block of the page, from the committed results that there are."""
    lines = [""]
    for heading, command, results, of in GROUPS:
        if results.is_file():
            report = json.loads(results.read_text(encoding="utf-8"))
            file = f"../{Path(results).relative_to(ROOT).as_posix()}"
            before, run = "", command.removesuffix(" --before FOLDER")
            if run != command and report.get("before"):
                before, run = f"; FOLDER is a checkout of {report['before']}", command
            on = f" on {kind_of(report)}" if kind_of(report) else ""
            lines += [f"### {heading}", "", f"`python -m benchmarks.{run}` ([results]({file})){on}{before}.", ""]
            others = {kind: {goal.name: goal for goal in of(other)} for kind, other in elsewhere(report).items()}
            for goal in of(report):
                same = {kind: known[goal.name] for kind, known in others.items() if goal.name in known}
                lines.append(told(goal, same))
            lines += [*([kept(report)] if of is of_ranking else []), ""]
    return wrapped("\n".join(lines) + "\n")


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, BLOCK.sub(lambda found: found[1] + text() + found[2], page))
