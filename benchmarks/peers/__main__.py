# SPDX-License-Identifier: Apache-2.0
"""Race whole systems with other projects': ``python -m benchmarks.peers [--rows PATTERN] [--before FOLDER]``.

Steps, solves, readers and features on equal inputs, by CPU time on one thread, in one process per peer: the median of
nine pairs in alternating order. The peers' packages (benchmarks/peers/requirements.txt) are installed into build/peers
on first use, half a gigabyte; one that is not installable here is told, and its rows say so. Writes
benchmarks/results/peers.json after each peer, and the table of docs/performance.md. With ``--before``, a checkout of
an earlier commit races with the same peers, each right after ours. Fails where a gate is missed, a race broke or a row
costs over 1.1 times what it did before. Four minutes on an idle core, with ``--before`` seven.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machines import known_here, with_elsewhere
from benchmarks.peers.environment import ROOT, Environment, tree_with_race
from benchmarks.peers.rows import Row, all_rows
from benchmarks.timed import commit_of

RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
PAIRS = 9
WORSE = 1.1
"""Most that a row may cost of what it did before; both beside the same peer."""

Found = dict[str, Any]


def measure(rows: Sequence[Row], environment: Environment, pairs: int) -> list[Found]:
    """Race rows of one peer in a process of their own; rows that could not be raced say why."""
    (packages,) = {tuple(row.packages) for row in rows}
    reason = rows[0].absent or environment.missing(packages)
    if reason:
        return [described(row, {"absent": reason}) for row in rows]
    found = raced(rows, environment, ["--pairs", str(pairs)])
    return [described(row, found[row.name]) for row in rows]


def raced(rows: Sequence[Row], environment: Environment, options: Sequence[str], root: Path = ROOT) -> dict[str, Found]:
    """Run the race of some rows with the code of a tree; name -> what it found, or how it failed."""
    names = [row.name for row in rows]
    done = environment.run(["-W", "ignore", "-m", "benchmarks.peers.race", *options, *names], root=root)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
    broken = {"failed": f"the process ended with {done.returncode}: {last}"}
    return dict.fromkeys(names, broken) | {line.pop("name"): line for line in lines}


def with_before(rows: Sequence[Row], now: list[Found], environment: Environment, pairs: int, tree: Path) -> list[Found]:
    """Add what the code of an earlier commit costs over the same peers, or why it could not be raced."""
    if not any("ratio" in row for row in now):
        return now
    words = ["--ratios", "--pairs", str(pairs)]
    then = raced(rows, environment, words, tree)
    both = []
    for row in now:
        old = then[row["name"]] if "ratio" in row else {}
        if "ratio" in old:
            row = {**row, "before": old["ratio"], "before_spread": old["spread"]}
            row["over_before"] = round(row["ratio"] / old["ratio"], 3)
        elif old:
            row = {**row, "not_before": old["failed"]}
        if row.get("over_before", 0) > WORSE:
            (one,) = [each for each in rows if each.name == row["name"]]
            row["over_before"] = over_again(one, row["over_before"], environment, words, tree)
        both.append(row)
    return both


def over_again(row: Row, first: float, environment: Environment, words: Sequence[str], tree: Path) -> float:
    """The middle of three comparisons of a row with before: processes differ by more than their pairs do."""
    found = [first]
    for _ in range(2):
        old, new = (raced([row], environment, words, root)[row.name].get("ratio") for root in (tree, ROOT))
        found.append(new / old if old and new else first)
    return round(statistics.median(found), 3)


def described(row: Row, found: Found) -> Found:
    """What the result says of a row."""
    ratio = found.get("ratio")
    met = None if row.gate is None or ratio is None else ratio <= row.gate
    return {"name": row.name, "group": row.group, "peer": row.peer, "gate": row.gate, "ok": met, **found}


def problems(rows: Sequence[Found]) -> list[str]:
    """Gates that are missed and races that broke; a peer that is not installable is none of ours."""
    missed = [f"gate missed: {row['name']}: {row['ratio']} > {row['gate']}" for row in rows if row["ok"] is False]
    worse = [
        f"worse than before: {row['name']}: {row['over_before']} > {WORSE}"
        for row in rows
        if row.get("over_before", 0) > WORSE
    ]
    return missed + worse + [f"race broke: {row['name']}: {row['failed']}" for row in rows if "failed" in row]


def merged(path: Path, new: Sequence[Found], wanted: Sequence[Row], report: Found) -> list[Found]:
    """The rows in the order of the list: what was raced now, else what an earlier result of such a processor says."""
    earlier = known_here(report, path).get("rows", [])
    known = {row["name"]: row for row in [*earlier, *new]}
    return [known[row.name] for row in wanted if row.name in known]


def show(rows: Sequence[Found]) -> None:
    """Print the rows as a table."""
    table = Table("ours / theirs", "ratio", "min-max", "before", "gate", "our ms", "limit ms")
    for row in rows:
        if "ratio" not in row:
            table.add_row(row["name"], row.get("absent") or row["failed"], *[""] * 5, style="yellow")
            continue
        gate = "" if row["gate"] is None else f"{row['gate']:.2f}{'' if row['ok'] else ' MISSED'}"
        limit = f"{row['limit_ms']:.1f}" if "limit_ms" in row else ""
        spread = "-".join(f"{value:.2f}" for value in row["spread"])
        before = f"{row['before']:.2f}" if "before" in row else ""
        table.add_row(row["name"], f"{row['ratio']:.2f}", spread, before, gate, f"{row['our_ms']:.1f}", limit)
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
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="checkout of an earlier commit, raced as well")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    options = parser.parse_args(args)
    listed = all_rows()
    if options.list:
        print("\n".join(row.name for row in listed))
        return 0
    rows = [row for row in listed if fnmatch.fnmatchcase(row.name, options.rows)]
    if not rows:
        parser.error(f"no row matches {options.rows!r}; --list prints their names")
    with tempfile.TemporaryDirectory() as folder:
        tree = None if options.before is None else tree_with_race(options.before.resolve(), Path(folder) / "tree")
        done = race_all(rows, listed, tree, options)
    show(done)
    if options.json == RESULTS:
        from benchmarks.peers.page import write_page

        write_page()
    for problem in problems(done):
        print(problem, file=sys.stderr)
    return 1 if problems(done) else 0


def race_all(rows: Sequence[Row], listed: Sequence[Row], tree: Path | None, options: argparse.Namespace) -> list[Found]:
    """Race peer by peer, with the tree of before where there is one, and write after each."""
    environment, done = Environment(), list[Found]()
    for _, members in groupby(sorted(rows, key=process), key=process):
        chosen = list(members)
        print(f"{len(done)} of {len(rows)} rows done; {chosen[0].peer} ...", file=sys.stderr, flush=True)
        now = measure(chosen, environment, options.pairs)
        done += now if tree is None else with_before(chosen, now, environment, options.pairs, tree)
        command = "python -m benchmarks.peers" + ("" if tree is None else " --before FOLDER")
        report: Found = {"command": command, "pairs": options.pairs, "machine": about()}
        if tree is not None:
            report["before"] = commit_of(options.before)
        report["rows"] = merged(options.json, done, listed, report)
        write(options.json, with_elsewhere(report, options.json))
    return done


def process(row: Row) -> tuple[str, str, str]:
    """Rows that share this run in one process."""
    return row.absent, row.peer, row.group


def write(path: Path, report: Found) -> None:
    """Write a report, whole or not at all."""
    from moeapps.files import write_json

    write_json(path, report)


if __name__ == "__main__":
    raise SystemExit(main())
