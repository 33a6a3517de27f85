# SPDX-License-Identifier: Apache-2.0
"""The evidence grid of ProMoE is what was agreed before the runs."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.grids import given, load_grid
from benchmarks.promoe_rates import SEARCH
from benchmarks.rates import RATE

ROOT = Path(__file__).resolve().parents[2]
GRID = load_grid("promoe")


def test_headline_has_eight_seeds_and_the_rest_three() -> None:
    assert {name for name, v in GRID.variants.items() if v.pairs == 8} == {"promoe", "dense", "tc"}
    assert {v.pairs for v in GRID.all_variants.values()} == {3, 8}
    cells = [(cell.variant, cell.seed) for cell in GRID.cells()]
    assert len(cells) == len(set(cells)) == 8 * 3 + 3 * (len(GRID.variants) - 3) + 3 * 2 * 2
    assert all(seed > 0 for _, seed in cells), "seed 0 is for choosing settings"


def test_rates_at_half_the_width_are_the_best_on_the_validation_domain() -> None:
    found = json.loads(SEARCH.path.read_text(encoding="utf-8"))

    assert found["best"] == SEARCH.best(found["runs"])
    assert not [model for model in SEARCH.models if SEARCH.missing(found["runs"], model)]
    assert {metric.split("/")[0] for run in found["runs"].values() for metric in run} == {"validation", "cpu_s"}
    assert found["best"] == {name: float(given(GRID.variants[name], RATE) or "nan") for name in SEARCH.models}
    assert SEARCH.seed not in {number for pair in GRID.seeds for number in pair}


def test_every_claim_of_the_card_is_tested_with_margins_set_beforehand() -> None:
    assert {claim.id[:2] for claim in GRID.claims} == {"C1", "C2", "C3", "C4", "C5", "C6"}
    assert not [claim.id for claim in GRID.claims if claim.untested]
    assert {claim.margin for claim in GRID.claims if claim.rule == "superiority"} == {0.0}
    assert [(c.id, c.margin) for c in GRID.claims if c.rule == "non-inferiority"] == [("C5b", 0.002)]
    assert [(c.id, c.baseline_value) for c in GRID.claims if c.baseline_value is not None] == [("C5a", 0.1)]


def test_all_overlays_exist_and_every_rival_of_the_same_process_is_in_the_grid() -> None:
    assert len({GRID.definition(name, ROOT) for name in GRID.all_variants}) == len(GRID.all_variants)
    used = {overlay for variant in GRID.all_variants.values() for overlay in variant.overlays}
    shipped = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/baselines/promoe_*.yaml")}
    assert shipped - used == {"configs/baselines/promoe_ddpm.yaml"}  # its loss is one of another kind


def test_the_ladder_grows_from_ten_classes_to_all() -> None:
    assert GRID.ladder is not None
    assert list(GRID.ladder.levels) == ["ten_classes", "twenty_classes", "thirty_classes"]
    assert GRID.ladder.variant_name("thirty_classes", "dense") == "dense"
