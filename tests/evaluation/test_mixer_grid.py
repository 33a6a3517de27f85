# SPDX-License-Identifier: Apache-2.0
"""The evidence grid of MixER is what was agreed before the runs."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

import pytest

from benchmarks.grids import load_grid
from moeapps.evidence.cells import read_cells

ROOT = Path(__file__).resolve().parents[2]
GRID = load_grid("mixer")
CLAIMS = {claim.id: claim for claim in GRID.claims}


def test_headline_has_eight_seeds_what_claims_need_three_and_the_rest_two() -> None:
    eight = {name for name, v in GRID.variants.items() if v.pairs == 8}
    assert eight == {"robust", "single", "mixer_gate", "mixer", "single_five", "single_equal"}
    two = {name for name, v in GRID.all_variants.items() if v.pairs == 2}
    assert two == {"coda", "ncf", "cavia", "per_environment", "context_free"}
    assert not two & {name for claim in GRID.claims for name in claim.variants}
    cells = [(cell.variant, cell.seed) for cell in GRID.cells()]
    assert len(cells) == len(set(cells)) == 8 * 6 + 2 * 5 + 3 * (len(GRID.variants) - 11) + 3 * 2 * 3
    assert all(seed > 0 for _, seed in cells), "seed 0 is for choosing settings"


def test_compared_variants_see_as_many_environments_a_step_or_the_claim_says_so() -> None:
    def five(name: str) -> bool:
        variant = GRID.all_variants[name]
        published = any(overlay.endswith("mixer_faithful.yaml") for overlay in variant.overlays)
        return published or any("contributors=5" in flag for flag in variant.flags)

    apart = [c.id for c in GRID.claims if c.baseline and len({five(name) for name in c.variants}) > 1]
    assert apart == ["C2s"], "the claim about what seeing five costs"
    assert five("mixer")
    assert not five("mixer_gate")


def test_nothing_is_called_published_but_gate_and_contributors() -> None:
    text = " ".join(claim.text for claim in GRID.claims)
    assert "as published" not in text
    assert set(re.findall(r"[Pp]ublished(?:'s)? ([a-z]+)", text)) == {"gate"}


def test_bars_are_those_set_beforehand() -> None:
    bars = {c.id: (c.metric, c.direction, c.baseline_value) for c in GRID.claims if c.baseline_value is not None}
    assert bars == {
        "C2a": ("partition/ari", "higher", 0.9),
        "C2b": ("partition/ari", "higher", 0.9),
        "C2c": ("partition/purity", "higher", 0.95),
        "C2d": ("seen/relative_mse", "lower", 0.01),
        "C2r": ("partition/ari", "higher", 0.9),
        "C7b": ("partition/ari_identifiable", "higher", 0.9),
        "C7h": ("partition/ari_identifiable", "higher", 0.9),
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
        if claim.system in ("mixer", "mixer_gate", "ten_mixer", "robust", "ten_robust"):
            name = "ublished gate" if "mixer" in claim.system else "robust (ours)"
            assert name in claim.text or claim.id.startswith("C6") or claim.id == "C7b", claim.id


def test_cells_say_the_roles_of_their_domains_as_their_own_means_prove() -> None:
    cells = read_cells(ROOT / "benchmarks" / "results" / "mixer" / "cells", "mixer")
    for result in cells.values():
        assert set(result.roles) == set(result.domains)
        for role in set(result.roles.values()):
            own = [result.value(f"{name}/mse") for name, found in result.roles.items() if found == role]
            assert statistics.fmean(own) == pytest.approx(result.value(f"{role}/mse"), rel=1e-12), result.cell


def test_all_overlays_of_the_grid_exist_and_every_baseline_but_two_is_in_it() -> None:
    assert len({GRID.definition(name, ROOT) for name in GRID.all_variants}) == len(GRID.all_variants)
    used = {overlay for variant in GRID.all_variants.values() for overlay in variant.overlays}
    shipped = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/baselines/mixer_*.yaml")}
    unmeasured = {f"configs/baselines/mixer_{name}.yaml" for name in ("ncf_csm", "official_experts")}
    assert shipped - used == unmeasured
