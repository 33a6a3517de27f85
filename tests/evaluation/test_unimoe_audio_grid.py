# SPDX-License-Identifier: Apache-2.0
"""The evidence grid of UniMoE-Audio is what was agreed before the runs, and its search is what the file says."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
import yaml

from benchmarks.grids import given, load_grid
from benchmarks.rates import RATE
from benchmarks.unimoe_audio_rates import SEARCH

ROOT = Path(__file__).resolve().parents[2]
CELLS = ROOT / "benchmarks" / "results" / "unimoe_audio" / "cells"
GRID = load_grid("unimoe_audio")
HEADLINE = ("curriculum", "dense", "specialists")
SPEECH = ("speech_en_es", "speech_fr", "speech_it")
SEARCHED = ("moe", "dense", "dense_params", "top_k", "specialists", "curriculum", "dense_natural", "free_p",
            "no_warmup", "no_null", "no_shared", "adamoe")  # fmt: skip
RATES = {name: float(given(GRID.variants[name], RATE) or "nan") for name in SEARCHED}


def test_headline_pairs_have_eight_seeds_on_seen_data_poor_and_unseen_domains() -> None:
    assert GRID.headline == HEADLINE
    for rival in HEADLINE[1:]:
        claims = [claim for claim in GRID.claims if claim.variants == ("curriculum", rival)]
        assert {claim.metric for claim in claims} == {"seen/bits_0", "music/bits_0", "unseen/bits_0"}
        for claim in claims:
            assert GRID.pairs("curriculum", rival)[claim.skip :] == tuple((seed, seed) for seed in range(9, 17))
    assert {GRID.variants[name].pairs for name in GRID.variants if name not in HEADLINE} == {3}


def test_the_claims_are_those_of_the_paper_and_margins_were_set_beforehand() -> None:
    assert {claim.id[:2] for claim in GRID.claims} == {f"C{i}" for i in range(1, 10)}
    assert {claim.margin for claim in GRID.claims if claim.rule == "non-inferiority"} == {0.03}
    assert {claim.clustered for claim in GRID.claims} == {False}
    floors = {claim.metric for claim in GRID.claims if claim.baseline == "unigram"}
    assert floors == {f"{domain}/bits_0" for domain in (*SPEECH, "music")}


def test_all_are_compared_at_one_total_of_training_compute_but_for_the_floor_and_constants() -> None:
    for claim in GRID.claims:
        assert (claim.match == "none") == (claim.baseline in ("unigram", "bigram", None)), claim.id


@pytest.mark.parametrize("name", [name for name in GRID.variants if name not in ("unigram", "bigram")])
def test_training_compute_of_the_cells_is_that_of_the_mixture(name: str) -> None:
    """From the committed cells, a curriculum with all of its stages: the means of the seeds that both have."""
    pairs = GRID.pairs("moe", name)
    flops = {
        variant: mean(
            json.loads((CELLS / f"{variant}-s{seed}-d{data_seed}.json").read_text())["train_flops"]
            for seed, data_seed in pairs
        )
        for variant in ("moe", name)
    }
    assert flops[name] == pytest.approx(flops["moe"], rel=0.02)


def test_every_network_has_the_rate_that_is_best_on_the_validation_domains() -> None:
    found = json.loads(SEARCH.path.read_text(encoding="utf-8"))
    assert found["best"] == SEARCH.best(found["runs"]) == RATES
    assert not [model for model in SEARCH.models if SEARCH.missing(found["runs"], model)]
    assert {metric.split("/")[0] for run in found["runs"].values() for metric in run} == {"validation", "cpu_s"}
    assert not {SEARCH.seed, *SEARCH.more_seeds} & {number for pair in GRID.seeds for number in pair}
    assert set(found["best"]) == set(SEARCHED)
    for model, rate in RATES.items():
        bits = {
            value: mean(found["runs"][f"{model}-{value:g}{end}"][SEARCH.metric] for end in ("", "-s101", "-s102"))
            for value in (*SEARCH.rates, *SEARCH.further)
            if f"{model}-{value:g}-s102" in found["runs"]
        }
        assert set(SEARCH.rates) <= set(bits)
        assert bits[rate] == min(bits.values())


def test_dense_networks_take_fewer_steps_than_the_mixture_where_a_step_costs_more() -> None:
    steps = {name: int(given(GRID.variants[name], "--trainer.max_steps") or 0) for name in SEARCHED}
    assert 0 < steps["dense_params"] < steps["dense"] < steps["moe"]


def test_stages_come_in_the_order_of_the_paper_and_the_first_three_are_not_tested() -> None:
    chain = [stage[0] for stage in GRID.variants["curriculum"].stages]
    assert chain == [f"configs/stages/unimoe_audio_{number}.yaml" for number in range(4)]
    assert [stage[0][-6] for stage in GRID.variants["no_warmup"].stages] == ["0", "1", "3"]
    warm = yaml.safe_load((ROOT / chain[2]).read_text())["model"]["init_args"]
    assert warm["trained"] == ["*.ffn.router.*", "*.ffn.experts.banks.1.*"]


def test_the_readme_tells_wins_ties_and_losses_and_whose_scores_were_known() -> None:
    claims = {c["id"]: c for c in json.loads((ROOT / "benchmarks/results/unimoe_audio.json").read_text())["claims"]}
    told = " ".join((ROOT / "tasks/audio/README.md").read_text(encoding="utf-8").split())

    def bits(name: str, sign: str = "+") -> str:
        values = (claims[name]["diff_mean"], *claims[name]["ci95"])
        shown = [f"{value:{sign}.3f}".replace("-", "−") for value in values]
        return f"{shown[0]} [{shown[1]}, {shown[2]}]"

    for sentence in (
        f"by {-claims['C3a']['diff_mean']:.2f} on all seen domains, {-claims['C3b']['diff_mean']:.2f} on music",
        f"{bits('C8a')} on seen domains, {bits('C8c')} on unseen ones",
        f"beside it the curriculum is open, {bits('C8d')}",
        f"AdaMoE is ahead of the mixture on average, {bits('C6g')}, which is open, too",
        f"not beaten by the curriculum on that domain, {bits('C7m')}",
        "(the first two points) are of eight seeds that no choice has seen, the others of three whose scores",
    ):
        assert sentence in told, sentence
    opened = ("C8a", "C8b", "C8c", "C8d", "C6g", "C7m", "C9a", "C9b", "C9c")
    assert {claims[name]["verdict"] for name in opened} == {"inconclusive"}
    assert claims["C6e"]["verdict"] == "supported", "the null expert costs no more than 0.03"
    first = [c["id"] for c in claims.values() if any(pair in ([1, 1], [2, 2], [3, 3]) for pair in c["seeds"])]
    assert not {"C3a", "C3b", "C3c", "C8a", "C8b", "C8c"} & set(first)


def test_all_overlays_of_the_grid_exist_and_definitions_differ() -> None:
    assert len({GRID.definition(name, ROOT) for name in GRID.all_variants}) == len(GRID.all_variants)
