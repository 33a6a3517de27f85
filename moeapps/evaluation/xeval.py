# SPDX-License-Identifier: Apache-2.0
"""The seen/unseen matrix: runs by domains, with averages, worst case, gap, intervals and paired differences.

Intervals answer two questions that are kept apart: over TEST UNITS of one run (seeded bootstrap: would other test items
change the number?) and over SEEDS of one variant (t: would another training run?). Differences to a baseline are
paired: over common seeds where there are at least two, else over the units of the one pair of runs, which says nothing
about another training and therefore gives no verdict. Every number is of one score: that of the table.

Runs are one variant where the same was run, seeds apart (see ``RunResults.identity``), whatever they are called.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeapps.evaluation.choices import Choice
from moeapps.evaluation.compute import Cost, costs
from moeapps.evaluation.remarks import conclusion, different_data, different_domains
from moeapps.evaluation.results import Direction, RunResults
from moeapps.evaluation.statistics import Interval, paired_t_interval, t_interval
from moeapps.evaluation.units import Floats, plain_parts, pooled_score, score_draws
from moeapps.evaluation.variants import Variant, check_runs, one_of_each, pair_keys, variants_of

ROLES = ("seen", "validation", "unseen")


@dataclass(frozen=True)
class Row:
    """One run in the matrix.

    Args:
        run: the run folder.
        variant: name of its variant.
        seed: seed of the run.
        cells: column -> value; columns are domains, ``mean <role>``, ``worst unseen`` and ``gap``.
        intervals: domain -> the same value with its interval over test units, where units tell it.
        worst: the unseen domain with the worst score.
    """

    run: Path
    variant: str
    seed: int | None
    cells: dict[str, float]
    intervals: dict[str, Interval]
    worst: str | None = None

    def interval(self, column: str) -> Interval | None:
        """Return a value with its interval over test units; of ``worst unseen`` that of the domain which is it."""
        return self.intervals.get(self.worst or "" if column == "worst unseen" else column)


@dataclass(frozen=True)
class Difference:
    """Variant minus baseline in one column.

    Args:
        variant: name of the compared variant.
        baseline: that of the baseline.
        column: column of the matrix.
        interval: mean difference of the values of the table with its 95 percent interval (NaN where there is none).
        over: ``seeds`` (paired t) or ``units`` (paired bootstrap within one pair of runs).
        better: over seeds, whether the whole interval lies on the better side (True), on the worse (False), or neither
            (None); one pair of runs always gives None.
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
        notes: what a reader of the numbers must know: other test data, means over other domains, missing pairs.
        costs: parameters and compute of every variant.
        choices: what rules of choosing among the runs come to, where it was asked for.
    """

    metric: str
    direction: Direction
    roles: dict[str, str]
    rows: list[Row]
    variants: dict[str, dict[str, Interval]]
    differences: list[Difference]
    notes: list[str] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

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
            "costs": [asdict(cost) for cost in self.costs],
            "choices": [asdict(choice) for choice in self.choices],
            "notes": self.notes,
            "conclusion": conclusion(self.metric, self.differences),
        }


def build_matrix(runs: Sequence[RunResults], baseline: Sequence[RunResults] = (), metric: str | None = None) -> Matrix:
    """Put runs side by side.

    Args:
        runs: results to compare, at least one.
        baseline: results of the variant that differences are taken to; shown as well.
        metric: name of the metric; None takes the main metric of the first run.

    Raises:
        ValueError: no run, runs of several systems, a run without the metric or without training, two runs of one seed
            or a run and its continuation.
    """
    if not runs:
        raise ValueError("no run given; name at least one run folder")
    systems = sorted({str(run.header.get("system")) for run in (*runs, *baseline)})
    if len(systems) > 1:
        raise ValueError(f"the runs are of several systems ({', '.join(systems)}); give runs of one")
    runs, baseline = one_of_each(runs, baseline)
    every = list({run.path: run for run in (*runs, *baseline)}.values())
    check_runs(every)
    chosen = metric or str(runs[0].header.get("main_metric") or next(iter(runs[0].values)))
    for run in every:
        if chosen not in run.values:
            raise ValueError(f"{run.path} has no metric {chosen!r}; it has {', '.join(run.values)}")
    direction = runs[0].directions[chosen]
    found = {domain: role for run in every for domain, role in run.roles.items()}
    roles = {domain: role for wanted in ROLES for domain, role in found.items() if role == wanted}
    variants = variants_of(every)
    rows = [
        _row(run, variant.name, chosen)
        for run in every
        for variant in variants
        if any(run is own for own in variant.runs)
    ]
    notes = [*different_data(every), *different_domains(every, chosen)]
    differences = compare(variants, baseline, chosen, direction, notes) if baseline else []
    return Matrix(chosen, direction, roles, rows, _variants(rows), differences, notes, costs(runs, baseline))


def _row(run: RunResults, variant: str, metric: str) -> Row:
    found = cells(run, metric)
    worst = next(
        (d for d, role in run.roles.items() if role == "unseen" and found.get(d) == found.get("worst unseen")), None
    )
    return Row(run.path, variant, run.seed, found, unit_intervals(run, metric), worst)


def cells(run: RunResults, metric: str, only: set[str] | None = None) -> dict[str, float]:
    """Return the columns of one run: domains, means over roles, the worst unseen domain, and the gap.

    The gap says how much worse unseen domains are than seen ones, whatever the metric's direction.

    Args:
        run: the results.
        metric: which score.
        only: domains that count; None for all. A domain whose score is not defined never does.
    """
    values = {domain: v for domain, v in run.values[metric].items() if only is None or domain in only}
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


def unit_parts(run: RunResults, metric: str) -> dict[str, Floats]:
    """Return domain -> parts [U, G, 3] of two or more units, where they add up to the score of the table.

    Values per unit whose mean is another score (each unit scored alone, or a median) are left out: an interval about
    another number would contradict the table.
    """
    found = {domain: np.asarray(rows, dtype=np.float64) for domain, rows in run.parts.get(metric, {}).items()}
    for domain, numbers in run.units.get(metric, {}).items():
        found.setdefault(domain, plain_parts(numbers))
    return {
        domain: parts
        for domain, parts in found.items()
        if len(parts) >= 2 and _same(float(pooled_score(parts.sum(0))), run.values[metric].get(domain, math.nan))
    }


def unit_intervals(run: RunResults, metric: str) -> dict[str, Interval]:
    """Return domain -> the score with its bootstrap interval over test units, where units are stored."""
    out = {}
    for domain, parts in unit_parts(run, metric).items():
        out[domain] = _interval(run.values[metric][domain], score_draws(parts, seed=_seed(domain)), len(parts))
    return out


def compare(
    variants: Sequence[Variant],
    baseline: Sequence[RunResults],
    metric: str,
    direction: Direction,
    notes: list[str],
) -> list[Difference]:
    """Return the paired differences of every variant to the baseline, column by column.

    Args:
        variants: all runs, the baseline's among them.
        baseline: runs of one variant.
        metric: which score.
        direction: whether larger is better.
        notes: gains a line for a variant that shares no seed with the baseline.

    Raises:
        ValueError: the baseline holds runs of several variants, or runs of its own variant that it was not given; or
            seeds do not say which runs are pairs.
    """
    paths = {run.path.resolve() for run in baseline}
    bases = [variant for variant in variants if any(run.path.resolve() in paths for run in variant.runs)]
    if len(bases) > 1:
        raise ValueError(
            f"the baseline mixes the variants {', '.join(sorted(v.name for v in bases))}; give runs of one variant"
        )
    left_out = [run for run in bases[0].runs if run.path.resolve() not in paths]
    if left_out:
        raise ValueError(
            f"{left_out[0].path} is the same variant as the baseline ({bases[0].name}), with another seed; give it as "
            "a baseline as well, or leave it out"
        )
    out: list[Difference] = []
    for variant in variants:
        if variant is bases[0]:
            continue
        keys = pair_keys([variant, bases[0]])
        base = {keys[run.path]: run for run in bases[0].runs}
        pairs = [(run, base[keys[run.path]]) for run in variant.runs if keys[run.path] in base]
        if not pairs:
            notes.append(
                f"{variant.name} and {bases[0].name} share no seed: their difference is that of the first run of each."
            )
            pairs = [(variant.runs[0], bases[0].runs[0])]
        over = "seeds" if len(pairs) >= 2 else "units"
        found = _over_seeds(pairs, metric) if over == "seeds" else _over_units(*pairs[0], metric)
        for column, interval in found.items():
            better = _better(interval, column, direction) if over == "seeds" else None
            out.append(Difference(variant.name, bases[0].name, column, interval, over, better))
    return out


def _over_seeds(pairs: Sequence[tuple[RunResults, RunResults]], metric: str) -> dict[str, Interval]:
    """Return column -> paired t interval over seeds."""
    both = [_common_cells(one, other, metric) for one, other in pairs]
    columns = [c for c in both[0][0] if all(math.isfinite(a.get(c, math.nan) - b.get(c, math.nan)) for a, b in both)]
    return {c: paired_t_interval([a[c] for a, _ in both], [b[c] for _, b in both]) for c in columns}


def _over_units(one: RunResults, other: RunResults, metric: str) -> dict[str, Interval]:
    """Return column -> the difference of two runs, with a paired bootstrap interval over units where all have some."""
    left, right = _common_cells(one, other, metric)
    parts = [unit_parts(run, metric) for run in (one, other)]
    shared = [d for d in parts[0] if d in parts[1] and parts[0][d].shape == parts[1][d].shape]
    draws = {d: np.subtract(*(score_draws(part[d], seed=_seed(d)) for part in parts)) for d in shared}
    counts = {d: len(parts[0][d]) for d in shared}
    for role in ROLES:
        own = [d for d, found in one.roles.items() if found == role and math.isfinite(left.get(d, math.nan))]
        own = [d for d in own if math.isfinite(right.get(d, math.nan))]
        if own and all(d in shared for d in own):
            draws[f"mean {role}"] = np.mean([draws[d] for d in own], axis=0)
            counts[f"mean {role}"] = sum(counts[d] for d in own)
    if "mean seen" in draws and "mean unseen" in draws:
        sign = 1.0 if one.directions[metric] == "max" else -1.0
        draws["gap"] = sign * (draws["mean seen"] - draws["mean unseen"])
        counts["gap"] = counts["mean seen"] + counts["mean unseen"]
    finite = [c for c in left if math.isfinite(left[c] - right.get(c, math.nan))]
    return {c: _interval(left[c] - right[c], draws.get(c), counts.get(c, 0)) for c in finite}


def _common_cells(one: RunResults, other: RunResults, metric: str) -> tuple[dict[str, float], dict[str, float]]:
    """The columns of two runs over the domains where both have a score: means over other domains do not compare."""
    left, right = one.values[metric], other.values[metric]
    both = {d for d in left if not math.isnan(left[d]) and not math.isnan(right.get(d, math.nan))}
    return cells(one, metric, both), cells(other, metric, both)


def _interval(value: float, draws: Floats | None, n: int) -> Interval:
    """The value with the interval of its draws; NaN where there are none."""
    known = np.empty(0) if draws is None else draws[np.isfinite(draws)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return Interval(value, float(low), float(high), n)


def _seed(domain: str) -> int:
    return zlib.crc32(domain.encode())


def _same(a: float, b: float) -> bool:
    """Whether two numbers are the same score up to rounding in single precision."""
    return math.isfinite(a) and abs(a - b) <= 1e-4 * max(abs(b), 1e-8)


def _better(interval: Interval, column: str, direction: Direction) -> bool | None:
    # A smaller gap is better whatever the metric.
    sign = -1.0 if column == "gap" or direction == "min" else 1.0
    low, high = sorted((sign * interval.low, sign * interval.high))
    return True if low > 0 else False if high < 0 else None


def _variants(rows: Sequence[Row]) -> dict[str, dict[str, Interval]]:
    """Return variant -> column -> mean over runs with a t interval, for variants of two or more runs."""
    out: dict[str, dict[str, Interval]] = {}
    for variant in dict.fromkeys(row.variant for row in rows):
        group = [row.cells for row in rows if row.variant == variant]
        if len(group) >= 2:
            common = [c for c in group[0] if all(math.isfinite(cell.get(c, math.nan)) for cell in group)]
            out[variant] = {column: t_interval([cell[column] for cell in group]) for column in common}
    return out
