# SPDX-License-Identifier: Apache-2.0
"""Who won where, in plain English: means over roles of the variants of a system, and what their spread allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeapps.evaluation.statistics import Interval, t_interval
from moeapps.evaluation.xeval import ROLES, Matrix


@dataclass(frozen=True)
class Standing:
    """Variants on the domains of one role, the best first.

    Args:
        role: ``seen``, ``validation`` or ``unseen``.
        variants: name, mean over its runs (with a t interval where there are two or more), number of runs.
    """

    role: str
    variants: tuple[tuple[str, Interval, int], ...]


def standings(matrix: Matrix) -> list[Standing]:
    """Return the standing of each role that is scored."""
    found = []
    for role in ROLES:
        values: dict[str, list[float]] = {}
        for row in matrix.rows:
            value = row.cells.get(f"mean {role}", math.nan)
            if math.isfinite(value):
                values.setdefault(row.variant, []).append(value)
        if values:
            sign = -1.0 if matrix.direction == "max" else 1.0
            each = [(name, _interval(own), len(own)) for name, own in values.items()]
            found.append(Standing(role, tuple(sorted(each, key=lambda one: sign * one[1].mean))))
    return found


def sentences(matrix: Matrix) -> list[str]:
    """Say who is best on the domains of each role, and whether that can be luck; of one variant, how it does."""
    found = standings(matrix)
    if not found:
        return [f"{matrix.metric} is not defined on any domain of these runs."]
    if len({name for one in found for name, _, _ in one.variants}) < 2:
        return [_alone(matrix, found)]
    return [_best(matrix, one) for one in found if len(one.variants) > 1]


def in_short(matrix: Matrix) -> str:
    """The same for a tile that shows the means beside it: who is best where, or how far unseen domains are off."""
    found = standings(matrix)
    names = {name for one in found for name, _, _ in one.variants}
    if len(names) < 2:
        return _gap(matrix, found)
    told: dict[str, list[str]] = {}
    for one in found:
        if len(one.variants) > 1:
            (name, best, runs), (_, second, others), *_ = one.variants
            told.setdefault(f"{name} ({_luck(best, second, runs, others)})", []).append(one.role)
    text = "; ".join(f"best on {', '.join(roles)} domains: {name}" for name, roles in told.items())
    return f"{text[:1].upper()}{text[1:]}."


def _gap(matrix: Matrix, found: Sequence[Standing]) -> str:
    means = {one.role: one.variants[0][1].mean for one in found}
    if not {"seen", "unseen"} <= set(means):
        return ""
    gap = (means["seen"] - means["unseen"]) * (1 if matrix.direction == "max" else -1)
    return f"Unseen domains are {'worse' if gap > 0 else 'better'} than seen ones by {number(abs(gap))}."


def _alone(matrix: Matrix, found: Sequence[Standing]) -> str:
    means = {one.role: one.variants[0][1].mean for one in found}
    told = ", ".join(f"{number(value)} on {role} domains" for role, value in means.items())
    better = "larger" if matrix.direction == "max" else "smaller"
    text = f"{matrix.metric} ({better} is better): {told}"
    return f"{text}. {_gap(matrix, found)}".strip()


def _best(matrix: Matrix, standing: Standing) -> str:
    (name, best, runs), (other, second, others), *rest = standing.variants
    lead = f"On {standing.role} domains {name} is best: {matrix.metric} {number(best.mean)}"
    against = f"{number(second.mean)} of {other}" + (f", the next of {len(rest) + 1} others" if rest else "")
    return f"{lead} against {against} ({_luck(best, second, runs, others)})."


def _luck(best: Interval, second: Interval, runs: int, others: int) -> str:
    if best.mean == second.mean:
        return "a tie"
    if min(runs, others) < 2:
        return "one seed decides nothing"
    apart = best.low > second.high or best.high < second.low
    return "beyond the spread over seeds" if apart else "within the spread over seeds"


def _interval(values: Sequence[float]) -> Interval:
    return t_interval(list(values)) if len(values) > 1 else Interval(values[0], math.nan, math.nan, 1)


def number(value: float) -> str:
    """A number as the page shows it: four significant digits, thousands apart."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.3g}"
