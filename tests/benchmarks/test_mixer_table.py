# SPDX-License-Identifier: Apache-2.0
"""What the README says of MixER is what the committed cells say."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.grids import load_grid
from benchmarks.mixer_table import TABLE

GRID = load_grid("mixer")
BARS = {claim.id: claim.baseline_value for claim in GRID.claims}
CELLS = TABLE.cells()
CLAIMS = {c["id"]: c for c in json.loads(Path("benchmarks/results/mixer.json").read_text(encoding="utf-8"))["claims"]}


def test_the_table_of_the_readme_is_that_of_the_cells() -> None:
    assert TABLE.written() == TABLE.markdown(CELLS)


def test_every_row_is_a_variant_of_the_grid_and_every_row_has_the_same_pairs() -> None:
    assert set(TABLE.rows) <= set(GRID.variants)
    first = TABLE.averages(CELLS, "seen/mse")
    outlier = {
        cell: replace(result, metrics={**result.metrics, "seen/mse": 9.0}) if cell.variant == "robust" else result
        for cell, result in CELLS.items()
    }
    second = TABLE.averages(outlier, "seen/mse")
    assert second["robust"] == 9.0
    assert all(first[name] == second[name] for name in first if name != "robust")


def test_without_a_common_pair_of_seeds_nothing_is_written() -> None:
    with pytest.raises(ValueError, match=r"python -m benchmarks\.evidence mixer"):
        TABLE.markdown({cell: result for cell, result in CELLS.items() if cell.variant != "soft"})


def ratio(claim: str) -> float:
    """The ratio of errors that a claim on logarithms found."""
    return float(10 ** CLAIMS[claim]["diff_mean"])


def interval(claim: str) -> str:
    """Its interval as factors."""
    low, high = (10**end for end in CLAIMS[claim]["ci95"])
    return f"[{low:.2f}, {high:.2f}]"


def median(variant: str, metric: str) -> str:
    return f"{statistics.median(result.value(metric) for cell, result in CELLS.items() if cell.variant == variant):.2f}"


def test_what_the_readme_concludes() -> None:
    told = re.sub(r"\s+", " ", Path(TABLE.readme).read_text(encoding="utf-8"))
    ari, apart = "partition/ari", "partition/ari_identifiable"
    robust = [result for cell, result in CELLS.items() if cell.variant == "robust"]
    for sentence in (
        f"the published gate {median('mixer_gate', ari)}, with five environments a step {median('mixer', ari)}, Switch "
        f"{TABLE.averages(CELLS, ari)['switch']:.2f}; without the random start {CLAIMS['C2q']['diff_mean']:.2f} less), "
        f"with a median relative error of {statistics.median(r.value('seen/relative_mse') for r in robust):.4f}.",
        f"the median relative error is {ratio('C6c'):.2f} inside the trained range {interval('C6c')} and "
        f"{ratio('C6d'):.2f} outside {interval('C6d')}: within the noise.",
        f"it has {ratio('C1g'):.2f} times that learner's error {interval('C1g')}, {ratio('C1i'):.2f} family by family "
        f"{interval('C1i')}.",
        f"The published gate has {ratio('C1f'):.2f} times one learner's error {interval('C1f')} after as many steps "
        f"and {ratio('C1h'):.2f} {interval('C1h')} at equal FLOPs. With five environments a step it has "
        f"{ratio('C1a'):.2f} times the error of one learner that sees as many {interval('C1a')}. On a single family "
        f"one learner has {ratio('C3b'):.2f} of ours.",
        f"`robust (ours)` has {ratio('C7a'):.2f} of one learner's median relative error {interval('C7a')} and "
        f"{ratio('C7d'):.2f} family by family {interval('C7d')}, the published gate {ratio('C7c'):.2f} "
        f"{interval('C7c')} and {ratio('C7e'):.2f} {interval('C7e')}.",
        f"(ARI over those that can be told apart: {median('ten_robust', apart)} and {median('ten_mixer', apart)})",
    ):
        assert sentence in told, sentence
    assert len(robust) == 8
    assert min(result.value(ari) for result in robust) == 1.0 >= BARS["C2b"]
    assert min(result.value("partition/purity") for result in robust) >= BARS["C2c"]
    assert statistics.median(result.value("seen/relative_mse") for result in robust) <= BARS["C2d"]
    noise = ("C1a", "C1e", "C1f", "C1g", "C1i", "C2l", "C2m", "C2n", "C2o", "C6c", "C6d", "C7c", "C7d", "C7e")
    assert {CLAIMS[name]["verdict"] for name in noise} == {"inconclusive"}
    assert {CLAIMS[name]["verdict"] for name in ("C3b", "C7a")} == {"supported"}
    assert CLAIMS["C1h"]["verdict"] == "not supported"
    collapsed = [result for cell, result in CELLS.items() if cell.variant in ("frozen", "hard_em")]
    assert all(result.value("partition/experts") == 1 for result in collapsed)


def test_equal_flops_are_those_of_the_whole_training_fits_included() -> None:
    equal = [claim for claim in CLAIMS.values() if "equal FLOPs" in claim["text"]]
    assert len(equal) == 12
    assert all(abs(claim["train_flops_ratio"] - 1) <= 0.02 for claim in equal)
