# SPDX-License-Identifier: Apache-2.0
"""The evidence of one grid: run what is missing, verify what is there, compute results and the page from the cells."""

from __future__ import annotations

import fnmatch
import json
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moeapps.evidence.cells import (
    CellResult,
    beside_seeds,
    cell_path,
    differing_metrics,
    read_cell,
    read_cells,
    same_arithmetic,
    write_cell,
)
from moeapps.evidence.grid import Cell, Grid, GridError, Scale
from moeapps.evidence.leases import LEASE_S, Leases
from moeapps.evidence.reading import GridFile
from moeapps.evidence.report import render
from moeapps.evidence.runner import COMMAND, Failure, Runner
from moeapps.evidence.summary import summarise
from moeapps.files import write_text


@dataclass(frozen=True)
class Place:
    """Where the files of a grid lie.

    Args:
        root: folder that cells are run in; everything below is relative to it.
        name: of the grid.
        results: folder of the results of all grids.
        page: Markdown page of all of them.
        command: what to type to run the grid, as results and page tell it.
    """

    root: Path
    name: str
    results: Path = Path("evidence")
    page: Path = Path("evidence/evidence.md")
    command: str = ""

    @classmethod
    def of(cls, file: GridFile, root: Path) -> Place:
        """The place that a grid's file names."""
        return cls(root, file.name, file.results, file.page, file.command)

    @property
    def cells(self) -> Path:
        """Folder of the finished cells."""
        return self.root / self.results / self.name / "cells"

    @property
    def summary(self) -> Path:
        """Claims, intervals and verdicts."""
        return self.root / self.results / f"{self.name}.json"

    @property
    def work(self) -> Path:
        """Runs, logs and leases of unfinished cells."""
        return self.root / "runs" / "evidence" / self.name


