# SPDX-License-Identifier: Apache-2.0
"""The seen/unseen matrix as files for other programs: CSV in long form, a LaTeX table for a paper."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from moeapps.evaluation.statistics import Interval
from moeapps.evaluation.xeval import Matrix
from moeapps.text import plain

_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def csv_text(matrix: Matrix) -> str:
    """Return one line per number: of a run, of the mean over a variant's seeds, or of a difference to the baseline."""
    stream = io.StringIO()
    lines = csv.writer(stream, lineterminator="\n")
    lines.writerow(["kind", "variant", "run", "seed", "metric", "column", "value", "low", "high", "n"])
    for row in matrix.rows:
        for column, value in row.cells.items():
            bounds = row.interval(column)
            seed = "" if row.seed is None else row.seed
            ends = ["", "", ""] if bounds is None else _numbers(bounds)[1:]
            lines.writerow(["run", row.variant, row.run, seed, matrix.metric, column, _blank(value), *ends])
    for variant, cells in matrix.variants.items():
        for column, found in cells.items():
            lines.writerow(["mean", variant, "", "", matrix.metric, column, *_numbers(found)])
    for d in matrix.differences:
        lines.writerow(["difference", d.variant, d.baseline, "", matrix.metric, d.column, *_numbers(d.interval)])
    for cost in matrix.costs:
        for name, size in cost.sizes.items():
            lines.writerow(["cost", cost.variant, "", "", name, "", size, "", "", cost.runs])
    return stream.getvalue()


def latex_text(matrix: Matrix) -> str:
    r"""Return a table (``\usepackage{booktabs}``): variants, means over roles with intervals over seeds, compute."""
    columns = [c for c in matrix.columns if c.startswith("mean ") or c in ("worst unseen", "gap")]
    better = "larger" if matrix.direction == "max" else "smaller"
    comment = f"{matrix.metric}, {better} is better; +- is the 95 per cent t interval over seeds"
    rows = []
    for cost in matrix.costs:
        means = matrix.variants.get(cost.variant, {})
        alone = next(row.cells for row in matrix.rows if row.variant == cost.variant)
        shown = [_mean(means[c]) if c in means else _number(alone.get(c)) for c in columns]
        sizes = [_power(cost.sizes.get(name)) for name in ("params_total", "train_flops")]
        rows.append([cost.variant, str(cost.runs), *shown, *sizes])
    return latex_table(comment, ["variant", "runs", *columns, "parameters", "training FLOPs"], rows)


def latex_table(comment: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Return a table (``\usepackage{booktabs}``) with a comment; head and first column are text, the rest is LaTeX."""
    lines = [
        f"% {plain(comment)}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(map(_latex, head)) + r" \\",
        r"\midrule",
        *(" & ".join([_latex(row[0]), *row[1:]]) + r" \\" for row in rows),
    ]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def latex_interval(interval: Interval) -> str:
    r"""``0.4638 \pm 0.0463``, to stand in maths; the mean alone where there is no interval."""
    if math.isnan(interval.low):
        return r"\text{--}" if math.isnan(interval.mean) else f"{interval.mean:.4f}"
    return rf"{interval.mean:.4f} \pm {(interval.high - interval.low) / 2:.4f}"


def _numbers(interval: Interval) -> list[object]:
    return [_blank(interval.mean), _blank(interval.low), _blank(interval.high), interval.n]


def _blank(value: object) -> object:
    return "" if isinstance(value, float) and math.isnan(value) else value


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in plain(text))


def _mean(interval: Interval) -> str:
    return f"${latex_interval(interval)}$"


def _number(value: float | None) -> str:
    return "--" if value is None or math.isnan(value) else f"${value:.4f}$"


def _power(value: float | None) -> str:
    if value is None:
        return "--"
    digits, _, exponent = f"{value:.2e}".partition("e")
    return rf"${digits} \cdot 10^{{{int(exponent)}}}$"
