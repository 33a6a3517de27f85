# SPDX-License-Identifier: Apache-2.0
"""What a fit spends outside of its steps: ``python -m benchmarks.fit_share [--before FOLDER]``.

CPU seconds of processes of their own, one thread. *Start*: of each system with its tiny settings, until the first
training step begins. *Fits*: of configs/mixer.yaml and configs/home.yaml from begin to end, by part. With
``--before``, a checkout of another commit is measured too, by turns with this one; ratios are medians of pairs. Writes
benchmarks/results/fit_share.json after each system; ``--only`` measures some anew and keeps the others. About twelve
minutes on an idle core, with ``--before`` twenty-five; ``--only home mixer --fits 0`` about two and five.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moeapps.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fit_share.json"
GOALS = {"start_s": 4.0, "share": 0.75}
"""CPU seconds until the first step, and share of a fit's that its steps and the fits of its gate take; at least."""
FITTED = ("home", "mixer")
PARTS = ("imports", "setup", "steps", "gate fits", "loader", "logging", "callbacks", "loop", "checkpoint", "validation",
         "test", "reports", "end")  # fmt: skip
"""`setup` is until the loop begins; `loop` what Lightning's loop and hooks take; `end` is after the last report."""


def systems() -> list[str]:
    """Every system that has a config."""
    return sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def words_of(system: str, *, tiny: bool) -> list[str]:
    """The command that fits a system."""
    files = [f"configs/{system}.yaml"]
    if tiny:
        files += ["configs/debug/tiny.yaml"]
        files += [f"configs/debug/{system}.yaml"] if (ROOT / "configs" / "debug" / f"{system}.yaml").exists() else []
    return ["fit", *(word for file in files for word in ("--config", file))]


def measure(tree: Path, words: list[str], *, first_only: bool = False) -> dict[str, Any]:
    """Run a command with the code of a checkout; return CPU seconds by part, and of the whole process.

    Raises:
        RuntimeError: it failed; its last lines are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "parts.json"
        variables = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(tree), "MOEAPPS_RUNS": folder}
        command = [sys.executable, "-P", str(ROOT / "benchmarks" / "fit_phases.py"), str(out)]
        command += ["--first-step"] if first_only else []
        with (Path(folder) / "said.txt").open("w+b") as said:
            process = subprocess.Popen(
                [*command, *words], cwd=tree, env={**os.environ, **variables}, stdout=said, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode or not out.exists():
                said.seek(0)
                raise RuntimeError(f"{' '.join(words)} failed:\n{said.read().decode(errors='replace')[-2000:]}")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return {**found, "process": usage.ru_utime + usage.ru_stime}


def start_of(system: str, before: Path | None, pairs: int) -> dict[str, Any]:
    """CPU seconds until the first step, medians; beside those of the checkout before."""
    now, then, ratios = [], [], []
    for pair in range(pairs):
        trees = [ROOT] if before is None else [ROOT, before] if pair % 2 else [before, ROOT]
        seconds = {tree: measure(tree, words_of(system, tiny=True), first_only=True)["start"] for tree in trees}
        now.append(seconds[ROOT])
        if before is not None:
            then.append(seconds[before])
            ratios.append(seconds[ROOT] / seconds[before])
    row: dict[str, Any] = {"start_s": round(statistics.median(now), 2), "least_s": round(min(now), 2), "pairs": pairs}
    row["goal"], row["ok"] = GOALS["start_s"], row["start_s"] <= GOALS["start_s"]
    if before is not None:
        row |= {"before_s": round(statistics.median(then), 2), "over_before": round(statistics.median(ratios), 3)}
    return row


def fit_of(system: str, tree: Path) -> dict[str, Any]:
    """CPU seconds of a whole fit by part, and the share of its training."""
    found = measure(tree, words_of(system, tiny=False))
    parts = {part: round(found["parts"].get(part, 0.0), 2) for part in PARTS}
    parts["end"] = round(found["process"] - sum(value for part, value in parts.items() if part != "end"), 2)
    training = parts["steps"] + parts["gate fits"]
    return {
        "total_s": round(found["process"], 2),
        "steps": found["steps"],
        "share": round(training / found["process"], 4),
        "parts_s": parts,
    }


def middle_fit(system: str, tree: Path, count: int) -> dict[str, Any]:
    """Of several fits the one whose share is the median."""
    fits = sorted((fit_of(system, tree) for _ in range(count)), key=lambda fit: float(fit["share"]))
    return {**fits[(count - 1) // 2], "fits": count}


def show(report: dict[str, Any]) -> None:
    """Print both tables."""
    console = Console(highlight=False)
    table = Table("system", "CPU s to the first step", "before", "ratio")
    for system, row in report["starts"].items():
        table.add_row(system, *(str(row.get(key, "")) for key in ("start_s", "before_s", "over_before")))
    console.print(table)
    table = Table("fit", "share of training", "CPU s", *PARTS)
    for system, fits in report["fits"].items():
        for when, fit in fits.items():
            seconds = [f"{fit['parts_s'][part]:.1f}" for part in PARTS]
            table.add_row(f"{system}, {when}", f"{fit['share']:.0%}", f"{fit['total_s']:.1f}", *seconds)
    console.print(table)


def main(args: list[str] | None = None) -> int:
    """Measure, print, write; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fit_share", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where to write the report")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="checkout of the commit to compare with")
    parser.add_argument("--pairs", type=int, default=9, help="starts of home and mixer; a third of others (default 9)")
    parser.add_argument("--fits", type=int, default=1, help="whole fits of home and mixer (default 1; 0: none)")
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help="measure these, keep what is known of the others")
    options = parser.parse_args(args)
    from benchmarks.core import machine

    before = None if options.before is None else options.before.resolve()
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.only and options.json.exists() else {}
    report = {
        "command": "python -m benchmarks.fit_share" + ("" if before is None else " --before FOLDER"),
        "before": None if before is None else commit_of(before),
        "machine": machine(),
        "threads": 1,
        "goals": GOALS,
        "starts": known.get("starts", {}),
        "fits": known.get("fits", {}),
    }
    for system in options.only or systems():
        pairs = options.pairs if system in FITTED else max(1, options.pairs // 3)
        report["starts"][system] = start_of(system, before, pairs)
        write_json(options.json, report)
    for system in [system for system in FITTED if options.fits and system in (options.only or FITTED)]:
        trees = {"now": ROOT} if before is None else {"before": before, "now": ROOT}
        report["fits"][system] = {when: middle_fit(system, tree, options.fits) for when, tree in trees.items()}
        write_json(options.json, report)
    show(report)
    shares = [fits["now"]["share"] >= GOALS["share"] for fits in report["fits"].values()]
    return 0 if all(row["ok"] for row in report["starts"].values()) and all(shares) else 1


def commit_of(tree: Path) -> str:
    """The commit of a checkout."""
    done = subprocess.run(["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], check=True, capture_output=True)
    return done.stdout.decode().strip()


if __name__ == "__main__":
    raise SystemExit(main())
