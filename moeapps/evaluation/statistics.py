# SPDX-License-Identifier: Apache-2.0
"""Intervals and verdicts: what a handful of paired runs can and cannot show.

Two kinds of uncertainty are kept apart. *Between runs* (other seeds, other generated data) the interval is a paired t
over the per-seed differences. *Within one run* (other test units of the same kind) it is a seeded percentile bootstrap
over test units. Nothing here needs torch, so a verdict can be recomputed from a results file anywhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Rule = Literal["superiority", "non-inferiority", "exact", "median"]
Direction = Literal["higher", "lower", "equal"]
Verdict = Literal["supported", "not supported", "inconclusive"]

RULES: tuple[Rule, ...] = ("superiority", "non-inferiority", "exact", "median")
DIRECTIONS: tuple[Direction, ...] = ("higher", "lower", "equal")


@dataclass(frozen=True)
class Interval:
    """A mean with a two-sided confidence interval.

    Args:
        mean: Point estimate, in the units of the data.
        low: Lower end.
        high: Upper end.
        n: Number of observations it rests on.
    """

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Judgement:
    """What a rule says about paired results: the interval of ``system - baseline`` and the verdict.

    The interval is never turned round: with ``direction="lower"`` a better system shows a negative difference. It is
    None for the rules ``exact`` and ``median``, which make no statement about runs that were not made; for ``median``
    ``diff_mean`` is the median of the differences. ``p`` belongs to the interval: two-sided, of a true difference right
    at the bar of the rule, so that a verdict of 95 per cent is one of p below 0.05.
    """

    diff_mean: float
    interval: Interval | None
    verdict: Verdict
    p: float | None = None


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Give the mean of independent values with its t interval: mean ± t(ν=n−1)·s/√n.

    Args:
        values: At least two finite numbers, one per run.
        confidence: Two-sided coverage in (0, 1).

    Raises:
        ValueError: If there are fewer than two values, one is not finite, or the confidence is not inside (0, 1).
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence}: an interval needs a coverage strictly between 0 and 1")
    data = _finite(values, "values")
    n = len(data)
    if n < 2:
        raise ValueError(f"{n} value(s): an interval between runs needs at least two; add seeds")
    mean = math.fsum(data) / n
    # Two passes: equal values give a width of exactly zero, and no cancellation for values far from zero.
    var = math.fsum((v - mean) ** 2 for v in data) / (n - 1)
    from scipy.special import stdtrit  # a run that only writes results starts without scipy

    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * math.sqrt(var / n)
    return Interval(mean, mean - half, mean + half, n)


def t_p_value(values: Sequence[float], mean: float = 0.0) -> float:
    """Give the two-sided p of a t test: how often values of this true mean lie as far from it as these, or farther.

    Args:
        values: At least two finite numbers, one per run.
        mean: What is tested.

    Raises:
        ValueError: If there are fewer than two values or one is not finite.
    """
    interval = t_interval(values)
    spread = statistics.stdev(values)
    if spread == 0.0:
        return 1.0 if interval.mean == mean else 0.0
    from scipy.special import stdtr

    return float(2 * stdtr(interval.n - 1, -abs(interval.mean - mean) / spread * math.sqrt(interval.n)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for how many there are (Holm): below 0.05 at once, not one by one, errs in 5 of 100 families.

    Args:
        p_values: One per test, in any order; the same order comes back.
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def cluster_means(values: Sequence[float], clusters: Sequence[Hashable]) -> list[float]:
    """Give the mean of each cluster, in the order in which clusters first appear.

    Runs that share their data are not independent. Averaged within a cluster, the means are (each cluster drawn anew),
    and a t interval over them holds whatever the correlation inside.

    Args:
        values: One number per run.
        clusters: For each run the cluster it belongs to, say the seed of its data.

    Raises:
        ValueError: If the lengths differ.
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values for {len(clusters)} clusters: give each value its cluster")
    members: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        members.setdefault(cluster, []).append(value)
    return [math.fsum(found) / len(found) for found in members.values()]


