# SPDX-License-Identifier: Apache-2.0
"""The seen/unseen matrix as rich tables and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from moeapps.evaluation.remarks import conclusion
from moeapps.evaluation.statistics import Interval
from moeapps.evaluation.xeval import Matrix
from moeapps.text import markdown as as_markdown
from moeapps.text import plain

_MOST = 2000
"""Characters of a sentence about runs, most of them their names."""
Cells = tuple[list[str], list[list[str]]]


def matrix_cells(matrix: Matrix) -> Cells:
    """Return head and rows of the matrix as text: one row per run."""
    head = ["run", "seed", *(f"{c} ({matrix.roles[c]})" if c in matrix.roles else c for c in matrix.columns)]
    rows = [
        [f"{row.variant} {row.run.name}", "" if row.seed is None else str(row.seed)]
        + [_number(row.cells.get(column)) for column in matrix.columns]
        for row in matrix.rows
    ]
    return head, rows


def variant_cells(matrix: Matrix) -> Cells:
    """Return the means over the runs of a variant with their 95 percent t intervals; variants of two or more runs."""
    rows = [
        [variant, *(_interval(cells.get(column)) for column in matrix.columns)]
        for variant, cells in matrix.variants.items()
    ]
    return ["variant", *matrix.columns], rows


def unit_cells(matrix: Matrix) -> Cells:
    """Return the scores with their 95 percent intervals over test units; no rows where no run stores units."""
    domains = [name for name in matrix.roles if any(name in row.intervals for row in matrix.rows)]
    rows = [
        [f"{row.variant} {row.run.name}", *(_interval(row.intervals.get(name)) for name in domains)]
        for row in matrix.rows
        if row.intervals
    ]
    return ["run", *domains], rows


def difference_cells(matrix: Matrix) -> Cells:
    """Return the paired differences to the baseline."""
    # Test units of one run say nothing about another training run, so one run is never called better.
    words = {True: "better", False: "worse", None: "open"}
    rows = [
        [
            *(d.variant, d.column, _interval(d.interval, signed=True)),
            f"{d.interval.n} {d.over}" if d.interval.n else "1 pair of runs",
            words[d.better] if d.over == "seeds" else "none: one seed",
        ]
        for d in matrix.differences
    ]
    return ["variant", "column", "difference [95 %]", "pairs", "verdict"], rows


def rich_tables(matrix: Matrix, width: int = 80) -> list[Table]:
    """Return the tables to print; a table wider than ``width`` characters is turned on its side.

    Args:
        matrix: what to show.
        width: characters of a line.
    """
    tables = []
    for title, (head, rows) in zip(_titles(matrix), _all_cells(matrix), strict=True):
        if rows:
            lines = [[plain(cell) for cell in line] for line in (head, *rows)]
            if _width(lines) > width and len(rows) < len(head):
                lines = [list(line) for line in zip(*lines, strict=True)]
            # Text, not str: names in brackets are no markup.
            table = Table(title=Text(plain(title), style="table.title"))
            for i, name in enumerate(lines[0]):
                table.add_column(Text(name), justify="left" if i == 0 else "right", overflow="fold")
            for row in lines[1:]:
                table.add_row(*map(Text, row))
            tables.append(table)
    return tables


def _width(lines: Sequence[Sequence[str]]) -> int:
    return 1 + sum(3 + max(len(cell) for cell in column) for column in zip(*lines, strict=True))


def markdown(matrix: Matrix) -> str:
    """Return the whole comparison as Markdown."""
    parts: list[str] = []
    for title, (head, rows) in zip(_titles(matrix), _all_cells(matrix), strict=True):
        if rows:
            parts.append(f"{'##' if parts else '#'} {as_markdown(title)}\n\n{_markdown_table(head, rows)}")
    notes = "`gap`: how much worse unseen domains are than seen ones. `worst unseen`: the worst unseen domain."
    closing = [as_markdown(line, _MOST) for text in closing_lines(matrix) for line in text.split("\n")]
    return "\n\n".join([*parts, *closing, notes]) + "\n"


def closing_lines(matrix: Matrix) -> list[str]:
    """Return the notes on the comparison and, last, what it says and what it cannot say."""
    closing = conclusion(matrix.metric, matrix.differences)
    return [*matrix.notes, *([closing] if closing else [])]


def _all_cells(matrix: Matrix) -> list[Cells]:
    return [matrix_cells(matrix), variant_cells(matrix), unit_cells(matrix), difference_cells(matrix)]


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, rows = [as_markdown(cell) for cell in head], [[as_markdown(cell) for cell in row] for row in rows]
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _titles(matrix: Matrix) -> list[str]:
    better = "larger is better" if matrix.direction == "max" else "smaller is better"
    return [
        f"{matrix.metric} ({better})",
        "means over seeds [95 %]",
        "the same scores, with intervals over whole test units [95 %]",
        f"difference to {matrix.differences[0].baseline if matrix.differences else 'the baseline'}",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else "-" if math.isnan(value) else f"{value:.4f}"


def _interval(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return ""
    mean = f"{interval.mean:{'+' if signed else ''}.4f}"
    return mean if math.isnan(interval.low) else f"{mean} [{interval.low:.4f}, {interval.high:.4f}]"
