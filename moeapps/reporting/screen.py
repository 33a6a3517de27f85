# SPDX-License-Identifier: Apache-2.0
"""The seen/unseen matrix on a screen: one row or column per variant, as much about each number as the width allows.

Every run for itself, with intervals over its test units, is in the full tables (`moeapps.reporting.matrix`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from moeapps.evaluation.statistics import Interval
from moeapps.evaluation.xeval import ROLES, Matrix
from moeapps.reporting.matrix import cost_cells
from moeapps.text import plain

Form = Callable[[Interval], str]
Rows = Callable[[Form], list[list[str]]]
MEANS = (*(f"mean {role}" for role in ROLES), "worst unseen", "gap")
_SHORT = {f"mean {role}": role for role in ROLES}
_LONGEST = 24  # characters of a name in one line


def screen_tables(matrix: Matrix, width: int) -> list[Table]:
    """Return the tables to print, none wider than ``width`` as far as names allow."""
    made = [
        *_means(matrix, width),
        *_domains(matrix, width),
        *_worst(matrix),
        *_differences(matrix, width),
        *_costs(matrix),
        *_choices(matrix, width),
    ]
    return [table for table in made if table.row_count]


def score(matrix: Matrix, variant: str, column: str) -> Interval | None:
    """Return a number of a variant: the mean over its runs with their interval, or of one run that over its units."""
    if variant in matrix.variants:
        return matrix.variants[variant].get(column)
    row = next(row for row in matrix.rows if row.variant == variant)
    value = row.cells.get(column)
    return row.interval(column) or (None if value is None else Interval(value, math.nan, math.nan, 1))


def _names(matrix: Matrix) -> dict[str, str]:
    """Variants by what to show: without the system, where all are of one."""
    found = dict.fromkeys(row.variant for row in matrix.rows)
    systems = {name.partition("/")[0] for name in found}
    return {name: name.partition("/")[2] if len(systems) == 1 and "/" in name else name for name in found}


def _means(matrix: Matrix, width: int) -> list[Table]:
    names, known = _names(matrix), [column for column in MEANS if column in matrix.columns]
    runs = {name: sum(row.variant == name for row in matrix.rows) for name in names}
    system = next(iter(names)).partition("/")[0]
    better = "larger" if matrix.direction == "max" else "smaller"
    units = any(row.intervals for row in matrix.rows)
    spread = "; 95 % over seeds" if matrix.variants else "; 95 % over test units" if units else ""

    def rows(form: Form, columns: list[str]) -> list[list[str]]:
        return [[names[n], str(runs[n]), *(form_of(form, score(matrix, n, c)) for c in columns)] for n in names]

    def head(columns: list[str]) -> list[str]:
        return ["variant", "runs", *(_SHORT.get(column, column) for column in columns)]

    # Where intervals and the gap have no room together, the gap is the reader's to take.
    without = [column for column in known if column != "gap"]
    fits = [c for c in (known, without) for form in (bracketed, plus_minus) if _wide(head(c), rows(form, c)) <= width]
    columns = fits[0] if fits else known
    title = f"{system}: {matrix.metric} ({better} is better{spread})"
    return fitted(lambda form: rows(form, columns), head(columns), title, width)


def _domains(matrix: Matrix, width: int) -> list[Table]:
    names = _names(matrix)
    head = ["domain", "role", *names.values()]
    return fitted(
        lambda form: [
            [domain, role, *(form_of(form, score(matrix, name, domain)) for name in names)]
            for domain, role in matrix.roles.items()
        ],
        head,
        f"{matrix.metric} by domain",
        width,
        left=2,
    )


def _worst(matrix: Matrix) -> list[Table]:
    """The domain that is worst in most runs of a variant, and the interval of what is worst in each."""
    if sum(role == "unseen" for role in matrix.roles.values()) < 2:
        return []
    rows = []
    for name, shown in _names(matrix).items():
        found, own = score(matrix, name, "worst unseen"), [row.worst for row in matrix.rows if row.variant == name]
        if found is None or not any(own):
            continue
        often = max(dict.fromkeys(filter(None, own)), key=own.count)
        over = f"{len(own)} seeds" if name in matrix.variants else f"{found.n} test units" if found.n > 1 else "-"
        rows.append([shown, often, f"{own.count(often)} of {len(own)}", bracketed(found), over])
    head = ["variant", "worst domain", "in runs", "worst unseen", "interval over"]
    return [_table(head, rows, f"the worst unseen domain ({matrix.metric})")]


def _differences(matrix: Matrix, width: int) -> list[Table]:
    if not matrix.differences:
        return []
    names, words = _names(matrix), {True: "better", False: "worse", None: "open"}
    told = [d for d in matrix.differences if d.column in ("mean seen", "mean unseen", "worst unseen")]
    head = ["variant", "of", "difference", "pairs", "verdict"]

    def rows(form: Form) -> list[list[str]]:
        return [
            [
                *(names[d.variant], _SHORT.get(d.column, d.column), _signed(form, d.interval)),
                f"{d.interval.n} {d.over}" if d.interval.n else "1 run",
                words[d.better] if d.over == "seeds" else "none: one seed",
            ]
            for d in told
        ]

    base = matrix.differences[0].baseline
    return fitted(rows, head, f"difference to {names.get(base, base)} (95 %, paired)", width)


def _costs(matrix: Matrix) -> list[Table]:
    head, rows = cost_cells(matrix)
    names = _names(matrix)
    short = {
        "parameters": "params",
        "active parameters": "active",
        "FLOPs a token": "FLOPs/token",
        "training FLOPs": "train FLOPs",
        "of the baseline's": "x baseline",
    }
    shown = [[names.get(row[0], row[0]), *row[1:]] for row in rows]
    return [_table([short.get(word, word) for word in head], shown, "parameters and compute")]


def _choices(matrix: Matrix, width: int) -> list[Table]:
    names = _names(matrix)

    def rows(form: Form) -> list[list[str]]:
        return [
            [
                choice.rule,
                choice.note or ", ".join(f"{names[name]} ({count})" for name, count in choice.chosen.items()),
                *(form_of(form, choice.unseen), form_of(form, choice.worst)),
            ]
            for choice in matrix.choices
        ]

    head = ["chosen by", "variant (seeds)", "unseen", "worst unseen"]
    return fitted(rows, head, "what choosing among these runs comes to (95 % over seeds)", width)


# Forms of a number -----------------------------------------------------------------------------------------------


def bracketed(interval: Interval) -> str:
    """``0.4638 [0.4188, 0.5113]``."""
    mean = number(interval)
    return mean if math.isnan(interval.low) else f"{mean} [{interval.low:.4f}, {interval.high:.4f}]"


def plus_minus(interval: Interval) -> str:
    """``0.464 ±0.046``: half the width of the interval."""
    if math.isnan(interval.mean) or math.isnan(interval.low):
        return number(interval)
    return f"{interval.mean:.3f} ±{(interval.high - interval.low) / 2:.3f}"


def number(interval: Interval) -> str:
    """``0.4638``."""
    return "-" if math.isnan(interval.mean) else f"{interval.mean:.4f}"


def form_of(form: Form, interval: Interval | None) -> str:
    """Return a number in a form; nothing where there is none."""
    return "" if interval is None else form(interval)


def _signed(form: Form, interval: Interval) -> str:
    text = form(interval)
    return text if text.startswith("-") else f"+{text}"


# Width -----------------------------------------------------------------------------------------------------------


def fitted(rows: Rows, head: Sequence[str], title: str, width: int, left: int = 0) -> list[Table]:
    """Return a table in the richest form that fits; with ``left`` columns kept, several tables where none does."""
    found = next((form for form in (bracketed, plus_minus, number) if _wide(head, rows(form)) <= width), None)
    if found is not None or not left or len(head) < left + 2:
        return [_table(head, rows(found or number), title)]
    parts: list[list[int]] = [[]]
    lines = rows(number)
    for column in range(left, len(head)):
        keep = [*range(left), *parts[-1], column]
        if parts[-1] and _wide([head[i] for i in keep], [[row[i] for i in keep] for row in lines]) > width:
            parts.append([])
        parts[-1].append(column)
    tables: list[Table] = []
    for part in parts:
        keep = [*range(left), *part]
        told = f"{title}, continued" if tables else title
        tables.append(_table([head[i] for i in keep], [[row[i] for i in keep] for row in lines], told))
    return tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(
        title=Text(plain(title), style="table.title"),
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, name in enumerate(head):
        table.add_column(Text(plain(name, _LONGEST)), justify="right" if i else "left", overflow="fold")
    for row in rows:
        # Text, not str: names in brackets are no markup.
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


def _wide(head: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Characters of a line: columns as wide as their widest cell, two blanks between."""
    columns = zip(*([plain(cell) for cell in line] for line in (head, *rows)), strict=True)
    return sum(2 + max(map(cell_len, column)) for column in columns) - 2
