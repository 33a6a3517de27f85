# SPDX-License-Identifier: Apache-2.0
"""The evidence grid of MixER is what was agreed before the runs."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.evidence.grid import load_grid

ROOT = Path(__file__).resolve().parents[2]
GRID = load_grid("mixer")
CLAIMS = {claim.id: claim for claim in GRID.claims}


def test_headline_has_eight_seeds_what_claims_need_three_and_the_rest_two() -> None:
    assert {name for name, v in GRID.variants.items() if v.pairs == 8} == {"robust", "single", "mixer"}
    two = {name for name, v in GRID.all_variants.items() if v.pairs == 2}
    assert two == {"coda", "ncf", "cavia", "per_environment", "context_free"}
    assert not two & {name for claim in GRID.claims for name in claim.variants}
    cells = [(cell.variant, cell.seed) for cell in GRID.cells()]
    assert len(cells) == len(set(cells)) == 8 * 3 + 2 * 5 + 3 * (len(GRID.variants) - 8) + 3 * 2 * 3
    assert all(seed > 0 for _, seed in cells), "seed 0 is for choosing settings"


def test_bars_are_those_set_beforehand() -> None:
    bars = {c.id: (c.metric, c.direction, c.baseline_value) for c in GRID.claims if c.baseline_value is not None}
    assert bars == {
        "C2a": ("partition/ari", "higher", 0.9),
        "C2b": ("partition/ari", "higher", 0.9),
        "C2c": ("partition/purity", "higher", 0.95),
        "C2d": ("seen/relative_mse", "lower", 0.01),
        "C7b": ("partition/ari_identifiable", "higher", 0.9),
    }
    assert all(CLAIMS[id].rule == "median" for id in (*bars, "C1d"))
    assert (CLAIMS["C1d"].scale, CLAIMS["C1d"].margin) == ("log10", math.log10(2))
    assert {c.id: round(10**c.margin, 6) for c in GRID.claims if c.rule == "non-inferiority"} == {
        "C2p": 1.25,
        "C5": 1.25,
    }
    assert CLAIMS["C2g"].margin == 0.3


def test_every_claim_of_the_card_has_an_entry_and_says_which_of_the_two_gates_it_is_about() -> None:
    assert {claim.id[:2] for claim in GRID.claims} == {"C1", "C2", "C3", "C4", "C5", "C6", "C7"}
    assert {claim.id for claim in GRID.claims if claim.untested} == {"C4a", "C4b"}
    for claim in GRID.claims:
        if claim.system in ("mixer", "robust"):
            name = "as published" if claim.system == "mixer" else "robust (ours)"
            assert name in claim.text or claim.id.startswith("C6"), claim.id


def test_all_overlays_of_the_grid_exist_and_every_baseline_but_two_is_in_it() -> None:
    assert len({GRID.definition(name, ROOT) for name in GRID.all_variants}) == len(GRID.all_variants)
    used = {overlay for variant in GRID.all_variants.values() for overlay in variant.overlays}
    shipped = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/baselines/mixer_*.yaml")}
    unmeasured = {f"configs/baselines/mixer_{name}.yaml" for name in ("ncf_csm", "official_experts")}
    assert shipped - used == unmeasured
