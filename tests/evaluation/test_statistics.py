# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moeapps.evaluation.statistics import (
    Direction,
    Rule,
    bootstrap_interval,
    cluster_means,
    holm,
    judge,
    paired_t_interval,
    t_interval,
    t_p_value,
)


def quantile(dof: int, confidence: float) -> float:
    """Half the width of the interval of dof + 1 values, in standard errors of the mean."""
    values = [float(v * v) for v in range(dof + 1)]
    interval = t_interval(values, confidence)
    return (interval.high - interval.low) / 2 / (np.std(values, ddof=1) / math.sqrt(dof + 1))


@pytest.mark.parametrize("dof", [*range(1, 13), 29, 30, 99, 1000])
def test_half_widths_equal_the_t_distribution_of_scipy(dof: int) -> None:
    for confidence in (0.1, 0.6, 0.9, 0.95, 0.99, 0.999):
        assert stats.t.cdf(quantile(dof, confidence), dof) == pytest.approx(0.5 + confidence / 2, rel=1e-11)
        assert quantile(dof, confidence) == pytest.approx(stats.t.ppf(0.5 + confidence / 2, dof), rel=1e-9)


def test_textbook_quantiles() -> None:
    assert quantile(1, 0.95) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-13)
    assert quantile(2, 0.95) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-13)
    assert quantile(7, 0.95) == pytest.approx(2.364624, abs=1e-6)


def test_paired_interval_equals_scipy_and_ignores_what_pairs_share() -> None:
    generator = np.random.default_rng(1)
    base = generator.normal(size=8)
    gain = 0.1 + 0.05 * generator.normal(size=8)
    ours = paired_t_interval((base + gain).tolist(), base.tolist())
    scipy = stats.ttest_rel(base + gain, base).confidence_interval(0.95)
    shifted = paired_t_interval((100 + base + gain).tolist(), (100 + base).tolist())

    assert (ours.low, ours.high) == pytest.approx((scipy.low, scipy.high), rel=1e-10)
    assert (shifted.low, shifted.high) == pytest.approx((ours.low, ours.high), abs=1e-12)
    assert ours.n == 8


def test_p_values_equal_scipy_and_agree_with_the_verdict_of_the_interval() -> None:
    generator = np.random.default_rng(3)
    rules: list[tuple[Rule, float, Direction]] = [("superiority", 0.0, "higher"), ("non-inferiority", 0.5, "lower")]
    for rule, margin, direction in rules * 40:
        base, gain = generator.normal(size=6), generator.normal(0.4, 0.6, size=6)
        found = judge((base + gain).tolist(), base.tolist(), rule=rule, direction=direction, margin=margin)
        assert found.p == pytest.approx(stats.ttest_1samp(gain, 0.0 if rule == "superiority" else 0.5).pvalue, rel=1e-9)
        assert (found.p < 0.05) == (found.verdict != "inconclusive")
    assert judge([1.0, 2.0], [1.0, 2.0], rule="exact", direction="equal").p is None
    assert (t_p_value([0.2, 0.2]), t_p_value([0.2, 0.2], 0.2)) == (0.0, 1.0)
    assert judge([1.0, 2.0, 9.0], [0.0, 0.0, 0.0], rule="superiority", direction="higher", clusters=[1, 1, 2]).p == (
        pytest.approx(stats.ttest_1samp([1.5, 9.0], 0.0).pvalue)
    )


def test_holm_multiplies_the_least_p_by_all_of_them_and_never_falls() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_equal_differences_give_an_interval_of_zero_width() -> None:
    interval = t_interval([0.25, 0.25, 0.25])
    assert (interval.low, interval.mean, interval.high) == (0.25, 0.25, 0.25)


def test_paired_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    samples = generator.normal(0.3, 1.0, size=(2000, 3))
    hits = [interval.low <= 0.3 <= interval.high for interval in map(t_interval, samples.tolist())]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


