# SPDX-License-Identifier: Apache-2.0
"""What the README says of MixER is what the committed cells say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import mixer_table
from benchmarks.evidence.cells import read_cells
from benchmarks.evidence.mixer import ARI_BAR, GRID, PURITY_BAR, RELATIVE_BAR

CELLS = read_cells(mixer_table.CELLS, "mixer")
README = mixer_table.README.read_text(encoding="utf-8")
CLAIMS = {c["id"]: c for c in json.loads(Path("benchmarks/results/mixer.json").read_text(encoding="utf-8"))["claims"]}


def test_the_table_of_the_readme_is_that_of_the_cells() -> None:
    assert mixer_table.BLOCK.search(README)[0].splitlines()[1:-1] == mixer_table.table(CELLS).splitlines()  # type: ignore[index]


def test_every_row_is_a_variant_of_the_grid_and_every_row_has_the_same_pairs() -> None:
    assert set(mixer_table.ROWS) <= set(GRID.variants)
    first = mixer_table.medians(CELLS, "seen/mse")
    outlier = {
        cell: replace(result, metrics={**result.metrics, "seen/mse": 9.0}) if cell.variant == "robust" else result
        for cell, result in CELLS.items()
    }
    second = mixer_table.medians(outlier, "seen/mse")
    assert second["robust"] == 9.0
    assert all(first[name] == second[name] for name in first if name != "robust")


def test_without_a_common_pair_of_seeds_nothing_is_written() -> None:
    with pytest.raises(ValueError, match=r"python -m benchmarks\.evidence mixer"):
        mixer_table.table({cell: result for cell, result in CELLS.items() if cell.variant != "soft"})


def test_bars_and_conclusions_of_the_readme() -> None:
    headline = [result for cell, result in CELLS.items() if cell.variant == "robust"]
    assert len(headline) == 8
    assert CLAIMS["C2b"]["system"]["median"] >= ARI_BAR
    assert CLAIMS["C2c"]["system"]["median"] >= PURITY_BAR
    assert CLAIMS["C2d"]["system"]["median"] <= RELATIVE_BAR
