# SPDX-License-Identifier: Apache-2.0
"""The seen/unseen matrix as rich tables and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from moeapps.evaluation.compute import COLUMNS
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
    named = sum(role == "unseen" for role in matrix.roles.values()) > 1
    rows = [
        [f"{row.variant} {row.run.name}", "" if row.seed is None else str(row.seed)]
        + [
            _number(row.cells.get(column)) + (f" ({row.worst})" if named and column == "worst unseen" else "")
            for column in matrix.columns
        ]
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


def cost_cells(matrix: Matrix) -> Cells:
    """Return what the variants cost: runs, parameters, compute, and training FLOPs in those of the baseline."""
    known = [name for name in COLUMNS if any(name in cost.sizes for cost in matrix.costs)]
    ratio = any(cost.ratio is not None for cost in matrix.costs)
    rows = [
        [
            *(cost.variant, str(cost.runs), *(_size(cost.sizes.get(name)) for name in known)),
            *([_times(cost.ratio)] if ratio else []),
        ]
        for cost in matrix.costs
    ]
    return ["variant", "runs", *(COLUMNS[name] for name in known), *(["of the baseline's"] if ratio else [])], rows


def choice_cells(matrix: Matrix) -> Cells:
    """Return what rules of choosing come to; no rows where nobody asked."""
    rows = [
        [
            choice.rule,
            choice.note or ", ".join(f"{name} ({count})" for name, count in choice.chosen.items()),
            *(_interval(choice.unseen), _interval(choice.worst)),
        ]
        for choice in matrix.choices
    ]
    return ["chosen by", "variant (seeds)", "mean unseen", "worst unseen"], rows


def rich_tables(matrix: Matrix, width: int = 80) -> list[Table]:
    """Return the tables to print, none wider than ``width``.

    What is too wide is turned on its side; what then is still too wide comes in several tables of fewer columns.

    Args:
        matrix: what to show.
        width: characters of a line.
    """
    found = []
    for title, (head, rows) in zip(_titles(matrix), _all_cells(matrix), strict=True):
        if rows:
            parts = _fitting([[plain(cell) for cell in line] for line in (head, *rows)], width)
            found += [_table(part, title if i == 0 else f"{title}, continued") for i, part in enumerate(parts)]
    return found


def _table(lines: list[list[str]], title: str) -> Table:
    # Text, not str: names in brackets are no markup.
    table = Table(title=Text(plain(title), style="table.title"))
    for i, name in enumerate(lines[0]):
        table.add_column(Text(name), justify="left" if i == 0 else "right", overflow="fold")
    for row in lines[1:]:
        table.add_row(*map(Text, row))
    return table


def _fitting(lines: list[list[str]], width: int) -> list[list[list[str]]]:
    """Return the lines as tables that are no wider than ``width``, as far as names and numbers allow."""
    if _width(lines) <= width:
        return [lines]
    turned = [list(line) for line in zip(*lines, strict=True)]
    if _width(turned) <= width:
        return [turned]
    return min((_parted(lines, width), _parted(turned, width)), key=lambda parts: sum(map(len, parts)))


def _parted(lines: list[list[str]], width: int) -> list[list[list[str]]]:
    """Part the columns into tables; each begins with the first column, folded where it is very wide."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    left = min(widths[0], width // 3)
    parts: list[list[int]] = [[]]
    room = width - left - 4
    for column in range(1, len(widths)):
        # A heading may break between its words, a number may not.
        need = 3 + max(_longest_word(lines[0][column]), *(len(line[column]) for line in lines[1:]))
        if parts[-1] and need > room:
            parts.append([])
            room = width - left - 4
        parts[-1].append(column)
        room -= need
    return [[[line[0], *(line[i] for i in part)] for line in lines] for part in parts]


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _width(lines: Sequence[Sequence[str]]) -> int:
    return 1 + sum(3 + max(len(cell) for cell in column) for column in zip(*lines, strict=True))


def markdown(matrix: Matrix) -> str:
    """Return the whole comparison as Markdown."""
    parts: list[str] = []
    for title, (head, rows) in zip(_titles(matrix), _all_cells(matrix), strict=True):
        if rows:
            parts.append(f"{'##' if parts else '#'} {as_markdown(title)}\n\n{markdown_table(head, rows)}")
    notes = "`gap`: how much worse unseen domains are than seen ones. `worst unseen`: the worst unseen domain."
    closing = [as_markdown(line, _MOST) for text in closing_lines(matrix) for line in text.split("\n")]
    return "\n\n".join([*parts, *closing, notes]) + "\n"


def closing_lines(matrix: Matrix) -> list[str]:
    """Return the notes on the comparison and, last, what it says and what it cannot say."""
    closing = conclusion(matrix.metric, matrix.differences)
    return [*matrix.notes, *([closing] if closing else [])]


def _all_cells(matrix: Matrix) -> list[Cells]:
    tables = (matrix_cells, variant_cells, unit_cells, difference_cells, cost_cells, choice_cells)
    return [table(matrix) for table in tables]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of Markdown."""
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
        "parameters and compute",
        "what each rule of choosing among these runs comes to [95 % over seeds]",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else "-" if math.isnan(value) else f"{value:.4f}"


def _size(value: float | None) -> str:
    """A large number in three digits and a letter."""
    if value is None:
        return "unknown"
    for power, letter in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= power:
            return f"{value / power:.3g}{letter}"
    return f"{value:.3g}"


def _times(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}x"


def _interval(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return ""
    mean = f"{interval.mean:{'+' if signed else ''}.4f}"
    return mean if math.isnan(interval.low) else f"{mean} [{interval.low:.4f}, {interval.high:.4f}]"
