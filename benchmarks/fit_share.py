# SPDX-License-Identifier: Apache-2.0
"""What a fit spends outside of its steps: ``python -m benchmarks.fit_share [--before FOLDER]``.

CPU seconds of processes of their own, one thread. *Start*: of each system with its tiny settings, until the first
training step begins. *Fits*: of configs/mixer.yaml and configs/home.yaml from begin to end, by part. With
``--before``, another checkout's starts and fits of these two are measured too, by turns; ratios are medians. Writes
benchmarks/results/fit_share.json after each system; ``--only`` measures some anew and keeps the others. About half an
hour on an idle core, with ``--before`` fifty minutes; ``--only home mixer --fits 0`` about two and five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.machines import known_here, with_elsewhere
from benchmarks.markdown import wrapped
from benchmarks.timed import commit_of
from moeapps.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fit_share.json"
GOALS = {"start_s": 4.0, "share": 0.75}
"""CPU seconds until the first step, and share of a fit's that its steps and the fits of its gate take; at least."""
FITTED = ("home", "mixer")
PARTS = ("imports", "setup", "steps", "gate fits", "loader", "logging", "callbacks", "loop", "checkpoint", "validation",
         "test", "reports", "end")  # fmt: skip
"""`setup` goes until the loop begins; `loop` is what Lightning's loop and hooks take; `end` is all that is left."""
OTHER_STARTS: dict[str, dict[str, Any]] = {
    "all packages imported at once": {"without": "start_quickly"},
    "Python's search for cycles left on": {"without": "without_collector"},
    "python -O": {"flags": ("-O",)},
}
"""Other ways to start: a function of `moeapps.commands.later` that does nothing, or flags of the interpreter."""
OTHER_FITS = {
    "no figures": ("--pictures", "false"),
    "scalars every hundredth step": ("--trainer.log_every_n_steps", "100"),
    "no progress bar": ("--trainer.enable_progress_bar", "false"),
}
"""Other ways to fit: words of the command."""


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


def measure(
    tree: Path, words: list[str], *, first_only: bool = False, without: str = "", flags: Sequence[str] = ()
) -> dict[str, Any]:
    """Run a command with the code of a checkout; return CPU seconds by part, and of the whole process.

    Args:
        tree: the checkout.
        words: of the command.
        first_only: end with the first training step.
        without: a function of `moeapps.commands.later` that does nothing.
        flags: of the interpreter.

    Raises:
        RuntimeError: it failed; its last lines are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "parts.json"
        variables = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(tree), "MOEAPPS_RUNS": folder}
        command = [sys.executable, *flags, "-P", str(ROOT / "benchmarks" / "fit_phases.py"), str(out)]
        command += ["--first-step"] if first_only else []
        command += ["--without", without] if without else []
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
    if not row["ok"]:
        row["tried"] = {name: round(started(system, **way), 2) for name, way in OTHER_STARTS.items()}
        row["limit"] = {"importing torch, Lightning and the model's module alone": round(imported(system), 2)}
    if before is not None:
        row |= {"before_s": round(statistics.median(then), 2), "over_before": round(statistics.median(ratios), 3)}
    return row


def started(system: str, **way: Any) -> float:
    """CPU seconds until the first step in another way; the middle of three, after one that may write bytecode."""
    found = [measure(ROOT, words_of(system, tiny=True), first_only=True, **way)["start"] for _ in range(4)]
    return float(statistics.median(found[1:]))


def imported(system: str) -> float:
    """CPU seconds of a process that imports what the model of a system needs, as quickly as the command does."""
    config = yaml.safe_load((ROOT / "configs" / f"{system}.yaml").read_text(encoding="utf-8"))
    module = config["model"]["class_path"].rpartition(".")[0]
    code = "from moeapps.commands.later import start_quickly, without_collector; start_quickly()\n"
    code += f"with without_collector():\n import torch, lightning.pytorch, {module}\n"
    code += "import time; print(time.process_time())"
    run = partial(subprocess.run, [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
    return statistics.median(float(run(cwd=ROOT).stdout.split()[-1]) for _ in range(3))


def fit_of(system: str, tree: Path, *words: str) -> dict[str, Any]:
    """CPU seconds of a whole fit by part, and the share of its training."""
    found = measure(tree, [*words_of(system, tiny=False), *words])
    parts = {part: round(found["parts"].get(part, 0.0), 2) for part in PARTS}
    parts["end"] = round(found["process"] - sum(value for part, value in parts.items() if part != "end"), 2)
    training = parts["steps"] + parts["gate fits"]
    needed = training + sum(parts[part] for part in ("imports", "setup", "validation", "test"))
    return {
        "total_s": round(found["process"], 2),
        "steps": found["steps"],
        "share": round(training / found["process"], 4),
        "bound": round(training / needed, 4),
        "parts_s": parts,
    }


LIMITS = (
    "The bound is the share if batches, logging, Lightning's loop, checkpoints and figures cost nothing: start, "
    "validation and test remain, whose scores are the results (HoME: 180 batches beside 937 of training; MixER: 200 "
    "steps on the context of each new environment, twice for those of the validation). Taken: a batch by one index, "
    "scalars at the logger's steps, the routing drawn once, four ticks an axis. Tried without gain: figures laid out "
    "before they are saved, 0.46 to 0.55 s where saving alone takes 0.51. Not taken: figures without a layout engine, "
    "a third less, since nothing then keeps their labels apart; larger batches in evaluation, since sums in another "
    "order may change the last digits of committed results."
)
PAGE, BEGIN, END = ROOT / "docs" / "performance.md", "<!-- fit_share:begin -->", "<!-- fit_share:end -->"


def page_of(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| system | CPU s until the first step | before | ratio | pairs |", "|---|---|---|---|---|"]
    for system, row in sorted(report["starts"].items()):
        cells = [row["start_s"], row.get("before_s", ""), row.get("over_before", ""), row["pairs"]]
        lines.append(f"| {system} | {' | '.join(str(cell) for cell in cells)} |")
    every = [(system, when, fit) for system, fits in report["fits"].items() for when, fit in fits.items()]
    lines += ["", "| CPU s of a fit | " + " | ".join(f"{system}, {when}" for system, when, _ in every) + " |"]
    lines += ["|---" * (len(every) + 1) + "|"]
    for name, key in (("share of training", "share"), ("its bound", "bound")):
        lines.append(f"| {name} | " + " | ".join(f"{fit[key]:.0%}" for *_, fit in every) + " |")
    lines.append("| all | " + " | ".join(f"{fit['total_s']:.1f}" for *_, fit in every) + " |")
    for part in PARTS:
        lines.append(f"| {part} | " + " | ".join(f"{fit['parts_s'][part]:.1f}" for *_, fit in every) + " |")
    return "\n".join([*lines, "", *([report["load"], ""] if report.get("load") else []), report["limits"]])


def write_page(report: dict[str, Any]) -> None:
    """Put the report between its marks in docs/performance.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(wrapped(f"{before}{BEGIN}\n{page_of(report)}\n{END}{after}"), encoding="utf-8")


