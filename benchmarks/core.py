# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of the core: ``python -m benchmarks.core --json FILE [--peers] [--rows PATTERN] [--quick]``.

Each row is the time (or the bytes kept for backward) of an expert layer under a given routing, sorting included, over
that of one dense network of the same active FLOPs in the same process: median of nine pairs in alternating order,
one thread, CPU time. `benchmarks/core_rows.py` lists the rows with their gates; a row that is not there fails as a
missed gate does. For a missed gate every other way is tried as well, and the bare matrix products are timed: what they
cost over the dense network, no dispatch can undercut.

``--peers`` measures our layer beside those of other projects, in an environment of their own that is made on first use
(0.3 GB in build/peers). Without it their rows are kept from the file that is there. About 45 minutes on an idle
core, peers 25 more; ``--quick`` takes one expert kind, ``auto`` alone and five pairs: about two minutes.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.core_cases import (
    EXPERT_KINDS,
    Mode,
    dense_step,
    make_bank,
    median_ms,
    padded_step,
    paired_ratios,
    products_step,
)
from benchmarks.core_peers import measure_peers
from benchmarks.core_rows import BACKENDS, SAVED_GATES, Row, all_rows, peer_rows, regime_rows, special_rows
from moeapps.files import write_json
from moeapps.moe.backends.table import capability

RESULTS = Path(__file__).parent / "results" / "core.json"
PAIRS, QUICK_PAIRS = 9, 5
MIN_TRIES = 3


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": capability(),
        "processor": platform.processor() or platform.machine(),
        "huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def explain(row: Row, pairs: int) -> None:
    """Try every other way to compute a missed row, and say how much of it is the bare matrix products."""
    if row.measure is None or row.mode == "saved":
        return
    for backend in BACKENDS[1:]:
        try_row(row, backend, row.measure(pairs, backend))
    if row.unit == "x dense" and row.expert in EXPERT_KINDS:
        dtype: torch.dtype = getattr(torch, row.dtype)
        mode: Mode = "forward" if row.mode == "forward" else "fwd+bwd"
        dense = dense_step(row.size, row.expert, mode, dtype=dtype)
        if dtype == torch.float32 and row.threads == 1:
            try_row(row, "padded", paired_ratios(padded_step(row.size, row.expert, mode), dense, pairs=pairs))
        bare = products_step(row.size, row.expert, mode, dtype)
        torch.set_num_threads(row.threads)
        ratio = statistics.median(paired_ratios(bare, dense, pairs=pairs, threads=row.threads))
        torch.set_num_threads(1)
        with torch.device("meta"):
            weights = sum(p.numel() for p in make_bank(row.size, row.expert).parameters()) * dtype.itemsize
        row.reason = (
            f"products of {row.size.rows_per_expert} rows alone, without dispatch, activation or combination, take "
            f"{ratio:.2f} x the dense network; the bank's weights are {weights / 2**20:.0f} MiB, read once forward and "
            "once backward, and gradients as large are written"
        )
    elif row.unit == "ms":
        bare_ms = median_ms(products_step(row.size, row.expert, "forward"), samples=50)
        row.reason = f"the products of the chosen experts alone take {bare_ms:.2f} ms; the rest is calls of Python"


def try_row(row: Row, name: str, values: list[float]) -> None:
    """Note another way that was tried."""
    row.tried.append({"way": name, "ratio": round(statistics.median(values), 4)})


def complaints(report: dict[str, Any]) -> list[str]:
    """What a complete result lacks: rows, values, tries for a missed gate, the machine, the command."""
    found = [f"{key} is missing" for key in ("machine", "command") if not report.get(key)]
    rows = {row["name"]: row for row in report["rows"]}
    for wanted in all_rows():
        row = rows.get(wanted.name)
        if row is None or (row["ratio"] is None and not row["note"].startswith("n/a")):
            found.append(f"row is missing: {wanted.name}")
        elif row["gate"] not in gates_of(wanted) or (row["stretch"], row["gated"]) != (wanted.stretch, wanted.gated):
            found.append(f"gate is not that of the list: {wanted.name}")
        elif row["gated"] and row["ok"] is False and (len(row["tried"]) < MIN_TRIES or not row["reason"]):
            found.append(f"missed without {MIN_TRIES} tries and a reason: {wanted.name}")
    return found


