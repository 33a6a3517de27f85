# SPDX-License-Identifier: Apache-2.0
"""The evidence grid of HoME is what was agreed before the runs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.evidence.grid import load_grid

ROOT = Path(__file__).resolve().parents[2]
GRID = load_grid("home")


def test_the_headline_pair_has_five_data_seeds_of_three_model_seeds_each() -> None:
    pairs = GRID.pairs("home", "mmoe")
    assert len(pairs) == len({seed for seed, _ in pairs}) == 15
    assert {d: sum(data == d for _, data in pairs) for _, d in pairs} == dict.fromkeys(range(1, 6), 3)
    assert [d for _, d in GRID.pairs("home", "ple")] == [1, 2, 3, 4, 5]
    assert len(GRID.pairs("home_ml100k", "mmoe_ml100k")) == 8
    assert len(GRID.cells()) <= 150


def test_every_claim_of_the_card_is_tested_with_a_margin_set_beforehand() -> None:
    assert {claim.id[:2] for claim in GRID.claims} == {f"C{i}" for i in range(1, 9)}
    assert not [claim.id for claim in GRID.claims if claim.untested]  # C8 is ours: layer norm, chosen by the search
    assert {claim.margin for claim in GRID.claims if claim.id[:2] in ("C5", "C6")} == {0.005}
    assert {claim.margin for claim in GRID.claims if claim.id[:2] == "C4"} == {0.0}
    assert [claim.id for claim in GRID.claims if not claim.clustered] == ["C6a", "C6b"]


def test_all_overlays_of_the_grid_exist_and_every_baseline_is_in_it() -> None:
    assert len({GRID.definition(name, ROOT) for name in GRID.all_variants}) == len(GRID.all_variants)
    used = {overlay for variant in GRID.all_variants.values() for overlay in variant.overlays}
    shipped = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/baselines/home_*.yaml")}
    assert shipped <= used


def test_real_data_have_no_data_seed_but_an_order() -> None:
    cells = {cell.variant: GRID.arguments(cell) for cell in GRID.cells()}
    assert "--data.init_args.source.init_args.data_seed" not in cells["home_ml100k"]
    assert "--data.init_args.seed" in cells["home_ml100k"]
    assert "--data.init_args.source.init_args.data_seed" in cells["ladder-conflict-mmoe"]
