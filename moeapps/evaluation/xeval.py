# SPDX-License-Identifier: Apache-2.0
"""The seen/unseen matrix: runs by domains, with averages, worst case, gap, intervals and paired differences.

Intervals answer two questions that are kept apart: over TEST UNITS of one run (seeded bootstrap: would other test items
change the number?) and over SEEDS of one variant (t: would another training run?). Differences to a baseline are
paired: over common seeds where there are at least two, else over the units of the one pair of runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeapps.evaluation.results import Direction, RunResults
from moeapps.evaluation.statistics import Interval, bootstrap_interval, paired_t_interval, t_interval

ROLES = ("seen", "validation", "unseen")


@dataclass(frozen=True)
class Row:
    """One run in the matrix.

    Args:
        run: the run folder.
        variant: ``system/name``.
        seed: seed of the run.
        cells: column -> value; columns are domains, ``mean <role>``, ``worst unseen`` and ``gap``.
        intervals: domain -> interval of the mean over test units (per-unit values need not average to the metric).
    """

    run: Path
    variant: str
    seed: int | None
    cells: dict[str, float]
    intervals: dict[str, Interval]


@dataclass(frozen=True)
class Difference:
    """Variant minus baseline in one column.

    Args:
        variant: ``system/name`` of the compared runs.
        baseline: that of the baseline.
        column: column of the matrix.
        interval: mean difference with its 95 percent interval.
        over: ``seeds`` (paired t) or ``units`` (paired bootstrap within one pair of runs).
        better: whether the whole interval lies on the better side (True), on the worse (False), or neither (None).
    """

    variant: str
    baseline: str
    column: str
    interval: Interval
    over: str
    better: bool | None


@dataclass(frozen=True)
class Matrix:
    """Runs by columns for one metric.

    Args:
        metric: its name.
        direction: ``max`` where larger is better, else ``min``.
        roles: domain -> role, seen first.
        rows: one per run.
        variants: variant -> column -> mean over its runs with a t interval (two or more runs).
        differences: to the baseline, if one was given.
    """

    metric: str
    direction: Direction
    roles: dict[str, str]
    rows: list[Row]
    variants: dict[str, dict[str, Interval]]
    differences: list[Difference]

    @property
    def columns(self) -> list[str]:
        """Domains, then means over roles, worst unseen, gap - those that some run has."""
        every = [*self.roles, *(f"mean {role}" for role in ROLES), "worst unseen", "gap"]
        return [column for column in every if any(column in row.cells for row in self.rows)]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "metric": self.metric,
            "direction": self.direction,
            "domains": [{"name": name, "role": role} for name, role in self.roles.items()],
            "rows": [{**asdict(row), "run": str(row.run)} for row in self.rows],
            "variants": {name: {c: asdict(i) for c, i in cells.items()} for name, cells in self.variants.items()},
            "differences": [asdict(difference) for difference in self.differences],
        }


def build_matrix(runs: Sequence[RunResults], baseline: Sequence[RunResults] = (), metric: str | None = None) -> Matrix:
    """Put runs side by side.

    Args:
        runs: results to compare, at least one.
        baseline: results of the variant that differences are taken to; shown as well.
        metric: name of the metric; None takes the main metric of the first run.

    Raises:
        ValueError: no run, runs of several systems, or a run without the metric.
    """
    if not runs:
        raise ValueError("no run given; name at least one run folder")
    systems = sorted({str(run.header.get("system")) for run in (*runs, *baseline)})
    if len(systems) > 1:
        raise ValueError(f"the runs are of several systems ({', '.join(systems)}), which share no domains; give one's")
    every = [*runs, *(run for run in baseline if run.path not in {other.path for other in runs})]
    chosen = metric or str(runs[0].header.get("main_metric") or next(iter(runs[0].values)))
    for run in every:
        if chosen not in run.values:
            raise ValueError(f"{run.path} has no metric {chosen!r}; it has {', '.join(run.values)}")
    direction = runs[0].directions[chosen]
    found = {domain: role for run in every for domain, role in run.roles.items()}
    roles = {domain: role for wanted in ROLES for domain, role in found.items() if role == wanted}
    rows = [Row(run.path, run.variant, run.seed, cells(run, chosen), unit_intervals(run, chosen)) for run in every]
    differences = compare(runs, baseline, chosen, direction) if baseline else []
    return Matrix(chosen, direction, roles, rows, _variants(rows), differences)


def cells(run: RunResults, metric: str) -> dict[str, float]:
    """Return the columns of one run: domains, means over roles, the worst unseen domain, and the gap.

    The gap says how much worse unseen domains are than seen ones, whatever the metric's direction.
    """
    values = run.values[metric]
    out = dict(values)
    for role in ROLES:
        numbers = [v for domain, v in values.items() if run.roles[domain] == role and not math.isnan(v)]
        if numbers:
            out[f"mean {role}"] = sum(numbers) / len(numbers)
            if role == "unseen":
                out["worst unseen"] = min(numbers) if run.directions[metric] == "max" else max(numbers)
    if "mean seen" in out and "mean unseen" in out:
        sign = 1.0 if run.directions[metric] == "max" else -1.0
        out["gap"] = sign * (out["mean seen"] - out["mean unseen"])
    return out


def unit_intervals(run: RunResults, metric: str) -> dict[str, Interval]:
    """Return domain -> bootstrap interval of the mean over test units, where two or more finite units are stored."""
    out = {}
    for domain, numbers in run.units.get(metric, {}).items():
        finite = [x for x in numbers if math.isfinite(x)]
        if len(finite) >= 2:
            out[domain] = bootstrap_interval(finite)
    return out


def compare(
    runs: Sequence[RunResults], baseline: Sequence[RunResults], metric: str, direction: Direction
) -> list[Difference]:
    """Return the paired differences of every variant to the baseline, column by column.

    Raises:
        ValueError: the baseline holds runs of several variants, or two runs of one seed.
    """
    names = sorted({run.variant for run in baseline})
    if len(names) > 1:
        raise ValueError(f"the baseline mixes the variants {', '.join(names)}; give the runs of one")
    base = _by_seed(baseline)
    out: list[Difference] = []
    others = [run for run in runs if run.path not in {run.path for run in baseline}]
    for variant in dict.fromkeys(run.variant for run in others):
        group = _by_seed([run for run in others if run.variant == variant])
        common = [seed for seed in group if seed in base]
        if len(common) >= 2:
            pairs = [(cells(group[s], metric), cells(base[s], metric)) for s in common]
            columns = [
                c for c in pairs[0][0] if all(math.isfinite(a.get(c, math.nan) - b.get(c, math.nan)) for a, b in pairs)
            ]
            found = {c: paired_t_interval([a[c] for a, _ in pairs], [b[c] for _, b in pairs]) for c in columns}
            over = "seeds"
        else:
            seed = common[0] if common else None
            one = group[seed] if seed is not None else next(iter(group.values()))
            other = base[seed] if seed is not None else next(iter(base.values()))
            found, over = _unit_differences(one, other, metric), "units"
        for column, interval in found.items():
            better = _better(interval, column, direction)
            out.append(Difference(variant, names[0], column, interval, over, better))
    return out


def _unit_differences(one: RunResults, other: RunResults, metric: str) -> dict[str, Interval]:
    """Return domain -> bootstrap interval of the mean paired difference over common test units."""
    found = {}
    for domain, left in one.units.get(metric, {}).items():
        right = other.units.get(metric, {}).get(domain, [])
        if len(left) == len(right):
            difference = np.asarray(left) - np.asarray(right)
            difference = difference[np.isfinite(difference)]
            if len(difference) >= 2:
                found[domain] = bootstrap_interval(difference)
    return found


def _better(interval: Interval, column: str, direction: Direction) -> bool | None:
    # A smaller gap is better whatever the metric.
    sign = -1.0 if column == "gap" or direction == "min" else 1.0
    low, high = sorted((sign * interval.low, sign * interval.high))
    return True if low > 0 else False if high < 0 else None


def _by_seed(runs: Sequence[RunResults]) -> dict[int | None, RunResults]:
    found: dict[int | None, RunResults] = {}
    for run in runs:
        if run.seed in found:
            raise ValueError(f"{run.path} and {found[run.seed].path} have seed {run.seed}; give one run per seed")
        found[run.seed] = run
    return found


def _variants(rows: Sequence[Row]) -> dict[str, dict[str, Interval]]:
    """Return variant -> column -> mean over runs with a t interval, for variants of two or more runs."""
    out: dict[str, dict[str, Interval]] = {}
    for variant in dict.fromkeys(row.variant for row in rows):
        group = [row.cells for row in rows if row.variant == variant]
        if len(group) >= 2:
            common = [c for c in group[0] if all(math.isfinite(cell.get(c, math.nan)) for cell in group)]
            out[variant] = {column: t_interval([cell[column] for cell in group]) for column in common}
    return out