def gates_of(row: Row) -> set[float | None]:
    """Gates that a row may have: what ``auto`` keeps for backward depends on the backend that it takes on a machine."""
    return set(SAVED_GATES.values()) if row.mode == "saved" and row.backend == "auto" else {row.gate}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many gates hold, how much of the stretch column is reached, and how we stand to the fastest peers."""
    gated = [row for row in rows if row["gated"] and row["ok"] is not None]
    stretch = [row for row in rows if row["gated"] and row["stretch"] is not None and row["ratio"] is not None]
    peers: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["unit"] == "x peer" and row["ratio"] is not None:
            key = (row["regime"].split(" / ")[0], row["mode"])
            peers[key] = max(peers.get(key, 0.0), row["ratio"])
    return {
        "gates": f"{sum(row['ok'] for row in gated)} of {len(gated)}",
        "stretch": f"{sum(row['ratio'] <= row['stretch'] for row in stretch)} of {len(stretch)}",
        "at_most_1.03_of_the_fastest_peer": f"{sum(v <= 1.03 for v in peers.values())} of {len(peers)}",
        "at_least_5_per_cent_faster_than_it": f"{sum(v <= 0.95 for v in peers.values())} of {len(peers)}",
    }


def show(rows: list[Row]) -> None:
    """Print the rows as a table."""
    table = Table("regime", "mode", "backend", "experts", "ratio", "min-max", "gate", "stretch", "result")
    words = {None: "", True: "ok", False: "missed"}
    for row in rows:
        result = words[row.ok] if row.gated or row.ok is not False else "missed (not gated)"
        spread = "" if row.spread is None else f"{row.spread[0]:.2f}-{row.spread[1]:.2f}"
        ratio = row.note or "missing" if row.ratio is None else f"{row.ratio:.2f} {row.unit}"
        gate, stretch = ("" if bound is None else f"{bound:.2f}" for bound in (row.gate, row.stretch))
        table.add_row(row.regime, row.mode, row.backend, row.expert, ratio, spread, gate, stretch, result)
    Console(width=max(120, Console().width)).print(table)


def keep_earlier(rows: list[Row], path: Path | None) -> None:
    """Give rows of peers that were not measured now what an earlier result says of them."""
    if path is None or not path.exists():
        return
    earlier = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    for row in rows:
        known = earlier.get(row.name)
        if row.ratio is None and row.unit == "x peer" and known is not None and known["ratio"] is not None:
            row.ratio, row.spread, row.note = known["ratio"], tuple(known["spread"]), known["note"]
            row.tried, row.reason = known["tried"], known["reason"]


def chosen_rows(quick: bool, pattern: str) -> list[Row]:
    """The rows to measure."""
    rows = [*regime_rows(quick=True), *special_rows()] if quick else all_rows()
    return [row for row in rows if fnmatch.fnmatchcase(row.name, f"*{pattern.strip('*')}*")]


def main(args: list[str] | None = None) -> int:
    """Measure, print, write the JSON file; 1 when a gate is missed or a row of the list is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--rows", default="*", help="only rows whose name matches, e.g. '*R=128*auto*'")
    parser.add_argument("--quick", action="store_true", help="one expert kind, auto only, fewest pairs")
    parser.add_argument("--peers", action="store_true", help="measure other projects too, in their own environment")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    rows = chosen_rows(options.quick, options.rows)
    if not rows:
        parser.error(f"no row matches {options.rows!r}")
    pairs = QUICK_PAIRS if options.quick else PAIRS
    with Progress(transient=True) as progress:
        for row in progress.track(rows, description="core"):
            row.run(pairs)
            if row.gated and row.ok is False and not options.quick:
                explain(row, pairs)
    if options.peers:
        names = {row.name for row in peer_rows()}
        found = measure_peers([row.name for row in rows if row.name in names], pairs)
        for row in rows:
            if row.name in found:
                row.take(found[row.name]["values"])
                row.tried, row.reason = found[row.name]["tried"], found[row.name]["reason"]
    else:
        keep_earlier(rows, options.json)
    show(rows)
    report = {
        "command": "make bench PEERS=1"
        if options.rows == "*"
        else f"python -m benchmarks.core --rows {options.rows!r}",
        "quick": options.quick,
        "machine": machine(),
        "rows": [row.as_json() for row in rows],
    }
    report["summary"] = summary(report["rows"])
    for key, value in report["summary"].items():
        print(f"{key.replace('_', ' ')}: {value}")
    problems = [] if options.quick or options.rows != "*" else complaints(report)
    problems += [f"gate missed: {r.name}: {r.ratio} > {r.gate}" for r in rows if r.gated and r.ok is False]
    if options.json:
        write_json(options.json, report)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