def middle_fits(system: str, trees: dict[str, Path], count: int) -> dict[str, dict[str, Any]]:
    """Of several fits of each checkout, made by turns, the one whose share is the median."""
    fits: dict[str, list[dict[str, Any]]] = {when: [] for when in trees}
    for turn in range(count):
        for when in list(trees) if turn % 2 else reversed(trees):
            fits[when].append(fit_of(system, trees[when]))
    ordered = {when: sorted(found, key=lambda fit: float(fit["share"])) for when, found in fits.items()}
    return {
        when: {**found[(count - 1) // 2], "fits": count, "share_spread": [found[0]["share"], found[-1]["share"]]}
        for when, found in ordered.items()
    }


def show(report: dict[str, Any]) -> None:
    """Print both tables."""
    console = Console(highlight=False)
    table = Table("system", "CPU s to the first step", "before", "ratio")
    for system, row in report["starts"].items():
        table.add_row(system, *(str(row.get(key, "")) for key in ("start_s", "before_s", "over_before")))
    console.print(table)
    table = Table("CPU s of a fit", *(f"{system}, {when}" for system, fits in report["fits"].items() for when in fits))
    every = [fit for fits in report["fits"].values() for fit in fits.values()]
    table.add_row("share of training", *(f"{fit['share']:.0%}" for fit in every))
    table.add_row("all", *(f"{fit['total_s']:.1f}" for fit in every))
    for part in PARTS:
        table.add_row(part, *(f"{fit['parts_s'][part]:.1f}" for fit in every))
    console.print(table)


def main(args: list[str] | None = None) -> int:
    """Measure, print, write; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fit_share", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where to write the report")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="checkout of the commit to compare with")
    parser.add_argument("--pairs", type=int, default=9, help="starts of each system (default 9)")
    parser.add_argument("--fits", type=int, default=9, help="whole fits of home and mixer (default 9; 0: none)")
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help="measure these, keep what is known of the others")
    parser.add_argument("--page", action="store_true", help="only write docs/performance.md from what was measured")
    options = parser.parse_args(args)
    if options.page:
        write_page(json.loads(options.json.read_text(encoding="utf-8")))
        return 0
    from benchmarks.core import machine

    before = None if options.before is None else options.before.resolve()
    here = machine()
    known = known_here({"machine": here}, options.json) if options.only else {}
    report = {
        "command": "python -m benchmarks.fit_share" + ("" if before is None else " --before FOLDER"),
        "before": None if before is None else commit_of(before),
        "machine": here,
        "threads": 1,
        "goals": GOALS,
        "starts": known.get("starts", {}),
        "fits": known.get("fits", {}),
        "limits": LIMITS,
    }
    for system in options.only or systems():
        report["starts"][system] = start_of(system, before if system in FITTED else None, options.pairs)
        write_json(options.json, with_elsewhere(report, options.json))
    for system in [system for system in FITTED if options.fits and system in (options.only or FITTED)]:
        trees = {"now": ROOT} if before is None else {"before": before, "now": ROOT}
        fits = report["fits"][system] = middle_fits(system, trees, options.fits)
        if fits["now"]["share"] < GOALS["share"]:
            fits["now"]["tried"] = {name: fit_of(system, ROOT, *words)["share"] for name, words in OTHER_FITS.items()}
        write_json(options.json, with_elsewhere(report, options.json))
    show(report)
    if options.json == RESULTS:
        write_page(report)
    shares = [fits["now"]["share"] >= GOALS["share"] for fits in report["fits"].values()]
    return 0 if all(row["ok"] for row in report["starts"].values()) and all(shares) else 1


if __name__ == "__main__":
    raise SystemExit(main())
