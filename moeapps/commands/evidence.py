# SPDX-License-Identifier: Apache-2.0
"""``moeapps evidence GRID.yaml``: run a grid of variants and seeds, and judge the claims that it makes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from moeapps.evidence.reading import GridFile

_DESCRIPTION = """Train every variant of a grid with every seed, each in a process of its own with one thread, and judge
the claims of the grid by paired t intervals. Finished cells are kept: the same command goes on after an interruption.
The format of a grid is in docs/evidence_grids.md. Paths in it are relative to the working directory, whose packages
can be imported."""
_EXAMPLES = """
  moeapps evidence grid.yaml                                  run what is missing, then judge
  moeapps evidence grid.yaml --list                           cells: done, stale, running, waiting
  moeapps evidence grid.yaml --shard $SLURM_ARRAY_TASK_ID/8   one of eight parts, on machines that share this folder
  moeapps evidence grid.yaml --verify 3                       draw three finished cells, run them again, compare
"""


def parser(program: str = "moeapps evidence") -> argparse.ArgumentParser:
    """Give the parser of this command."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("grids", nargs="+", type=Path, metavar="GRID", help="YAML file of a grid")
    add_options(parser)
    return parser


def add_options(parser: argparse._ActionsContainer) -> None:
    """Add what can be done with a grid to a parser, or to a group of one."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--list", action="store_true", help="print the cells of the grid and which are finished; run nothing"
    )
    what.add_argument(
        "--summarise", action="store_true", help="run nothing; compute results and their page from the cells"
    )
    what.add_argument(
        "--recount",
        action="store_true",
        help="train nothing; count FLOPs and active parameters of each variant anew and write them into its cells",
    )
    what.add_argument(
        "--verify",
        type=int,
        metavar="N",
        help="draw N finished cells, run them again, compare to 1e-6 (if made with other instructions: to what "
        "two seeds differ by)",
    )
    parser.add_argument(
        "--verify-seed", type=int, metavar="S", help="seed of the drawing (default: another one each time)"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only the variants that match (* and ?)")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each (default 2)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="MIN", help="minutes after which a cell is stopped (60)"
    )
    parser.add_argument(
        "--redo-stale", action="store_true", help="run finished cells again whose configs have changed since"
    )
    parser.add_argument(
        "--shard", default="1/1", metavar="I/N", help="run the i-th of n parts; no cell is in two, none is run twice"
    )
    parser.add_argument(
        "--lease",
        type=float,
        default=10.0,
        metavar="MIN",
        help="minutes after which a process that gives no sign of life loses its cells to others (10)",
    )


def main(args: list[str]) -> int:
    """Run the command line; give the exit status."""
    from rich.console import Console

    options = parser().parse_args(args)
    return worst(run_file(path, options, console=Console(highlight=False)) for path in options.grids)


def run_file(path: Path, options: argparse.Namespace, *, console: Console) -> int:
    """Do with a grid of the working directory what the options say; give the exit status."""
    from moeapps.evidence.reading import read_grid

    return run_grid(read_grid(path), options, console=console)


def run_grid(
    file: GridFile,
    options: argparse.Namespace,
    *,
    console: Console,
    root: Path | None = None,
    command: Sequence[str] | None = None,
) -> int:
    """Do with a grid what the options say.

    Args:
        file: the grid.
        options: of `add_options`.
        console: where to print.
        root: folder to run in; None for the working directory.
        command: what runs a cell; None for moeapps.

    Returns:
        Exit status: 0 done, 1 a cell failed or differs, 130 interrupted.
    """
    from moeapps.evidence.checks import check_words
    from moeapps.evidence.evidence import Evidence, Place, Shard
    from moeapps.evidence.runner import COMMAND

    if options.jobs < 1 or options.timeout <= 0 or options.lease <= 0:
        raise ValueError("--jobs, --timeout and --lease must be above zero")
    shard, place = Shard.parse(options.shard), Place.of(file, root or Path.cwd())
    evidence = Evidence(file.grid, place, command=command or COMMAND, console=console)
    if options.list:
        for cell, state in evidence.states().items():
            console.print(f"{state:<8}{cell.stem}", markup=False)
        return 0
    if options.summarise:
        for claim in evidence.summarise()["claims"]:
            console.print(f"{claim['id']}: {claim['verdict']}", markup=False)
        return 0
    if options.recount:
        evidence.recount(only=options.only)
        return 0
    check_words(file, place.root)
    try:
        if options.verify is not None:
            differ = evidence.verify(
                options.verify,
                only=options.only,
                seed=options.verify_seed,
                jobs=options.jobs,
                timeout_s=60 * options.timeout,
            )
            return min(1, differ)
        failed = evidence.run(
            only=options.only,
            redo_stale=options.redo_stale,
            jobs=options.jobs,
            timeout_s=60 * options.timeout,
            shard=shard,
            lease_s=60 * options.lease,
        )
    except KeyboardInterrupt:
        console.print("Interrupted. Finished cells are kept; the same command goes on from here.")
        return 130
    below = place.summary.is_relative_to(place.root)  # a grid may name a folder elsewhere
    summary = place.summary.relative_to(place.root) if below else place.summary
    console.print(f"results: {summary}, {place.page}", markup=False, soft_wrap=True)
    return min(1, failed)


def worst(statuses: Iterable[int]) -> int:
    """Give the highest of several exit statuses; an interruption ends them all."""
    found = 0
    for status in statuses:
        found = max(found, status)
        if status == 130:
            break
    return found
