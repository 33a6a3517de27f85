# SPDX-License-Identifier: Apache-2.0
"""The search for a regime in which HoME pays: what is written about it is what was found."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks import home_search as search
from moeapps.evaluation.statistics import paired_t_interval

RESULTS = json.loads(search.RESULTS.read_text(encoding="utf-8"))
README = Path("tasks/recommendation/README.md").read_text(encoding="utf-8")


def test_results_follow_from_the_runs() -> None:
    assert RESULTS["settings"] == json.loads(json.dumps(search.summarise(RESULTS["runs"])))


def test_at_least_twelve_settings_have_three_seeds_and_all_are_listed() -> None:
    assert {entry["setting"] for entry in RESULTS["settings"]} == set(search.SETTINGS)
    assert sum(len(entry["seeds"]) == len(search.SEEDS) for entry in RESULTS["settings"]) >= 12
    assert {entry["setting"] for entry in RESULTS["settings"] if len(entry["seeds"]) == 1} == set(search.STOPPED)


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    lines = README.split("<!-- search:begin -->")[1].split("<!-- search:end -->")[0].strip().splitlines()[2:]
    full = [entry for entry in RESULTS["settings"] if entry["rare_ci95"] is not None]
    numbers = [[f"{100 * x:+.1f}" for x in (e["rare_diff_mean"], *e["rare_ci95"])] for e in full]
    expected = [f"| {e['text']} | {d} [{low}, {high}] |" for e, (d, low, high) in zip(full, numbers, strict=True)]
    assert lines == expected


def test_what_the_readme_concludes() -> None:
    found = {entry["setting"]: entry for entry in RESULTS["settings"]}
    batch_norm = [e for e in RESULTS["settings"] if "norm" not in search.SETTINGS[e["setting"]].home]

    assert all(e["rare_ci95"][0] <= 0 for e in batch_norm if e["rare_ci95"])  # as published it gains nowhere
    assert found["layer_norm"]["rare_ci95"][0] > 0  # layer norm gains ...
    low, high = found["both_layer_norm"]["rare_ci95"]
    assert low <= 0 <= high  # ... but not over an MMoE with layer norm
    assert all(found[name]["rare_diff_mean"] < 0 for name in search.STOPPED)  # none gained


def runs_of(setting: str, home: float, mmoe: float) -> dict[str, dict[str, float]]:
    value = {"home": home, "mmoe": mmoe}
    return {
        search.key(setting, model, lr, seed): {"rare": value[model] + i / 100 + lr, "dense": 0.5, "cpu_s": 1.0}
        for model in value
        for lr in search.RATES
        for i, seed in enumerate(search.SEEDS)
    }


def test_each_network_is_taken_at_its_better_rate_and_differences_are_paired() -> None:
    (entry,) = search.summarise(runs_of("base", 0.7, 0.6))

    expected = paired_t_interval([0.7, 0.71, 0.72], [0.6, 0.61, 0.62])
    assert entry["lr"] == {"home": max(search.RATES), "mmoe": max(search.RATES)}
    assert entry["rare_diff_mean"] == pytest.approx(0.1)
    assert entry["rare_ci95"] == pytest.approx([expected.low, expected.high], abs=1e-6)
    assert statistics.fmean(entry["rare"]["home"]) == pytest.approx(0.71 + max(search.RATES))


def test_networks_that_are_alike_are_trained_once() -> None:
    assert search.alike("base", "layer_norm", "mmoe")
    assert not search.alike("base", "layer_norm", "home")
    assert not search.alike("base", "rarer", "mmoe")
    assert not search.alike("base", "both_layer_norm", "mmoe")
