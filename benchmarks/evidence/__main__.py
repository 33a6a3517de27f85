# SPDX-License-Identifier: Apache-2.0
"""Run, verify or summarise the evidence of a system: ``python -m benchmarks.evidence SYSTEM``."""

from __future__ import annotations

import argparse
import fnmatch
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.evidence.cells import (
    CellError,
    CellResult,
    beside_seeds,
    differing_metrics,
    read_cells,
    same_arithmetic,
    write_cell,
)
from benchmarks.evidence.grid import Cell, Grid, GridError, Scale, list_systems, load_grid
from benchmarks.evidence.recount import count_variant, rewrite
from benchmarks.evidence.report import render
from benchmarks.evidence.runner import COMMAND, Failure, Runner
from benchmarks.evidence.summary import summarise
from moeapps.files import write_text

ROOT = Path(__file__).resolve().parents[2]


class Evidence:
    """The files of one system's evidence below a repository, and what can be done with them.

    Args:
        grid: The grid.
        root: The repository.
        command: What runs a cell.
        console: Where to print.
    """

    def __init__(
        self, grid: Grid, root: Path = ROOT, *, command: Sequence[str] = COMMAND, console: Console | None = None
    ):
        self.grid = grid
        self.root = root
        self.command = command
        self.console = console or Console(highlight=False)
        self.cells_folder = root / "benchmarks" / "results" / grid.system / "cells"
        self.work = root / "runs" / "evidence" / grid.system

    def read(self) -> dict[Cell, CellResult]:
        """Read all finished cells."""
        return read_cells(self.cells_folder, self.grid.system)

    def run(self, *, only: str = "*", redo_stale: bool = False, jobs: int = 2, timeout_s: float = 3600.0) -> int:
        """Run the cells that are not there yet, summarise, and give the number of failures."""
        done, stale = self.read(), self.stale()
        if stale:
            what = "are run again" if redo_stale else "stay as they are (--redo-stale runs them again)"
            self.console.print(
                f"{len(stale)} finished cells were made with configs that have changed since; they {what}."
            )
        skip = done.keys() - (set(stale) if redo_stale else set())
        wanted = [cell for cell in self.grid.cells() if fnmatch.fnmatch(cell.variant, only)]
        if not wanted:
            raise GridError(f"--only {only!r} matches no variant; there are {', '.join(self.grid.all_variants)}")
        failures = self._run(
            [cell for cell in wanted if cell not in skip],
            self.work / "cells",
            lambda result: write_cell(self.cells_folder, result),
            jobs=jobs,
            timeout_s=timeout_s,
            skipped=sum(cell in skip for cell in wanted),
        )
        self.summarise()
        return len(failures)

    def stale(self) -> list[Cell]:
        """List finished cells whose configs or flags say something else today."""
        now = {name: self.grid.definition(name, self.root) for name in self.grid.all_variants}
        return [c for c, result in self.read().items() if c.variant in now and result.definition != now[c.variant]]

    def verify(self, count: int, *, seed: int | None = None, jobs: int = 2) -> int:
        """Draw finished cells at random, run them again, and give how many differ.

        With the same instruction set and threads that is by more than 1e-6. A cell made with others, or before cells
        said so, is held to what two seeds differ by (`beside_seeds`), and the largest difference is printed.
        """
        done = self.read()
        fresh = sorted(done.keys() - set(self.stale()), key=lambda cell: cell.stem)
        if len(fresh) < count:
            raise GridError(
                f"--verify {count}: only {len(fresh)} cells are finished with the present configs; run the grid first"
            )
        drawn = random.Random(seed).sample(fresh, count)
        bad: list[str] = []

        def compare(result: CellResult) -> None:
            old = done[result.cell]
            lines = differing_metrics(old, result)
            if lines and not same_arithmetic(old, result):
                lines = self._compare_beside_seeds(old, result, done)
            else:
                self.console.print(f"{result.cell.stem}: " + ("the same numbers to 1e-6" if not lines else "DIFFERS"))
            for line in lines:
                self.console.print(f"  {line}")
            bad.extend([result.cell.stem] if lines else [])

        failures = self._run(drawn, self.work / "verify", compare, jobs=jobs)
        return len(bad) + len(failures)

    def recount(self, *, only: str = "*") -> None:
        """Count every variant that has cells again, without training, and rewrite its cells and the summary."""
        have = {cell.variant for cell in self.read()}
        for name in [name for name in self.grid.all_variants if name in have and fnmatch.fnmatch(name, only)]:
            if self.grid.all_variants[name].stages:
                self.console.print(f"{name}: a curriculum cannot be counted without its training; left as it is")
                continue
            found = count_variant(self.grid, name, self.root)
            definition = self.grid.definition(name, self.root)
            changed = rewrite(self.cells_folder, self.grid.system, name, definition, found)
            numbers = ", ".join(f"{key} {value:,.6g}" for key, value in found.items())
            self.console.print(f"{name}: {len(changed)} cells, {numbers}")
        self.summarise()

    def _compare_beside_seeds(self, old: CellResult, new: CellResult, done: dict[Cell, CellResult]) -> list[str]:
        """Print how a cell differs from itself under other arithmetic; give what two seeds do not explain."""
        used: dict[str, Scale] = dict.fromkeys(sorted(self.grid.show), "linear")
        used |= {claim.metric: claim.scale for claim in self.grid.claims if old.variant in claim.variants}
        metrics = {name: scale for name, scale in used.items() if name in old.metrics or name in new.metrics}
        lines, largest = beside_seeds(old, new, done.values(), metrics)
        made = f"{old.instruction_set or 'an unknown instruction set'} ({old.machine or 'unknown machine'})"
        told = "DIFFERS by more than two seeds do" if lines else "the same within what two seeds differ by"
        self.console.print(f"{old.cell.stem}: {told}", markup=False)
        self.console.print(
            f"  made with {made}, run again with {new.instruction_set or 'an unknown one'}: not the same to 1e-6; "
            + largest,
            markup=False,
        )
        return lines

    def summarise(self) -> dict[str, Any]:
        """Compute and write ``benchmarks/results/<system>.json`` and docs/evidence.md; give the former."""
        results = summarise(self.grid, self.read())
        write_text(self.root / "benchmarks" / "results" / f"{self.grid.system}.json", to_json(results))
        write_text(self.root / "docs" / "evidence.md", render(all_results(self.root)))
        return results

    def _run(
        self,
        cells: list[Cell],
        work: Path,
        store: Callable[[CellResult], object],
        *,
        jobs: int,
        timeout_s: float = 3600.0,
        skipped: int = 0,
    ) -> list[Failure]:
        failures: list[Failure] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(self.grid.system, total=len(cells) + skipped, completed=skipped)

            def finished(result: CellResult) -> None:
                store(result)
                progress.advance(task)
                self.console.print(f"{result.cell.stem}: done, {result.cpu_s:.0f} CPU s")

            def failed(failure: Failure) -> None:
                failures.append(failure)
                progress.advance(task)
                self.console.print(
                    f"{failure.cell.stem}: FAILED, {failure.reason}. End of {failure.log}:", markup=False
                )
                self.console.print(failure.tail, markup=False)

            runner = Runner(self.grid, self.root, work, command=self.command, jobs=jobs, timeout_s=timeout_s)
            runner.run(cells, finished, failed)
        if failures:
            names = ", ".join(failure.cell.stem for failure in failures)
            self.console.print(f"{len(failures)} of {len(cells)} cells failed: {names}", markup=False)
        return failures


