# SPDX-License-Identifier: Apache-2.0
"""The evidence grid of AW-MoE is what was agreed before the runs, and its searches are what the files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import aw_moe_contrast
from benchmarks.aw_moe_rates import GENERATED, REAL
from benchmarks.grids import given, load_grid
from benchmarks.rates import RATE, RateSearch

ROOT = Path(__file__).resolve().parents[2]
GRID = load_grid("aw_moe")
HEADLINE = ("aw_moe", "din_wide", "category_wide")
WIDE = ("din", "category", "mmoe", "no_attention", "dense")
"""Networks that were widened until they have the training compute of AW-MoE."""


def test_headline_pairs_have_eight_seeds_on_both_logs_for_all_users_and_the_long_tail() -> None:
    assert GRID.headline == tuple(f"{log}{name}" for log in ("", "ml_") for name in HEADLINE)
    for log in ("", "ml_"):
        for rival in HEADLINE[1:]:
            assert len(GRID.pairs(f"{log}aw_moe", f"{log}{rival}")) == 8
            metrics = {claim.metric for claim in GRID.claims if claim.variants == (f"{log}aw_moe", f"{log}{rival}")}
            assert any("tail" in metric or "truncated" in metric for metric in metrics)
            assert any(metric in ("seen/list_auc", "seen/list_auc_expected") for metric in metrics)


def test_the_claims_are_those_of_the_page_and_margins_were_set_beforehand() -> None:
    assert {claim.id[:2] for claim in GRID.claims} == {f"C{i}" for i in range(1, 9)}
    assert [claim.id for claim in GRID.claims if claim.untested] == ["C5"]  # an identity, which tests hold
    assert {claim.margin for claim in GRID.claims if claim.rule == "non-inferiority"} == {0.003}
    real = [claim for claim in GRID.claims if claim.system.startswith("ml_") and claim.kind == "statistical"]
    assert {claim.clustered for claim in real} == {False}


def test_no_claim_compares_unequal_compute_without_saying_so() -> None:
    for claim in GRID.claims:
        if claim.match == "none" and claim.baseline is not None and claim.baseline != claim.system:
            assert "compute" in claim.text or claim.metric in ("seen/gate_same", "seen/truncation_gap"), claim.id


@pytest.mark.parametrize("name", sorted(WIDE))
def test_widened_rivals_have_the_training_compute_of_aw_moe(name: str) -> None:
    """From the committed cells: what the runs themselves counted."""
    folder = ROOT / "benchmarks" / "results" / "aw_moe" / "cells"
    variant = name if name in ("no_attention", "dense") else f"{name}_wide"
    for log in ("", "ml_"):
        flops = {
            key: json.loads((folder / f"{log}{key}-s1-d1.json").read_text())["train_flops"]
            for key in ("aw_moe", variant)
        }
        assert flops[variant] == pytest.approx(flops["aw_moe"], rel=0.02), log


@pytest.mark.parametrize(("search", "log"), [(GENERATED, ""), (REAL, "ml_")])
def test_rates_are_the_best_of_the_runs_on_the_validation_domain(search: RateSearch, log: str) -> None:
    found = json.loads(search.path.read_text(encoding="utf-8"))
    assert found["best"] == search.best(found["runs"])
    assert not [model for model in search.models if search.missing(found["runs"], model)]
    assert {metric.split("/")[0] for run in found["runs"].values() for metric in run} == {"validation", "cpu_s"}
    assert found["best"] == {
        name: float(given(GRID.variants[f"{log}{name}"], RATE) or "nan")
        for name in ("aw_moe", "din_wide", "category_wide", "mmoe_wide", "no_attention", "dense", "dnn")
    }
    assert search.seed not in {number for pair in GRID.seeds for number in pair}


def test_contrast_was_swept_over_twelve_settings_on_each_log_and_the_overlay_has_the_best() -> None:
    found = json.loads(aw_moe_contrast.RESULTS.read_text(encoding="utf-8"))
    assert found["best"] == aw_moe_contrast.best(found["runs"])
    assert set(found["means"]) == set(aw_moe_contrast.settings())
    assert sum(name.startswith("w0") for name in found["means"]) == 12
    assert sum(name.startswith("ml_w0") for name in found["means"]) == 12
    assert not {seed for seed, _ in aw_moe_contrast.SEEDS} & {number for pair in GRID.seeds for number in pair}
    overlay: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "baselines" / "aw_moe_contrast.yaml").read_text())
    options = overlay["model"]["init_args"]
    name = f"ml_w{options['contrast_weight']:g}_t{options['temperature']:g}_p{options['mask_probability']:g}"
    assert name == found["best"]["ml100k"]


def test_the_readme_tells_wins_ties_and_losses_as_they_were_found() -> None:
    claims = {c["id"]: c for c in json.loads((ROOT / "benchmarks/results/aw_moe.json").read_text())["claims"]}
    told = " ".join((ROOT / "tasks/recommendation/README.md").read_text(encoding="utf-8").split())

    def points(name: str, sign: str = "+") -> str:
        values = [100 * claims[name]["diff_mean"], *(100 * end for end in claims[name]["ci95"])]
        shown = [f"{value:{'+' if i else sign}.1f}".replace("-", "−") for i, value in enumerate(values)]
        return f"{shown[0]} [{shown[1]}, {shown[2]}]"

    groups = claims["C6a"]["system"]
    for sentence in (
        f"AW-MoE gains {points('C1a', '')} and {points('C1d', '')} on seen domains, {points('C1c', '')} and "
        f"{points('C1f', '')} on unseen ones",
        f"{points('C1b')} for users with few past items, {points('C1e')} for histories that are cut",
        f"gate on the category (eight seeds) it gains {points('C2a', '')} and {points('C2d', '')}.",
        f"(three seeds) nothing is decided: {points('C7a')} and {points('C7b')}. Beside MMoE's gate it is open on the "
        f"generated log, {points('C8a')}, and a gain on MovieLens, {points('C8b')}.",
        f"a cut history costs {points('C4a')} and {points('C4c')} points more than without, and "
        f"{points('C4e', '')} and {points('C4f', '')} more than with past items dropped alone.",
        f"above 0.8 in {sum(value > 0.8 for value in groups)} of {len(groups)} runs, "
        f"{sum(groups) / len(groups):.2f} on average",
    ):
        assert sentence in told, sentence
    verdicts = {name: claims[name]["verdict"] for name in claims}
    assert {verdicts[name] for name in ("C1b", "C1d", "C1e", "C7a", "C7b", "C8a", "C4a", "C4c")} == {"inconclusive"}
    left = [c["id"] for c in claims.values() if c["p_holm"] is not None and c["p_holm"] < 0.05]
    assert left == ["C2d", "C2f"], "the README says what is left"


def test_all_overlays_of_the_grid_exist_and_definitions_differ() -> None:
    assert len({GRID.definition(name, ROOT) for name in GRID.all_variants}) == len(GRID.all_variants)
