# SPDX-License-Identifier: Apache-2.0
"""Race whole systems with other projects': ``python -m benchmarks.peers [--rows PATTERN] [--pairs 9]``.

Steps, solves, readers and features on equal inputs, by CPU time on one thread, in one process per peer: the median of
nine pairs in alternating order. The peers' packages (benchmarks/peers/requirements.txt) are installed into build/peers
on first use, half a gigabyte; one that is not installable here is told, and its rows say so. Writes
benchmarks/results/peers.json after each peer, and the table of docs/performance.md. Fails where a gate is missed or a
race broke. Under ten minutes on an idle core.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers.environment import ROOT, Environment
from benchmarks.peers.rows import Row, all_rows

RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
PAIRS = 9

Found = dict[str, Any]


def measure(rows: Sequence[Row], environment: Environment, pairs: int) -> list[Found]:
    """Race rows of one peer in a process of their own; rows that could not be raced say why."""
    (packages,) = {tuple(row.packages) for row in rows}
    reason = rows[0].absent or environment.missing(packages)
    if reason:
        return [described(row, {"absent": reason}) for row in rows]
    names = [row.name for row in rows]
    done = environment.run(["-W", "ignore", "-m", "benchmarks.peers.race", "--pairs", str(pairs), *names])
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    found = {line.pop("name"): line for line in lines}
    last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
    broken = {"failed": f"the process ended with {done.returncode}: {last}"}
    return [described(row, found.get(row.name, broken)) for row in rows]


def described(row: Row, found: Found) -> Found:
    """What the result says of a row."""
    ratio = found.get("ratio")
    met = None if row.gate is None or ratio is None else ratio <= row.gate
    return {"name": row.name, "group": row.group, "peer": row.peer, "gate": row.gate, "ok": met, **found}


def problems(rows: Sequence[Found]) -> list[str]:
    """Gates that are missed and races that broke; a peer that is not installable is none of ours."""
    missed = [f"gate missed: {row['name']}: {row['ratio']} > {row['gate']}" for row in rows if row["ok"] is False]
    return missed + [f"race broke: {row['name']}: {row['failed']}" for row in rows if "failed" in row]


def merged(path: Path, new: Sequence[Found], wanted: Sequence[Row]) -> list[Found]:
    """The rows of a result in the order of the list: what was raced now, else what an earlier result says."""
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    known = {row["name"]: row for row in [*earlier, *new]}
    return [known[row.name] for row in wanted if row.name in known]


def show(rows: Sequence[Found]) -> None:
    """Print the rows as a table."""
    table = Table("ours / theirs", "ratio", "min-max", "gate", "our ms", "limit ms")
    for row in rows:
        if "ratio" not in row:
            table.add_row(row["name"], row.get("absent") or row["failed"], *[""] * 4, style="yellow")
            continue
        gate = "" if row["gate"] is None else f"{row['gate']:.2f}{'' if row['ok'] else ' MISSED'}"
        limit = f"{row['limit_ms']:.1f}" if "limit_ms" in row else ""
        spread = "-".join(f"{value:.2f}" for value in row["spread"])
        table.add_row(row["name"], f"{row['ratio']:.2f}", spread, gate, f"{row['our_ms']:.1f}", limit)
    Console(width=max(120, Console().width)).print(table)


def about() -> Found:
    """The machine and what of ours the numbers depend on."""
    from benchmarks.core import machine
    from moeapps.evidence.cells import describe_machine

    return {**machine(), "machine": describe_machine(), "threads": 1}


def main(args: list[str] | None = None) -> int:
    """Race, print, write; 1 when a gate is missed or a race broke."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where to write the rows")
    parser.add_argument("--rows", default="*", metavar="PATTERN", help="only rows whose name matches, e.g. '*pandas*'")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"alternated pairs (default {PAIRS})")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    options = parser.parse_args(args)
    listed = all_rows()
    if options.list:
        print("\n".join(row.name for row in listed))
        return 0
    rows = [row for row in listed if fnmatch.fnmatchcase(row.name, options.rows)]
    if not rows:
        parser.error(f"no row matches {options.rows!r}; --list prints their names")
    environment, raced = Environment(), list[Found]()
    for _, members in groupby(sorted(rows, key=process), key=process):
        chosen = list(members)
        print(f"{len(raced)} of {len(rows)} rows done; {chosen[0].peer} ...", file=sys.stderr, flush=True)
        raced += measure(chosen, environment, options.pairs)
        command = "python -m benchmarks.peers"
        report = {"command": command, "pairs": options.pairs, "machine": about()}
        write(options.json, report | {"rows": merged(options.json, raced, listed)})
    show(raced)
    if options.json == RESULTS:
        from benchmarks.peers.page import write_page

        write_page()
    for problem in problems(raced):
        print(problem, file=sys.stderr)
    return 1 if problems(raced) else 0


def process(row: Row) -> tuple[str, str, str]:
    """Rows that share this run in one process."""
    return row.absent, row.peer, row.group


def write(path: Path, report: Found) -> None:
    """Write a report, whole or not at all."""
    from moeapps.files import write_json

    write_json(path, report)


if __name__ == "__main__":
    raise SystemExit(main())
