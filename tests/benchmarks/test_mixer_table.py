# SPDX-License-Identifier: Apache-2.0
"""What the README says of MixER is what the committed cells say."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.evidence.mixer import ARI_BAR, GRID, PURITY_BAR, RELATIVE_BAR
from benchmarks.mixer_table import TABLE

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


def test_what_the_readme_concludes() -> None:
    robust = [result for cell, result in CELLS.items() if cell.variant == "robust"]
    published = [result for cell, result in CELLS.items() if cell.variant == "mixer"]
    assert len(robust) == len(published) == 8
    assert min(result.value("partition/ari") for result in robust) == 1.0 >= ARI_BAR
    assert min(result.value("partition/purity") for result in robust) >= PURITY_BAR
    assert f"{statistics.median(result.value('partition/ari') for result in published):.2f}" == "0.53"
    assert f"{TABLE.averages(CELLS, 'partition/ari')['switch']:.2f}" == "0.30"
    assert f"{CLAIMS['C2q']['diff_mean']:.2f}" == "0.38"
    assert f"{statistics.median(result.value('seen/relative_mse') for result in robust):.4f}" == "0.0053"
    assert RELATIVE_BAR >= 0.0053
    assert (
        f"{ratio('C6c'):.2f} {ratio('C6d'):.2f} {ratio('C1d'):.2f} {ratio('C1a'):.0f} {ratio('C3b'):.2f}"
        == "0.34 0.42 0.64 11 0.26"
    )
    assert {CLAIMS[name]["verdict"] for name in ("C6c", "C6d", "C3b")} == {"supported"}
    assert {CLAIMS[name]["verdict"] for name in ("C1c", "C1e", "C2l", "C2m", "C2n", "C2o")} == {"inconclusive"}
    assert {CLAIMS[name]["verdict"] for name in ("C1a", "C1d")} == {"not supported"}
    collapsed = [result for cell, result in CELLS.items() if cell.variant in ("frozen", "hard_em")]
    assert all(result.value("partition/experts") == 1 for result in collapsed)