def all_results(root: Path) -> list[dict[str, Any]]:
    """Read the results file of every system (files of other benchmarks have no claims and are left out)."""
    found = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((root / "benchmarks" / "results").glob("*.json"))
    ]
    return [data for data in found if isinstance(data, dict) and "claims" in data]


def to_json(results: dict[str, Any]) -> str:
    """Give the text of a results file."""
    return json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("system", nargs="?", help=f"one of: {', '.join(list_systems()) or 'none yet'}")
    parser.add_argument(
        "--list", action="store_true", help="print the cells of the grid and which are finished; run nothing"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="run only the variants that match (* and ?)")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each (default 2)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="MIN", help="minutes after which a cell is stopped (60)"
    )
    parser.add_argument(
        "--redo-stale", action="store_true", help="run finished cells again whose configs have changed since"
    )
    parser.add_argument(
        "--summarise", action="store_true", help="run nothing; compute results and docs/evidence.md from the cells"
    )
    parser.add_argument(
        "--recount",
        action="store_true",
        help="train nothing; count FLOPs and active parameters of each variant anew and write them into its cells",
    )
    parser.add_argument(
        "--verify",
        type=int,
        metavar="N",
        help="draw N finished cells, run them again, compare to 1e-6 (if made with other instructions: to what "
        "two seeds differ by)",
    )
    parser.add_argument(
        "--verify-seed", type=int, metavar="S", help="seed of the drawing (default: another one each time)"
    )
    return parser


def main(words: Sequence[str] | None = None, *, root: Path = ROOT, command: Sequence[str] = COMMAND) -> int:
    """Run the command line; give the exit status."""
    options = build_parser().parse_args(words)
    console = Console(highlight=False)
    try:
        if options.system is None:
            return _summarise_all(options, root, console)
        evidence = Evidence(load_grid(options.system), root, command=command, console=console)
        if options.list:
            done = evidence.read()
            for cell in evidence.grid.cells():
                console.print(f"{'done   ' if cell in done else 'waiting'} {cell.stem}")
            return 0
        if options.verify is not None:
            return min(1, evidence.verify(options.verify, seed=options.verify_seed, jobs=options.jobs))
        if options.recount:
            evidence.recount(only=options.only)
            return 0
        if not options.summarise:
            failed = evidence.run(
                only=options.only, redo_stale=options.redo_stale, jobs=options.jobs, timeout_s=60 * options.timeout
            )
            return min(1, failed)
        for claim in evidence.summarise()["claims"]:
            console.print(f"{claim['id']}: {claim['verdict']}", markup=False)
        return 0
    except (GridError, CellError) as error:
        console.print(f"error: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("Interrupted. Finished cells are kept; the same command goes on from here.")
        return 130


def _summarise_all(options: argparse.Namespace, root: Path, console: Console) -> int:
    if not options.summarise:
        raise GridError(f"name a system: {', '.join(list_systems()) or 'there are no grids yet'}")
    for system in list_systems():
        Evidence(load_grid(system), root, console=console).summarise()
    write_text(root / "docs" / "evidence.md", render(all_results(root)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
