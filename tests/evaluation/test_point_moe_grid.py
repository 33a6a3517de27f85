# SPDX-License-Identifier: Apache-2.0
"""The evidence grid of Point-MoE is what was agreed before the runs."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.grids import load_grid

ROOT = Path(__file__).resolve().parents[2]
GRID = load_grid("point_moe")


def test_headline_has_eight_seeds_and_the_rest_three() -> None:
    assert {name: v.pairs for name, v in GRID.variants.items() if v.pairs != 3} == {"point_moe": 8, "dense": 8}
    order = [(cell.variant, cell.seed) for cell in GRID.cells()]
    assert order[:16] == [(name, seed) for seed in range(1, 9) for name in ("point_moe", "dense")]
    assert len(order) == len(set(order)) == 97
    assert all(seed > 0 for _, seed in order), "seed 0 is for choosing settings"


def test_every_claim_of_the_card_is_tested_with_a_margin_set_beforehand() -> None:
    assert {claim.id[:2] for claim in GRID.claims} == {"C1", "C2", "C3", "C4", "C5", "C6"}
    assert not [claim.id for claim in GRID.claims if claim.untested]
    margins = {claim.rule: claim.margin for claim in GRID.claims if not claim.id.startswith("C6")}
    assert margins == {"superiority": 0.0, "non-inferiority": 0.01}
    assert {claim.margin for claim in GRID.claims if claim.id.startswith("C6")} == {0.25}


def test_all_overlays_of_the_grid_exist_and_every_baseline_is_in_it() -> None:
    assert len({GRID.definition(name, ROOT) for name in GRID.all_variants}) == len(GRID.all_variants)
    used = {overlay for variant in GRID.all_variants.values() for overlay in variant.overlays}
    shipped = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/baselines/point_moe_*.yaml")}
    assert shipped <= used


def test_the_ladder_has_three_levels_of_growing_conflict() -> None:
    assert GRID.ladder is not None
    assert list(GRID.ladder.levels) == ["one_world", "six_sensors", "misaligned"]
    assert GRID.ladder.variant_name("six_sensors", "dense") == "dense"


def test_the_card_of_the_task_quotes_the_computed_differences() -> None:
    results = json.loads((ROOT / "benchmarks/results/point_moe.json").read_text(encoding="utf-8"))
    told = " ".join((ROOT / "tasks/point_cloud/README.md").read_text(encoding="utf-8").split())
    claims = {claim["id"]: claim for claim in results["claims"]}

    def shown(value: float) -> str:
        return f"{value:+.3f}".replace("-", "−")

    for name in ("C1a", "C1b", "C1c", "C1d", "C2a", "C2c", "C2e"):
        low, high = claims[name]["ci95"]
        assert f"{shown(claims[name]['diff_mean'])} [{shown(low)}, {shown(high)}]" in told, name
    for name in ("C3a", "C3b", "C2d"):
        assert shown(claims[name]["diff_mean"]) in told, name
    steps = [level["diff_mean"] for level in results["ladder"]["levels"]]
    assert f"the three differences are {shown(steps[0])}, {shown(steps[1])} and {shown(steps[2])}" in told
    assert max(abs(end - level["diff_mean"]) for level in results["ladder"]["levels"] for end in level["ci95"]) < 0.045
    assert {claims[name]["verdict"] for name in ("C4a", "C4b")} == {"supported"}, "a balance loss is not needed"
    assert {claims[name]["verdict"] for name in ("C1a", "C1b", "C1c", "C1d", "C2a", "C2e", "C5a")} == {"inconclusive"}
    assert {claims[name]["verdict"] for name in ("C2d", "C3a", "C3b", "C5b", "C6a", "C6b", "C6c")} == {"supported"}
    shares = [sum(claims["C5a"][side]) / 8 for side in ("system", "baseline")]
    assert all(0.035 < value < 0.05 for value in shares), "the README says 4 per cent"
