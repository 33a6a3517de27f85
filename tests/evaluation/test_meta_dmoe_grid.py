# SPDX-License-Identifier: Apache-2.0
"""The evidence grid of Meta-DMoE is what was agreed before the runs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.grids import load_grid
from moeapps.commands.curriculum import plan
from moeapps.evidence.grid import Cell

ROOT = Path(__file__).resolve().parents[2]
GRID = load_grid("meta_dmoe")


def test_headline_has_eight_seeds_and_the_rest_three() -> None:
    assert {name for name, v in GRID.variants.items() if v.pairs == 8} == {"meta_dmoe", "erm", "arm_bn"}
    assert {v.pairs for v in GRID.all_variants.values()} == {3, 8}
    cells = [(cell.variant, cell.seed) for cell in GRID.cells()]
    assert len(cells) == len(set(cells))
    assert all(seed > 0 for _, seed in cells), "seed 0 is for choosing settings"


def test_every_claim_is_tested_with_margins_set_beforehand() -> None:
    assert {claim.id[:2] for claim in GRID.claims} == {"C1", "C2", "C3", "C4", "C5", "C6", "C7"}
    assert not [claim.id for claim in GRID.claims if claim.untested]
    assert {claim.margin for claim in GRID.claims if claim.rule == "superiority"} == {0.0}
    assert {claim.margin for claim in GRID.claims if claim.rule == "non-inferiority"} == {0.01}


def test_all_overlays_exist_and_differ() -> None:
    assert len({GRID.definition(name, ROOT) for name in GRID.all_variants}) == len(GRID.all_variants)


def test_a_chain_shares_its_first_stages_with_those_that_begin_alike() -> None:
    def stages(name: str) -> tuple[tuple[str, ...], ...]:
        return GRID.variants[name].stages

    assert stages("no_meta")[:2] == stages("meta_dmoe")[:2]
    assert stages("experts")[:1] == stages("meta_dmoe")[:1]
    assert stages("first_order")[:3] == stages("meta_dmoe")[:3]
    assert stages("unmasked")[:2] == stages("meta_dmoe")[:2]
    assert stages("unmasked")[2] != stages("meta_dmoe")[2]


def test_the_ladder_grows_in_domain_distance() -> None:
    assert GRID.ladder is not None
    assert list(GRID.ladder.levels) == ["near", "usual", "far"]
    assert GRID.ladder.variant_name("usual", "erm") == "erm"


def test_the_words_of_a_chain_are_stages_of_a_curriculum() -> None:
    for name, number in (("meta_dmoe", 4), ("no_meta", 3), ("experts", 2), ("published", 4)):
        words = GRID.arguments(Cell(name, 1, 1))
        found = plan(words[1:])
        assert words[0] == "curriculum"
        assert len(found) == number
        assert [stage.root for stage in found] == [Path("runs/meta_dmoe_stages")] * (number - 1) + [None]
        assert found[-1].name == f"{name}-s1-d1"
    beginnings = [
        plan(GRID.arguments(Cell(name, 1, 1))[1:])[1].name for name in ("meta_dmoe", "no_meta", "first_order")
    ]
    assert len(set(beginnings)) == 1
    assert plan(GRID.arguments(Cell("meta_dmoe", 2, 2))[1:])[0].name not in {beginnings[0]}
