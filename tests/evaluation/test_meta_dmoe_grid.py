# SPDX-License-Identifier: Apache-2.0
"""The evidence grid of Meta-DMoE is what was agreed before the runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def test_the_readme_tells_wins_ties_and_losses_as_they_were_found() -> None:
    results = json.loads((ROOT / "benchmarks/results/meta_dmoe.json").read_text(encoding="utf-8"))
    claims = {claim["id"]: claim for claim in results["claims"]}
    told = " ".join((ROOT / "tasks/adaptation/README.md").read_text(encoding="utf-8").split())

    def points(found: dict[str, Any], sign: str = "", turned: bool = False) -> str:
        values = [100 * value * (-1 if turned else 1) for value in (found["diff_mean"], *found["ci95"])]
        middle, *ends = [f"{value:{sign}.1f}".replace("-", "−") for value in values]
        return f"{middle} [{', '.join(reversed(ends) if turned else ends)}]"

    def gain(name: str) -> str:
        return f"{100 * claims[name]['diff_mean']:.1f}"

    def share(name: str) -> str:
        return f"{1 / claims[name]['train_flops_ratio']:.2f}"

    near, _, far = results["ladder"]["levels"]
    for sentence in (
        f"better by {points(claims['C2b'])} on average and by {points(claims['C2a'])} on the worst domain",
        f"(by {gain('C7a')}), TENT ({gain('C7c')}), T3A ({gain('C7d')}), SHOT ({gain('C7e')}), MEMO ({gain('C7f')}) "
        f"and a mixture trained jointly on the core ({gain('C7g')})",
        f"over ERM is {points(near)} where domains lie half as far apart, and {points(far)} where they lie half as far",
        f"by {points(claims['C2d'], turned=True)} on average, by {points(claims['C2e'], turned=True)} where it",
        f"on the worst domain the difference is open, {points(claims['C2c'], '+')}",
        f"gains {points(claims['C1a'])} over the same student as it was",
        f"costs {share('C1c')} of the compute, ends at the same score: the step adds {points(claims['C1c'], '+')}",
        f"at {share('C3b')} of the compute, is better by {points(claims['C3b'], turned=True)}",
        f"changes next to nothing ({points(claims['C1d'], '+')})",
        f"with the support's statistics the method is better by {points(claims['C2f'])}",
        f"they began as by {gain('C4b')}, the aggregator that answers itself by {gain('C4c')}",
        f"and {share('C7h')} of the compute of training, is better than the adapted student by "
        f"{points(claims['C7h'], turned=True)}. Asking the one expert that is surest (domain-id routing), at the same "
        f"{share('C7i')} of the compute, is not told apart from it: {points(claims['C7i'], '+')} for the student.",
        f"in place of asked {points(claims['C5a'], '+')}, in place of zeroed {points(claims['C5b'], '+')}; first-order "
        f"derivatives {points(claims['C3c'], '+')}",
    ):
        assert sentence in told, sentence
