# SPDX-License-Identifier: Apache-2.0
"""The evidence grid of HoME is what was agreed before the runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.grids import load_grid
from benchmarks.home_rates import SEARCH
from moeapps.evaluation.statistics import paired_t_interval
from moeapps.evidence.cells import read_cells
from moeapps.evidence.grid import Cell, overlaid

ROOT = Path(__file__).resolve().parents[2]
GRID = load_grid("home")


def load(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_headline_pair_has_five_data_seeds_of_three_model_seeds_each() -> None:
    pairs = GRID.pairs("home", "mmoe")
    assert len(pairs) == len({seed for seed, _ in pairs}) == 15
    assert {d: sum(data == d for _, data in pairs) for _, d in pairs} == dict.fromkeys(range(1, 6), 3)
    assert [d for _, d in GRID.pairs("home", "ple")] == [1, 2, 3, 4, 5]
    assert len(GRID.pairs("home_ml100k", "mmoe_ml100k")) == 8
    assert len(GRID.pairs("once_home", "once_mmoe")) == 8
    assert len(GRID.cells()) <= 200


def test_every_claim_of_the_card_is_tested_with_a_margin_set_beforehand() -> None:
    assert {claim.id[:2] for claim in GRID.claims} == {f"C{i}" for i in range(1, 10)}
    assert not [claim.id for claim in GRID.claims if claim.untested]  # C8 and C9 are ours: layer norm, one pass
    assert {claim.margin for claim in GRID.claims if claim.id[:2] in ("C5", "C6")} == {0.005}
    assert {claim.margin for claim in GRID.claims if claim.id[:2] == "C4"} == {0.0}
    assert [claim.id for claim in GRID.claims if not claim.clustered] == ["C6a", "C6b", "C6c", "C6d"]


def test_each_claim_stays_within_one_regime() -> None:
    for claim in GRID.claims:
        assert {name.startswith("once_") for name in claim.variants} == {claim.id.startswith("C9")}, claim.id


def test_one_pass_is_the_base_and_each_network_has_the_rate_found_for_it() -> None:
    base = load(ROOT / GRID.config)
    assert base["trainer"]["max_epochs"] == 1
    best = json.loads((ROOT / "benchmarks" / "results" / "home_rates.json").read_text())["best"]
    assert set(best) == set(SEARCH.models)
    for model, rate in best.items():
        merged = base
        for overlay in GRID.variants[f"once_{model}"].overlays:
            merged = overlaid(merged, load(ROOT / overlay))
        assert merged["model"]["init_args"]["optimizer"]["lr"] == rate, model


def test_the_rates_are_the_best_of_the_runs_on_the_validation_domain() -> None:
    found = json.loads(SEARCH.path.read_text(encoding="utf-8"))
    assert found["best"] == SEARCH.best(found["runs"])
    assert {SEARCH.name(m, r) for m in SEARCH.models for r in SEARCH.rates} <= set(found["runs"])
    assert not [model for model in SEARCH.models if SEARCH.missing(found["runs"], model)]
    assert {metric.split("/")[0].split(".")[0] for run in found["runs"].values() for metric in run} == {
        "validation",
        "cpu_s",
    }
    assert SEARCH.seed not in {number for pair in GRID.seeds for number in pair}


def test_higher_rates_are_tried_while_the_highest_is_the_best() -> None:
    def runs(*scores: float) -> dict[str, dict[str, float]]:
        rates = (*SEARCH.rates, *SEARCH.further)
        return {SEARCH.name("mmoe", r): {SEARCH.metric: s} for r, s in zip(rates, scores, strict=False)}

    search = replace(SEARCH, models={"mmoe": SEARCH.models["mmoe"]})
    assert search.missing({}, "mmoe") == list(search.rates)
    assert search.missing(runs(0.1, 0.4, 0.3, 0.2), "mmoe") == []
    assert search.missing(runs(0.1, 0.2, 0.3, 0.4), "mmoe") == [1.6e-2]
    assert search.missing(runs(0.1, 0.2, 0.3, 0.4, 0.3), "mmoe") == []
    assert search.best(runs(0.1, 0.2, 0.3, 0.4, 0.3)) == {"mmoe": 8e-3}
    assert search.missing(runs(0.1, 0.2, 0.3, 0.4, 0.5), "mmoe") == [3.2e-2]


def test_all_overlays_of_the_grid_exist_and_every_baseline_is_in_it() -> None:
    assert len({GRID.definition(name, ROOT) for name in GRID.all_variants}) == len(GRID.all_variants)
    used = {overlay for variant in GRID.all_variants.values() for overlay in variant.overlays}
    shipped = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/baselines/home_*.yaml")}
    assert shipped <= used


def test_the_page_names_the_rate_of_the_regimes_that_have_one_for_all() -> None:
    """It once named three that were tried, and the cells had a fourth."""
    for overlay in ("home_four_passes", "home_ml100k"):
        settings = load(ROOT / "benchmarks" / "evidence" / f"{overlay}.yaml")
        rate = settings["model"]["init_args"]["optimizer"]["lr"]
        assert f"one learning rate for all, {rate * 1000:g}e-3, set by hand between" in GRID.choice


def test_real_data_have_no_data_seed_but_an_order() -> None:
    cells = {cell.variant: GRID.arguments(cell) for cell in GRID.cells()}
    assert "--data.init_args.source.init_args.data_seed" not in cells["home_ml100k"]
    assert "--data.init_args.seed" in cells["home_ml100k"]
    assert "--data.init_args.source.init_args.data_seed" in cells["ladder-conflict-mmoe"]


def test_the_readme_tells_wins_and_losses_as_they_were_found() -> None:
    claims = {c["id"]: c for c in json.loads((ROOT / "benchmarks" / "results" / "home.json").read_text())["claims"]}
    points = {name: f"{100 * abs(c['diff_mean']):.1f}" for name, c in claims.items()}
    told = re.sub(r"\s+", " ", (ROOT / "tasks" / "recommendation" / "README.md").read_text(encoding="utf-8"))

    def interval(name: str) -> str:
        return "[" + ", ".join(f"{100 * end:+.1f}".replace("-", "−") for end in claims[name]["ci95"]) + "]"

    cells = read_cells(ROOT / "benchmarks" / "results" / "home" / "cells", "home")
    dense = [
        [cells[Cell(name, *pair)].value("seen.watch/gauc_expected") for pair in GRID.pairs("once_mmoe_flops")]
        for name in ("once_home", "once_mmoe_flops")
    ]
    equal = paired_t_interval(*dense)
    beside = f"{100 * equal.mean:.1f} [{100 * equal.low:+.1f}, {100 * equal.high:+.1f}] (three seeds; not asked"
    pairs = list(zip(claims["C9a"]["system"], claims["C9a"]["baseline"], strict=True))
    for sentence in (
        f"beats MMoE of equal parameters by {points['C9b']} {interval('C9b')}, at "
        f"{claims['C9b']['train_flops_ratio']:.2f} times its training FLOPs, and MMoE of equal training FLOPs by "
        f"{beside} "
        "beforehand). On the rare tasks it is ahead by "
        f"{points['C9a']}, in {sum(a > b for a, b in pairs)} of {len(pairs)} runs; over five data seeds that is not "
        f"certain {interval('C9a')}. Beside MMoE of equal training FLOPs it is ahead by {points['C9d']} "
        f"{interval('C9d')} there.",
        f"PLE is ahead by {points['C9f']} and a network per task by {points['C9h']}; beside CGC and AdaTT nothing is "
        f"decided (HoME +{points['C9e']} {interval('C9e')} and +{points['C9g']} {interval('C9g')}).",
        f"by {points['C9i']} and an MMoE with layer norm by {points['C9j']} on the rare tasks.",
        f"loses to MMoE by {points['C4a']}, to CGC by {points['C4b']}, to PLE by {points['C4c']} and to a network per "
        f"task by {points['C4e']}; gates that weigh all experts equally beat its learned ones by {points['C4g']}.",
        f"it loses nothing (+{points['C5']}).",
        f"HoME loses {points['C6a']} to MMoE on seen domains and {points['C6b']} on unseen ones; with layer norm in "
        f"both the differences are −{points['C6c']} {interval('C6c')} and +{points['C6d']} {interval('C6d')}.",
        f"The given categories beat random ones by {points['C4f']}",
        f"batch-normed experts HoME gains {points['C4d']}",
        f"beats its published form by {points['C8a']}, MMoE by {points['C8b']}, and an MMoE with layer norm by "
        f"{points['C8c']}.",
    ):
        assert sentence in told, sentence
    signs = {name: c["diff_mean"] > 0 for name, c in claims.items()}
    lost = ("C4a", "C4b", "C4c", "C4e", "C4g", "C6a", "C6b", "C6c", "C9f", "C9h")
    won = ("C4d", "C4f", "C5", "C6d", "C8a", "C8b", "C8c", "C9a", "C9b", "C9d", "C9e", "C9g", "C9i", "C9j")
    assert [name for name in (*lost, *won) if signs[name] != (name in won)] == []
    assert {claims[name]["verdict"] for name in ("C9b", "C9i", "C9j")} == {"supported"}
    assert {claims[name]["verdict"] for name in ("C9a", "C9e", "C9g")} == {"inconclusive"}
    assert {claims[name]["verdict"] for name in ("C9f", "C9h")} == {"not supported"}


def test_the_readme_quotes_the_measured_step_costs() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "recommendation_speed.json").read_text())["rows"]
    value = {row["name"]: f"{row['value']:.2f}" for row in rows}
    told = re.sub(r"\s+", " ", (ROOT / "tasks" / "recommendation" / "README.md").read_text(encoding="utf-8"))

    assert f"HoME {value['home']}, MMoE {value['mmoe']}; sparse gradients cost {value['sparse']} of dense" in told
    assert all(row["ok"] for row in rows if row["name"] in ("home", "mmoe"))