def test_bootstrap_is_seeded_and_agrees_with_the_normal_interval() -> None:
    units = np.random.default_rng(0).normal(2.0, 1.0, size=400)
    first, again, other = (bootstrap_interval(units, seed=s) for s in (3, 3, 4))
    half = 1.96 * units.std() / math.sqrt(400)

    assert first == again
    assert first != other
    assert first.mean == pytest.approx(units.mean())
    assert (first.low, first.high) == pytest.approx((units.mean() - half, units.mean() + half), abs=0.02)


def test_bootstrap_keeps_pairs_together() -> None:
    base = np.random.default_rng(0).normal(0.0, 50.0, size=60)
    units = np.stack([base + 1.0, base], axis=1)
    interval = bootstrap_interval(units, lambda u: float((u[:, 0] - u[:, 1]).mean()), resamples=200)
    assert (interval.low, interval.high) == pytest.approx((1.0, 1.0))


# Differences 1, 2, 3 have mean 2 and half-width 4.302653*1/sqrt(3) = 2.484138: the interval is [-0.484, 4.484].
CELLS = [
    # system, baseline, rule, direction, margin, verdict
    ([11, 12, 13], [10, 10, 10], "superiority", "higher", 0.0, "inconclusive"),
    ([11, 12, 13], [10, 10, 10], "non-inferiority", "higher", 0.5, "supported"),
    ([11, 12, 13], [10, 10, 10], "non-inferiority", "higher", 0.4, "inconclusive"),
    ([11, 12, 13], [10, 10, 10], "superiority", "higher", 4.5, "not supported"),
    ([9, 8, 7], [10, 10, 10], "non-inferiority", "lower", 0.5, "supported"),
    ([9, 8, 7], [10, 10, 10], "superiority", "lower", 0.0, "inconclusive"),
    ([5.0, 5.1, 5.2], [4.0, 4.0, 4.0], "superiority", "higher", 0.0, "supported"),
    ([5.0, 5.1, 5.2], [4.0, 4.0, 4.0], "superiority", "lower", 0.0, "not supported"),
    ([3.0, 3.1, 3.2], [4.0, 4.0, 4.0], "non-inferiority", "higher", 0.5, "not supported"),
    ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "superiority", "higher", 0.0, "not supported"),
    ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "exact", "equal", 0.0, "supported"),
    ([1.0, 1.0, 1.1], [1.0, 1.0, 1.0], "exact", "equal", 0.01, "not supported"),
    ([2.0, 1.5], [1.0, 1.0], "exact", "higher", 0.0, "supported"),
    ([2.0, 1.0], [1.0, 1.0], "exact", "higher", 0.0, "not supported"),
    ([0.5], [1.0], "exact", "lower", 0.0, "supported"),
    ([0.9, 0.9, 0.1], [0.9] * 3, "median", "higher", 0.0, "supported"),
    ([0.9, 0.8, 0.1], [0.9] * 3, "median", "higher", 0.0, "not supported"),
    ([5.0, 9.0, 99.0], [10.0, 10.0, 10.0], "median", "lower", 1.0, "supported"),
    ([5.0, 9.1, 99.0], [10.0, 10.0, 10.0], "median", "lower", 1.0, "not supported"),
    ([1.0, 2.0, 3.0, 9.0], [2.5] * 4, "median", "higher", 0.0, "supported"),
]


@pytest.mark.parametrize(("system", "baseline", "rule", "direction", "margin", "verdict"), CELLS)
def test_verdict_of_cells_with_known_intervals(system, baseline, rule, direction, margin, verdict) -> None:
    result = judge(system, baseline, rule=rule, direction=direction, margin=margin)
    assert result.verdict == verdict
    middle = np.median if rule == "median" else np.mean
    assert result.diff_mean == pytest.approx(middle(np.subtract(system, baseline)))
    assert (result.interval is None) == (rule in ("exact", "median"))


def test_known_interval_of_three_pairs() -> None:
    interval = judge([11, 12, 13], [10, 10, 10], rule="superiority", direction="higher").interval
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((-0.484138, 4.484138), abs=1e-6)


