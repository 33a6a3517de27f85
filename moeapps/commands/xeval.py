# SPDX-License-Identifier: Apache-2.0
"""``moeapps xeval RUN...``: the seen/unseen matrix of runs; ``--leave-one-out CONFIG``: one fold per domain."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moeapps.commands.boundary import UsageError

if TYPE_CHECKING:
    from moeapps.evaluation.results import RunResults

_EXAMPLES = """
  moeapps xeval runs/home/base/version_* --baseline runs/home/mmoe/version_*      seeds, paired
  moeapps xeval runs/home/lr_* --select                                           what choosing comes to
  moeapps xeval --leave-one-out configs/home.yaml --seeds 1 2 3                   a fold per domain and seed
  moeapps xeval --leave-one-out configs/home.yaml --baseline configs/baselines/home_mmoe.yaml --shard 1/4
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    from moeapps.commands.evidence import add_options

    parser = argparse.ArgumentParser(
        prog="moeapps xeval",
        description="Put tested runs side by side: domains, averages, worst case, gap, intervals, paired differences, "
        "parameters and compute.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folder with metrics/test.json")
    parser.add_argument(
        "--baseline",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="runs to subtract, paired by seed; with --leave-one-out, overlays that make the rival",
    )
    parser.add_argument("--metric", help="metric to compare (default: the main metric of the first run)")
    parser.add_argument(
        "--select",
        action="store_true",
        help="take the runs as candidates: what choosing by seen domains, by validation domains and by the unseen ones "
        "themselves (an oracle) comes to",
    )
    parser.add_argument(
        "--full", action="store_true", help="print every run for itself and every column, as in the files of --out"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="also write xeval.json, xeval.md, xeval.csv and xeval.tex there"
        " (of folds: leave_one_out.json, .md and .tex)",
    )
    folds = parser.add_argument_group("leave one domain out", "an evidence grid with a fold per seen domain, resumable")
    folds.add_argument(
        "--leave-one-out", nargs="+", type=Path, metavar="CONFIG", help="base config, then overlays; trains the folds"
    )
    folds.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="S", help="seeds (default 1 2 3)")
    add_options(folds)
    return parser


def main(args: list[str]) -> int:
    """Print the matrix and, with --out, write it."""
    options = parser().parse_args(args)
    from rich.console import Console

    console = Console()
    if options.leave_one_out and options.runs:
        raise ValueError("--leave-one-out trains its own runs; leave out the runs, or the option")
    if options.leave_one_out:
        from moeapps.commands.folds import leave_one_out

        return leave_one_out(options, shlex.join(["moeapps", "xeval", *args]), Console(highlight=False))
    if not options.runs:
        raise ValueError("no run given; name run folders, or a config after --leave-one-out (moeapps xeval --help)")
    from moeapps.evaluation.choices import choices
    from moeapps.evaluation.compute import cost_warnings
    from moeapps.evaluation.variants import one_of_each
    from moeapps.evaluation.xeval import build_matrix
    from moeapps.reporting.matrix import closing_lines, rich_tables
    from moeapps.reporting.screen import screen_tables
    from moeapps.text import lines

    runs, baseline = one_of_each(read_all(options.runs), read_all(options.baseline))
    matrix = build_matrix(runs, baseline, options.metric)
    if options.select:
        cells = {row.run: row.cells for row in matrix.rows}
        matrix = replace(matrix, choices=choices(runs, matrix.metric, cells))
    for table in (rich_tables if options.full else screen_tables)(matrix, console.width):
        console.print(table)
        console.print()
    for line in cost_warnings(runs, baseline):
        print(f"warning: {lines(line)}", file=sys.stderr)
    for line in closing_lines(matrix):
        console.print(lines(line), highlight=False, markup=False)
    if options.out is not None:
        from moeapps.files import finite, write_text
        from moeapps.reporting.matrix import markdown
        from moeapps.reporting.matrix_files import csv_text, latex_text

        text = json.dumps(finite(matrix.as_dict()), indent=1, allow_nan=False) + "\n"
        files = {"json": text, "md": markdown(matrix), "csv": csv_text(matrix), "tex": latex_text(matrix)}
        for ending, content in files.items():
            write_text(options.out / f"xeval.{ending}", content)
        told = ", ".join(str(options.out / f"xeval.{ending}") for ending in files)
        console.print(f"written: {told}", soft_wrap=True, markup=False)
    return 0


def read_all(paths: list[Path]) -> list[RunResults]:
    """Read the results of runs.

    Raises:
        UsageError: some cannot be read; each has a line of the text.
    """
    from moeapps.evaluation.results import read_results

    found, told = [], []
    for path in paths:
        try:
            found.append(read_results(path))
        except (OSError, ValueError) as error:
            told.append(" ".join(str(error).split()))
    if told:
        raise UsageError("\n".join(told))
    return found
