# SPDX-License-Identifier: Apache-2.0
"""``moeapps xeval RUN...``: the seen/unseen matrix of runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="moeapps xeval",
        description="Put tested runs side by side: domains, averages, worst case, gap, intervals, paired differences.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder with metrics/test.json")
    parser.add_argument(
        "--baseline", nargs="+", type=Path, default=[], metavar="RUN", help="runs to subtract, paired by seed"
    )
    parser.add_argument("--metric", help="metric to compare (default: the main metric of the first run)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write xeval.json and xeval.md there")
    return parser


def main(args: list[str]) -> int:
    """Print the matrix and, with --out, write it."""
    options = parser().parse_args(args)
    from rich.console import Console

    from moeapps.evaluation.compute import cost_lines, cost_warnings
    from moeapps.evaluation.results import read_results
    from moeapps.evaluation.xeval import build_matrix
    from moeapps.reporting.matrix import closing_lines, markdown, rich_tables
    from moeapps.text import lines

    runs = [read_results(path) for path in options.runs]
    baseline = [read_results(path) for path in options.baseline]
    matrix = build_matrix(runs, baseline, options.metric)
    console = Console()
    for table in rich_tables(matrix, console.width):
        console.print(table)
    for line in cost_lines(runs, baseline):
        console.print(lines(line), soft_wrap=True, highlight=False, markup=False)
    for line in cost_warnings(runs, baseline):
        print(f"warning: {lines(line)}", file=sys.stderr)
    for line in closing_lines(matrix):
        console.print(lines(line), highlight=False, markup=False)
    if options.out is not None:
        from moeapps.files import finite, write_text

        text = json.dumps(finite(matrix.as_dict()), indent=1, allow_nan=False) + "\n"
        write_text(options.out / "xeval.json", text)
        write_text(options.out / "xeval.md", markdown(matrix))
        console.print(
            f"written: {options.out / 'xeval.json'}, {options.out / 'xeval.md'}", soft_wrap=True, markup=False
        )
    return 0
