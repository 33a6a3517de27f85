# SPDX-License-Identifier: Apache-2.0
"""Compared runs say what they cost, and where that is no comparison at equal compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeapps.evaluation.compute import Cost, cost_warnings, costs
from moeapps.evaluation.results import RunResults


def run(name: str, seed: int = 0, **sizes: Any) -> RunResults:
    header = {"system": "toy", "name": name, "seed": seed, **sizes}
    return RunResults(Path(f"runs/toy/{name}/version_{seed}"), header, {}, {}, {}, {})


def test_a_quarter_of_the_training_is_named_though_a_token_costs_the_same() -> None:
    base = [run("dense", s, params_active=100, flops_per_token=200.0, train_flops=4_000) for s in (0, 1)]
    moe = [run("moe", s, params_active=101, flops_per_token=203.0, train_flops=1_000) for s in (0, 1)]

    assert costs(moe, base) == [
        Cost("toy/moe", 2, {"params_active": 101, "flops_per_token": 203, "train_flops": 1_000}, 0.25),
        Cost("toy/dense", 2, {"params_active": 100, "flops_per_token": 200, "train_flops": 4_000}, 1.0),
    ]
    (line,) = cost_warnings([*moe, *base], base)
    assert line.startswith("toy/moe: training FLOPs differ from the baseline's by -75.0 per cent")
    assert cost_warnings(base, base) == cost_warnings(moe, []) == []


def test_a_cost_that_is_not_known_is_no_equal_cost() -> None:
    base, old = [run("dense", params_active=100, flops_per_token=200.0, train_flops=4_000)], [run("old")]

    assert costs(old, base)[0] == Cost("toy/old", 1, {}, None)
    assert cost_warnings(old, base) == ["toy/old: its training FLOPs and the baseline's are not both known"]


def test_unequal_sizes_of_trainings_of_equal_flops_are_told_as_what_is_compared() -> None:
    base = [run("single", params_active=100, flops_per_token=200.0, train_flops=4_000)]
    moe = [run("moe", params_active=175, flops_per_token=201.0, train_flops=4_010)]

    assert cost_warnings([*moe, *base], base) == [
        "toy/moe: active parameters differ from the baseline's by +75.0 per cent; the training as a whole took equally "
        "many FLOPs"
    ]