@dataclass(frozen=True)
class Shard:
    """One of several parts of a grid, for processes on machines that share a folder.

    Args:
        number: of the part, from 1.
        of: how many parts there are.
    """

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``i/n``.

        Raises:
            ValueError: it is not that.
        """
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ValueError(f"--shard {text}: give i/n with i from 1 to n, for instance 1/4 to 4/4")
        return cls(int(number), int(of))

    def part(self, cells: Sequence[Cell]) -> list[Cell]:
        """Give every n-th cell, from the i-th on: whatever is done already, no two parts have one in common."""
        return list(cells[self.number - 1 :: self.of])


WHOLE = Shard()


class Evidence:
    """What can be done with a grid and its files.

    Args:
        grid: The grid.
        place: Where its files lie.
        command: What runs a cell.
        console: Where to print.
    """

    def __init__(
        self, grid: Grid, place: Place, *, command: Sequence[str] = COMMAND, console: Console | None = None
    ) -> None:
        self.grid = grid
        self.place = place
        self.root = place.root
        self.command = command
        self.console = console or Console(highlight=False)
        self.cells_folder = place.cells
        self.work = place.work

    def read(self) -> dict[Cell, CellResult]:
        """Read all finished cells."""
        return read_cells(self.cells_folder, self.grid.system)

    def run(
        self,
        *,
        only: str = "*",
        redo_stale: bool = False,
        jobs: int = 2,
        timeout_s: float = 3600.0,
        shard: Shard = WHOLE,
        lease_s: float = LEASE_S,
    ) -> int:
        """Run the cells that are not there yet, summarise, and give the number of failures.

        Args:
            only: pattern of the variants to run.
            redo_stale: run finished cells again whose configs have changed since.
            jobs: cells at a time.
            timeout_s: wall seconds after which a cell is stopped.
            shard: the part of the grid to run; results are then written by the part that finishes the grid.
            lease_s: seconds after which a process that gives no sign of life has lost its cells to others.
        """
        done, stale = self.read(), self.stale()
        if stale:
            what = "are run again" if redo_stale else "stay as they are (--redo-stale runs them again)"
            self.console.print(
                f"{len(stale)} finished cells were made with configs that have changed since; they {what}."
            )
        skip = done.keys() - (set(stale) if redo_stale else set())
        planned, names = self.grid.cells(), self._named(only)
        wanted = [cell for cell in shard.part(planned) if cell.variant in names]
        waiting = [cell for cell in wanted if cell not in skip]
        failures = self._run(
            waiting,
            self.work / "cells",
            lambda result: write_cell(self.cells_folder, result),
            jobs=jobs,
            timeout_s=timeout_s,
            skipped=len(wanted) - len(waiting),
            leases=self.leases(lease_s, set(stale) if redo_stale else set()),
        )
        if shard.of == 1 or self.read().keys() >= set(planned):
            self.summarise()
        return len(failures)

    def _named(self, only: str) -> list[str]:
        """Give the variants that match a pattern.

        Raises:
            GridError: none does.
        """
        found = [name for name in self.grid.all_variants if fnmatch.fnmatch(name, only)]
        if not found:
            raise GridError(f"--only {only!r} matches no variant; there are {', '.join(self.grid.all_variants)}")
        return found

    def leases(self, lease_s: float = LEASE_S, again: Collection[Cell] = ()) -> Leases:
        """The leases of this process on cells of the grid.

        Args:
            lease_s: seconds after which an untouched one is of a dead process.
            again: finished cells that are to be run anew: they are finished once they have the digest of today.
        """
        now = {name: self.grid.definition(name, self.root) for name in {cell.variant for cell in again}}

        def finished(cell: Cell) -> bool:
            path = cell_path(self.cells_folder, cell)
            fresh = cell not in again or not path.exists()
            return path.exists() and (fresh or read_cell(path, self.grid.system).definition == now[cell.variant])

        return Leases(self.work / "leases", finished, lease_s)

    def states(self) -> dict[Cell, str]:
        """Tell of every planned cell whether it is done, stale (configs have changed since), running or waiting."""
        done, stale, leases = self.read(), set(self.stale()), self.leases()

        def state(cell: Cell) -> str:
            if cell in done:
                return "stale" if cell in stale else "done"
            return "running" if leases.running(cell) else "waiting"

        return {cell: state(cell) for cell in self.grid.cells()}

    def stale(self) -> list[Cell]:
        """List finished cells whose configs or flags say something else today."""
        now = {name: self.grid.definition(name, self.root) for name in self.grid.all_variants}
        return [c for c, result in self.read().items() if c.variant in now and result.definition != now[c.variant]]

    def verify(
        self, count: int, *, only: str = "*", seed: int | None = None, jobs: int = 2, timeout_s: float = 3600.0
    ) -> int:
        """Draw finished cells at random, run them again, and give how many differ.

        With the same instruction set and threads that is by more than 1e-6. A cell made with others, or before cells
        said so, is held to what two seeds differ by (`beside_seeds`), and the largest difference is printed.

        Args:
            count: how many cells.
            only: pattern of the variants to draw from.
            seed: of the drawing; None draws others each time.
            jobs: cells at a time.
            timeout_s: wall seconds after which a cell is stopped, which counts as one that differs.

        Raises:
            GridError: there are fewer cells.
        """
        done, names = self.read(), self._named(only)
        fresh = sorted(done.keys() - set(self.stale()), key=lambda cell: cell.stem)
        fresh = [cell for cell in fresh if cell.variant in names]
        if len(fresh) < count:
            which = "" if only == "*" else f" of --only {only!r}"
            raise GridError(
                f"--verify {count}: only {len(fresh)} cells{which} are finished with the present configs; run the grid "
                "first"
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

        failures = self._run(drawn, self.work / "verify", compare, jobs=jobs, timeout_s=timeout_s)
        return len(bad) + len(failures)

    def recount(self, *, only: str = "*") -> None:
        """Count every variant that has cells again, without training, and rewrite its cells and the summary."""
        from moeapps.evidence.recount import (
            count_variant,
            rewrite,
        )  # brings torch and Lightning, which nothing else needs

        have = {cell.variant for cell in self.read()}
        for name in [name for name in self._named(only) if name in have]:
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
        used = self._used_metrics(old.variant)
        metrics = {name: scale for name, scale in used.items() if old.has(name) or new.has(name)}
        # What no claim and no table uses is told by all that was measured.
        metrics = metrics or dict.fromkeys(sorted(old.metrics.keys() | new.metrics.keys()), "linear")
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

    def _used_metrics(self, variant: str) -> dict[str, Scale]:
        """The metrics of a variant that tables, its claims and the ladder use, and on which scale."""
        used: dict[str, Scale] = dict.fromkeys(sorted(self.grid.show), "linear")
        ladder = self.grid.ladder
        if ladder is not None:
            sides = (ladder.system, ladder.baseline)
            if variant in {ladder.variant_name(level, side) for level in ladder.levels for side in sides}:
                used[ladder.metric] = "linear"
        for claim in self.grid.claims:
            if variant in claim.variants:
                metrics = [claim.metric, *([claim.baseline_metric] if claim.baseline_metric else [])]
                used |= dict.fromkeys(metrics, claim.scale)
        return used

    def summarise(self) -> dict[str, Any]:
        """Compute and write the results file and the page of all results in its folder; give the former."""
        results = summarise(self.grid, self.read(), self.place.command, set(self.stale()))
        if self.place.name != self.grid.system:  # one of several grids of a system
            results = {"name": self.place.name, **results}
        write_text(self.place.summary, to_json(results))
        folder = self.place.results
        write_text(self.root / self.place.page, render(all_results(self.root / folder), folder.as_posix()))
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
        leases: Leases | None = None,
    ) -> list[Failure]:
        failures: list[Failure] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(self.place.name, total=len(cells) + skipped, completed=skipped)

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

            runner = Runner(
                self.grid, self.root, work, command=self.command, jobs=jobs, timeout_s=timeout_s, leases=leases
            )
            left = runner.run(cells, finished, failed)
            left = runner.run(left, finished, failed)  # whoever had them may be dead by now
        held = [cell.stem for cell in left if not cell_path(self.cells_folder, cell).exists()]
        if held:
            self.console.print(f"{len(held)} cells are run by other processes: {', '.join(held)}", markup=False)
        if failures:
            names = ", ".join(failure.cell.stem for failure in failures)
            self.console.print(f"{len(failures)} of {len(cells)} cells failed: {names}", markup=False)
        return failures


def all_results(folder: Path) -> list[dict[str, Any]]:
    """Read every results file of a folder (files of other benchmarks have no claims and are left out)."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [data for data in found if isinstance(data, dict) and "claims" in data]


def to_json(results: dict[str, Any]) -> str:
    """Give the text of a results file."""
    return json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