def test_verdict_does_not_depend_on_the_sign_convention_of_the_metric() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        system, baseline = generator.normal(0.8, 0.5, 3), generator.normal(0.0, 0.5, 3)
        up = judge(system, baseline, rule="superiority", direction="higher", margin=0.1)
        down = judge(-system, -baseline, rule="superiority", direction="lower", margin=0.1)
        assert up.verdict == down.verdict
        assert up.diff_mean == pytest.approx(-down.diff_mean)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: judge([1, 2], [1, 2], rule="better", direction="higher"), "allowed are superiority"),
        (lambda: judge([1, 2], [1, 2], rule="superiority", direction="up"), "allowed are higher"),
        (lambda: judge([1, 2], [1, 2], rule="superiority", direction="equal"), "only the rule 'exact'"),
        (lambda: judge([1, 2], [1, 2], rule="non-inferiority", direction="higher"), "loss you would accept"),
        (lambda: judge([1, 2], [1, 2], rule="superiority", direction="higher", margin=-1.0), "not negative"),
        (lambda: judge([1, 2], [1], rule="superiority", direction="higher"), "one of each per seed"),
        (lambda: judge([1, math.nan], [1, 2], rule="superiority", direction="higher"), "must be finite"),
        (lambda: judge([1], [2], rule="superiority", direction="higher"), "add seeds"),
        (lambda: t_interval([1.0, 2.0], confidence=1.0), "strictly between"),
        (lambda: t_interval([1.0]), "at least two"),
        (lambda: bootstrap_interval([1.0]), "at least two units"),
        (lambda: bootstrap_interval([1.0, 2.0], resamples=10), "resamples=10"),
    ],
)
def test_errors_say_what_to_do(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_clusters_are_averaged_before_the_interval() -> None:
    system, clusters = [3.0, 1.0, 5.0, 2.0, 4.0, 6.0], ["a", "b", "a", "c", "b", "a"]

    assert cluster_means(system, clusters) == [14 / 3, 2.5, 2.0]
    clustered = paired_t_interval(system, [0.0] * 6, clusters=clusters)
    plain = t_interval([14 / 3, 2.5, 2.0])
    assert (clustered.low, clustered.mean, clustered.high, clustered.n) == (plain.low, plain.mean, plain.high, 3)
    assert paired_t_interval(system, [0.0] * 6, clusters=range(6)) == paired_t_interval(system, [0.0] * 6)
    with pytest.raises(ValueError, match="6 values for 2 clusters"):
        paired_t_interval(system, [0.0] * 6, clusters=["a", "b"])


def test_judging_clusters_is_honest_about_runs_that_share_their_data() -> None:
    """Under no true gain, runs that agree within a data seed would be called a win far too often one by one."""
    generator = np.random.default_rng(2)
    wins = {"clustered": 0, "one by one": 0}
    for _ in range(400):
        shared = np.repeat(generator.normal(size=5), 3)
        gain = (shared + 0.1 * generator.normal(size=15)).tolist()
        for name, clusters in (("clustered", np.repeat(np.arange(5), 3).tolist()), ("one by one", None)):
            verdict = judge(gain, [0.0] * 15, rule="superiority", direction="higher", clusters=clusters).verdict
            wins[name] += verdict == "supported"

    assert wins["clustered"] / 400 < 0.05
    assert wins["one by one"] / 400 > 0.1


def test_the_exact_rule_looks_at_every_pair_of_a_cluster() -> None:
    judged = judge([1.0, -1.0, 3.0], [0.0] * 3, rule="exact", direction="higher", clusters=["a", "a", "b"])
    assert judged.verdict == "not supported"


def test_a_bootstrap_sample_without_anything_to_score_does_not_make_the_interval_undefined() -> None:
    units = np.array([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])  # weight and weight times score

    def score(drawn: Any) -> float:
        weight, hits = drawn.sum(0)
        return hits / weight if weight > 0 else math.nan

    interval = bootstrap_interval(units, score)

    assert (interval.mean, interval.low, interval.high) == (2.0, 2.0, 2.0)
    assert math.isnan(bootstrap_interval(np.zeros((3, 2)), score).low)