def paired_t_interval(
    system: Sequence[float],
    baseline: Sequence[float],
    confidence: float = 0.95,
    *,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Give the mean of ``system - baseline`` with its t interval over pairs (same seed, same data).

    Args:
        system: One number per seed.
        baseline: One number per seed, in the same order.
        confidence: Two-sided coverage in (0, 1).
        clusters: Cluster of each pair; differences are averaged within clusters first. None: every pair is its own.

    Raises:
        ValueError: If the lengths differ, there are fewer than two pairs or clusters, or a value is not finite.
    """
    differences = _differences(system, baseline)
    return t_interval(differences if clusters is None else cluster_means(differences, clusters), confidence)


def bootstrap_interval(
    units: NDArray[Any] | Sequence[float],
    statistic: Callable[[NDArray[Any]], float] | None = None,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Give a statistic of the test units of ONE run with its percentile bootstrap interval.

    Whole units (a scan, a clip, a user, a trajectory) are drawn with replacement: rows inside a unit are not
    independent. For the difference of two models tested on the same units give an array with one row per unit and a
    statistic that subtracts.

    Args:
        units: ``[U]`` or ``[U, ...]``, one entry per test unit, at least two.
        statistic: Function of a resampled array of the same shape; the mean of all entries when None.
        resamples: Number of bootstrap samples, at least 100.
        confidence: Two-sided coverage in (0, 1).
        seed: Seed of the drawing; the same seed gives the same interval.

    Raises:
        ValueError: If there are fewer than two units or fewer than 100 resamples.
    """
    data = np.asarray(units)
    if data.ndim == 0 or len(data) < 2:
        raise ValueError(
            f"shape {data.shape}: a bootstrap over test units needs at least two units along the first axis"
        )
    if resamples < 100:
        raise ValueError(f"resamples={resamples}: percentiles of fewer than 100 samples mean nothing; use 1000 or more")
    compute = statistic if statistic is not None else _mean
    generator = np.random.default_rng(seed)
    draws = np.array([compute(data[generator.integers(0, len(data), len(data))]) for _ in range(resamples)])
    # A sample that happens to hold nothing to score has no value, and does not make the interval undefined.
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return Interval(float(compute(data)), math.nan, math.nan, len(data))
    low, high = np.quantile(draws, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(compute(data)), float(low), float(high), len(data))


def judge(
    system: Sequence[float],
    baseline: Sequence[float],
    *,
    rule: Rule,
    direction: Direction,
    margin: float = 0.0,
    confidence: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Judgement:
    """Apply a rule, fixed before the runs, to paired results.

    With gain g = system − baseline (or its negative when lower is better) and [lo, hi] its interval:

    * ``superiority``: supported if lo > margin, not supported if hi ≤ margin, else inconclusive.
    * ``non-inferiority``: supported if lo > −margin, not supported if hi ≤ −margin, else inconclusive.
    * ``exact``: no interval. Direction ``equal``: supported if ``|system − baseline| ≤ margin`` in every pair.
      Direction ``higher`` or ``lower``: supported if g > margin in every pair. Otherwise not supported.
    * ``median``: no interval. Supported if the median of g over the pairs is at least the margin, else not supported:
      a bar for a number whose outliers are known to be large.

    Args:
        system: One number per seed.
        baseline: One number per seed, in the same order.
        rule: One of `RULES`.
        direction: Which way is better; ``equal`` is for the rule ``exact`` alone.
        margin: Not negative, in the units of the metric; non-inferiority needs one above zero.
        confidence: Two-sided coverage of the interval.
        clusters: Cluster of each pair, see `paired_t_interval`; the rule ``exact`` looks at every pair all the same.

    Raises:
        ValueError: For an unknown rule or direction, a margin that the rule does not allow, or unusable numbers.
    """
    check_rule(rule, direction, margin)
    differences = _differences(system, baseline)
    if rule == "exact":
        sign = -1.0 if direction == "lower" else 1.0
        holds = all(abs(d) <= margin if direction == "equal" else sign * d > margin for d in differences)
        return Judgement(math.fsum(differences) / len(differences), None, "supported" if holds else "not supported")
    if rule == "median":
        middle = statistics.median(differences)
        reached = (-middle if direction == "lower" else middle) >= margin
        return Judgement(middle, None, "supported" if reached else "not supported")
    values = differences if clusters is None else cluster_means(differences, clusters)
    interval = t_interval(values, confidence)
    low, high = (-interval.high, -interval.low) if direction == "lower" else (interval.low, interval.high)
    bar = margin if rule == "superiority" else -margin
    verdict: Verdict = "supported" if low > bar else "not supported" if high <= bar else "inconclusive"
    return Judgement(interval.mean, interval, verdict, t_p_value(values, -bar if direction == "lower" else bar))


def check_rule(rule: str, direction: str, margin: float) -> None:
    """Check that rule, direction and margin go together.

    Raises:
        ValueError: If they do not; the text says what is allowed.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: allowed are {', '.join(RULES)}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r}: allowed are {', '.join(DIRECTIONS)}")
    if direction == "equal" and rule != "exact":
        raise ValueError(
            f"direction='equal' with rule={rule!r}: only the rule 'exact' tests equality; say higher or lower"
        )
    if not (math.isfinite(margin) and margin >= 0.0):
        raise ValueError(f"margin={margin}: give a finite number that is not negative, in the units of the metric")
    if rule == "non-inferiority" and margin == 0.0:
        raise ValueError("margin=0 with rule='non-inferiority': give the loss you would accept, or use 'superiority'")


def _differences(system: Sequence[float], baseline: Sequence[float]) -> list[float]:
    left, right = _finite(system, "system"), _finite(baseline, "baseline")
    if len(left) != len(right) or not left:
        raise ValueError(f"{len(left)} system and {len(right)} baseline values: pairs need one of each per seed")
    return [a - b for a, b in zip(left, right, strict=True)]


def _finite(values: Sequence[float], what: str) -> list[float]:
    data = [float(v) for v in values]
    if not all(math.isfinite(v) for v in data):
        raise ValueError(f"{what}={data}: every value must be finite; look at the log of the run that gave this one")
    return data


def _mean(units: NDArray[Any]) -> float:
    return float(units.mean())
