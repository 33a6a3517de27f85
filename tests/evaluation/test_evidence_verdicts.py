# SPDX-License-Identifier: Apache-2.0
"""Verdicts on claims follow from made-up cells with known intervals, and the committed ones from theirs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.evidence.__main__ import ROOT
from benchmarks.grids import list_systems, load_file, load_grid
from moeapps.evidence.cells import CellError, CellResult, read_cells
from moeapps.evidence.evidence import Evidence, Place, all_results, to_json
from moeapps.evidence.grid import Cell, Claim, GridError, Ladder, Variant
from moeapps.evidence.report import render
from moeapps.evidence.summary import summarise
from tests.evaluation.evidence_common import TIE, WIN, result, results, toy

RESULTS = ROOT / "benchmarks" / "results"
PLAIN = Ladder({"plain": Variant()}, "moe", "dense", "unseen/miou", "higher", "")


# --- judging ---


def test_verdicts_of_made_up_cells_with_known_intervals() -> None:
    # Differences 0.01, 0.02, 0.03: the interval is 0.02 -+ 4.302653*0.01/sqrt(3) = [-0.00484138, 0.04484138].
    cells = results(moe=[0.51, 0.52, 0.53], dense=[0.5, 0.5, 0.5], same=[0.495, 0.495, 0.495])
    first, second = summarise(toy(), cells)["claims"]
    assert first["verdict"] == "inconclusive"
    assert first["diff_mean"] == pytest.approx(0.02)
    assert first["ci95"] == pytest.approx([-0.00484138, 0.04484138], abs=1e-8)
    assert second["verdict"] == "supported"
    assert second["ci95"] == pytest.approx([-0.005, -0.005])


def test_p_values_are_corrected_for_all_claims_that_were_tested() -> None:
    # Differences 0.01, 0.02, 0.03: t = 0.02 / (0.01 / sqrt(3)), p = 0.0741799; against 0.3: p = 0.0004.
    cells = results(moe=[0.51, 0.52, 0.53], dense=[0.5, 0.5, 0.5])
    bar = Claim("C2", "", "unseen/miou", "higher", "moe", baseline_value=0.3)
    exact = Claim("C3", "", "unseen/miou", "higher", "moe", "dense", "exact")
    unfair = Claim("C4", "", "unseen/miou", "higher", "moe", "wide")
    cells |= {
        replace(r, variant="wide").cell: replace(r, variant="wide", train_flops=9_000_000)
        for r in list(cells.values())
        if r.variant == "dense"
    }
    grid = toy({"moe": Variant(), "dense": Variant(), "wide": Variant()}, (WIN, bar, exact, unfair))
    found = summarise(grid, cells)
    first, second, third, fourth = found["claims"]

    assert (first["p"], first["p_holm"]) == pytest.approx((0.0741799, 0.0741799), abs=1e-7)
    assert second["p_holm"] == pytest.approx(2 * second["p"])
    assert (third["p"], third["p_holm"], fourth["p_holm"]) == (None, None, None)
    page = render([found])
    assert "| 0.074 (0.074) |" in page
    assert "| decided by an interval | corrected |" in page
    assert "| 2 | 0 | 1 | 1 | 1 | 1 |" in page  # one is decided by an interval, and still is after the correction


def test_rows_of_variants_are_averaged_over_the_seeds_that_most_of_them_have() -> None:
    """Eight seeds beside three would compare seeds: here each seed adds 0.1 and no variant adds anything."""
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    variants = {"moe": Variant(pairs=5), "dense": Variant(pairs=3), "same": Variant(pairs=3)}
    cells = results(moe=values, dense=values[:3], same=values[:2])
    seeds = tuple((seed, seed) for seed in range(1, 6))
    cells = {c: replace(r, train_flops=r.seed * 6) if r.variant == "dense" else r for c, r in cells.items()}
    found = summarise(toy(variants, (), seeds=seeds), cells)["variants"]

    assert {name: row["mean"]["unseen/miou"] for name, row in found.items()} == {
        "moe": pytest.approx(0.2),
        "dense": pytest.approx(0.2),
        "same": pytest.approx(0.15),
    }
    assert {name: (row["cells"], row["averaged"]) for name, row in found.items()} == {
        "moe": (5, 3),
        "dense": (3, 3),
        "same": (2, 2),
    }
    assert found["dense"]["train_flops"] == 12


def test_no_committed_claim_is_lost_to_cells_that_were_counted_in_two_ways() -> None:
    """Compute of seed 1 in some cells and of their own seed in others made two equal networks differ by 9 per cent."""
    for data in all_results(RESULTS):
        lost = [c["id"] for c in data["claims"] if "training FLOPs differ" in c["verdict"]]
        assert lost == [], data["system"]


def test_recomputing_gives_the_same_file_whatever_the_order_of_cells() -> None:
    cells = results(moe=[0.51, 0.52, 0.53], dense=[0.5, 0.5, 0.5], same=[0.49, 0.48, 0.47])
    shuffled = dict(sorted(cells.items(), key=lambda item: -item[0].seed))
    assert to_json(summarise(toy(), cells)) == to_json(summarise(toy(), shuffled))


def test_a_log_scale_compares_ratios_and_a_median_bar_needs_half_the_runs() -> None:
    half = {"scale": "log10", "rule": "median", "margin": 0.301, "match": "none"}
    claims = (
        Claim("C1", "Half the error.", "unseen/miou", "lower", "moe", "dense", **half),
        Claim("C2", "A bar.", "unseen/miou", "lower", "moe", baseline_value=0.01, **half),
        Claim("C3", "By ratio.", "unseen/miou", "lower", "moe", "dense", scale="log10"),
    )
    grid = toy({"moe": Variant(), "dense": Variant()}, claims)
    found = summarise(grid, results(moe=[0.001, 0.1, 0.9], dense=[0.004, 0.2001, 1.0]))["claims"]

    assert [claim["verdict"] for claim in found] == ["supported", "not supported", "inconclusive"]
    assert found[0]["diff_mean"] == pytest.approx(-0.30124, abs=1e-5)
    assert found[0]["ci95"] is None
    assert found[0]["system"] == [0.001, 0.1, 0.9], "cells are shown as they are"
    assert "log10 unseen/miou" in render([summarise(grid, {})])
    zero = summarise(grid, results(moe=[0.0, 0.1, 0.9], dense=[0.004, 0.2, 1.0]))["claims"][0]
    assert zero["verdict"].startswith("not tested (unseen/miou is not positive")
    with pytest.raises(GridError, match="positive values"):
        Claim("C1", "", "a/b", "lower", "moe", baseline_value=0.0, scale="log10")


def claim_verdict(claim: Claim, cells: dict[Cell, CellResult], **changes: Any) -> str:
    return summarise(toy(None, (claim,), **changes), cells)["claims"][0]["verdict"]


def test_equal_cost_per_row_is_not_equal_compute_where_one_trains_on_fewer_rows() -> None:
    cells = results(moe=[0.6, 0.6, 0.6], dense=[0.5, 0.5, 0.5])
    quarter = {c: replace(r, train_flops=1_500_000) if c.variant == "moe" else r for c, r in cells.items()}
    claim = summarise(toy(None, (WIN,)), quarter)["claims"][0]

    assert (claim["flops_ratio"], claim["train_flops_ratio"]) == (1.0, 0.25)
    assert claim["verdict"] == "not tested (training FLOPs differ by -75.0 per cent; at most 2 is fair)"
    assert "| 1.00× | 0.25× | 1.00× |" in render([summarise(toy(None, (WIN,)), quarter)])


def test_unfair_or_unusable_comparisons_are_not_tested() -> None:
    cells = results(moe=[0.6, 0.6, 0.6], dense=[0.5, 0.5, 0.5])
    assert claim_verdict(WIN, cells) == "supported"
    heavy = {c: replace(r, train_flops=6_300_000) if c.variant == "moe" else r for c, r in cells.items()}
    assert claim_verdict(WIN, heavy) == "not tested (training FLOPs differ by +5.0 per cent; at most 2 is fair)"
    assert claim_verdict(replace(WIN, match="none"), heavy) == "supported"
    assert claim_verdict(replace(WIN, match="params"), heavy) == "supported"
    unknown = {c: replace(r, train_flops=None) for c, r in cells.items()}
    assert claim_verdict(WIN, unknown) == "not tested (the cells do not say their training FLOPs)"
    mixed = {c: replace(r, definition="e") if c == Cell("moe", 2, 2) else r for c, r in cells.items()}
    assert claim_verdict(WIN, mixed) == "not tested (the cells of moe were made with different configs)"
    domains = {c: replace(r, domains=["street"]) if c == Cell("dense", 2, 2) else r for c, r in cells.items()}
    assert claim_verdict(WIN, domains) == "not tested (the cells were tested on different domains)"
    partial = {c: replace(r, metrics={**r.metrics, "street/miou": 0.5}) if c.seed == 1 else r for c, r in cells.items()}
    assert claim_verdict(WIN, partial) == "not tested (miou is not a number for some domains of some cells)"
    assert "has no finite 'unseen/f1'; it has seen/miou, unseen/miou" in claim_verdict(
        replace(WIN, metric="unseen/f1"), cells
    )
    assert (
        claim_verdict(Claim("C9", "Needs a data set we have not.", untested="no licence"), cells)
        == "not tested (no licence)"
    )


def test_claims_against_a_constant_within_a_model_and_on_differences_of_differences() -> None:
    cells = results(moe=[0.6, 0.61, 0.62], dense=[0.5, 0.5, 0.5], same=[0.55, 0.55, 0.55])
    cells = {
        c: replace(r, metrics={**r.metrics, "seen/miou": r.metrics["unseen/miou"] + 0.2}) for c, r in cells.items()
    }
    constant = Claim("A", "", "unseen/miou", "higher", "moe", baseline_value=0.4)
    within = Claim("B", "", "seen/miou", "higher", "moe", "moe", baseline_metric="unseen/miou")
    interaction = Claim("C", "", "unseen/miou", "higher", "moe", "same", minus=("dense", "dense"), match="none")
    exact = Claim("D", "", "params_total", "equal", "moe", "dense", "exact")
    found = {c["id"]: c for c in summarise(toy(None, (constant, within, interaction, exact)), cells)["claims"]}
    assert {c["verdict"] for c in found.values()} == {"supported"}
    assert found["A"]["baseline"] == [0.4, 0.4, 0.4]
    assert found["B"]["diff_mean"] == pytest.approx(0.2)
    assert found["C"]["system"] == pytest.approx([0.1, 0.11, 0.12])
    assert found["C"]["baseline"] == pytest.approx([0.05, 0.05, 0.05])
    assert (found["D"]["kind"], found["D"]["ci95"]) == ("exact", None)


def test_stale_cells_are_not_compared_with_fresh_ones_and_all_stale_ones_are() -> None:
    ladder = Ladder({"plain": Variant()}, "moe", "dense", "unseen/miou", "higher", "")
    grid, cells = toy(ladder=ladder), results(moe=[0.6] * 3, dense=[0.5] * 3, same=[0.5] * 3)

    def verdicts(*stale: str) -> list[str]:
        found = summarise(grid, cells, stale={cell for cell in cells if cell.variant in stale})
        return [*(claim["verdict"] for claim in found["claims"]), found["ladder"]["levels"][0].get("note", "compared")]

    told = "not tested (the cells of {} were made with configs that have changed since, others with today's)"
    assert verdicts() == verdicts("moe", "dense", "same") == ["supported", "supported", "compared"]
    assert verdicts("moe") == [told.format("moe"), "supported", told.format("moe")]
    assert verdicts("dense") == [told.format("dense")] * 3
    within = Claim("B", "", "unseen/miou", "higher", "moe", "same", minus=("dense", "dense"), match="none")
    stale = {cell for cell in cells if cell.variant != "dense"}
    found = summarise(toy(None, (within,)), cells, stale=stale)["claims"][0]["verdict"]
    assert found == told.format("moe, same")


def test_headline_pairs_use_all_the_seeds_both_variants_have() -> None:
    variants = {"moe": Variant(pairs=8), "dense": Variant(pairs=8), "same": Variant()}
    cells = results(moe=[0.6] * 8, dense=[0.5] * 8, same=[0.5] * 3)
    first, second = summarise(toy(variants), cells)["claims"]
    assert (len(first["seeds"]), len(second["seeds"])) == (8, 3)


def test_a_level_that_adds_nothing_shares_the_cells_of_the_variants() -> None:
    levels = {"plain": Variant(), "strong": Variant(flags=("--gain", "0.3"))}
    ladder = Ladder(levels, "moe", "dense", "unseen/miou", "higher", "Domains disagree more and more.", pairs=2)
    grid = toy({"moe": Variant(pairs=3), "dense": Variant(pairs=3)}, (), ladder=ladder)
    assert {cell.variant for cell in grid.cells()} == {"moe", "dense", "ladder-strong-moe", "ladder-strong-dense"}

    plain, strong = summarise(grid, results(moe=[0.6, 0.7, 0.9], dense=[0.5, 0.5, 0.5]))["ladder"]["levels"]

    assert (plain["system"], plain["baseline"]) == ([0.6, 0.7], [0.5, 0.5])
    assert strong["note"].startswith("not tested")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: toy(None, (replace(WIN, system="nobody"),)),
            "claim C1 names variant 'nobody'; defined are moe, dense, same",
        ),
        (lambda: toy(None, (WIN, WIN)), "repeat"),
        (lambda: toy({"Bad Name": Variant()}, ()), "lower case"),
        (lambda: toy({"moe": Variant(pairs=9)}, ()), "asks for 9 pairs"),
        (lambda: toy({"moe": Variant(pairs=1), "dense": Variant()}, (WIN,)), "at least two"),
        (lambda: toy(seeds=((1, 1), (1, 1), (2, 2))), "repeat a pair"),
        (lambda: replace(WIN, baseline=None), "either a baseline"),
        (lambda: replace(WIN, metric=""), "or a reason in 'untested'"),
        (lambda: replace(TIE, margin=0.0), "claim C2: margin=0"),
        (lambda: toy(ladder=Ladder({}, "nobody", "dense", "m", "higher", "")), "the ladder names variant"),
        (lambda: toy(headline=("nobody",)), "the headline names variant"),
        (
            lambda: toy({"moe": Variant(), "dense": Variant(pairs=2)}, (), ladder=PLAIN),
            "ladder level 'plain' needs 3 pairs of 'dense'",
        ),
    ],
)
def test_wrong_grids_say_what_is_wrong(make, message) -> None:
    with pytest.raises(GridError, match=message):
        make()


# --- the page ---


def test_page_does_not_depend_on_order_and_says_so_when_there_is_nothing() -> None:
    cells = results(moe=[0.51, 0.52, 0.53], dense=[0.5, 0.5, 0.5], same=[0.49, 0.48, 0.47])
    first, second = summarise(toy(), cells), {**summarise(toy(), {}), "system": "another"}
    assert render([first, second]) == render([second, first])
    assert "No system has been measured yet" in render([])
    assert "No system" not in render([first])


def test_page_shows_losses_as_plainly_as_wins() -> None:
    cells = results(moe=[0.4, 0.41, 0.42], dense=[0.5, 0.5, 0.5], same=[0.5, 0.5, 0.5])
    page = render([summarise(toy(), cells)])
    assert "| C1 | Experts help on unseen domains. | superiority | unseen/miou ↑ |" in page
    assert "−0.09 [−0.1148, −0.06516] | 0.0041 (0.0041) | 1.00× | 1.00× | 1.00× | **not supported** |" in page


# --- what is committed ---


def almost_equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(almost_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(almost_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, rel=1e-9, abs=1e-12)
    return bool(a == b)


def test_every_committed_interval_and_verdict_follows_from_its_cells() -> None:
    for data in all_results(RESULTS):
        file = load_file(data["system"])
        cells = read_cells(RESULTS / file.name / "cells", file.grid.system)
        stale = Evidence(file.grid, Place.of(file, ROOT)).stale()
        assert almost_equal(json.loads(to_json(summarise(file.grid, cells, file.command, stale))), data), file.name


def test_every_committed_grid_can_be_read_and_its_configs_exist() -> None:
    for system in list_systems():
        grid = load_grid(system)
        for name in grid.all_variants:
            assert grid.definition(name, ROOT)


def test_committed_page_follows_from_the_committed_results() -> None:
    page = ROOT / "docs" / "evidence.md"
    assert page.read_text(encoding="utf-8") == render(all_results(RESULTS), "benchmarks/results")


def test_the_geometric_mean_counts_every_domain_of_a_role_once_whatever_its_size() -> None:
    roles = {"kitchen": "seen", "hall": "seen", "street": "unseen"}
    metrics = {"kitchen/mse": 1e-4, "hall/mse": 1.0, "street/mse": 7.0, "seen/mse": 0.50005}
    cell = result("moe", 1, 0.0, domains=list(roles), roles=roles, metrics=metrics)

    assert cell.value("geometric.seen/mse") == pytest.approx(1e-2)  # the root of 1e-4 times 1
    ten_times = replace(cell, metrics={**metrics, "kitchen/mse": 1e-3})
    assert ten_times.value("geometric.seen/mse") == pytest.approx(1e-2 * 10**0.5)
    assert not replace(cell, metrics={**metrics, "hall/mse": -1.0}).has("geometric.seen/mse")
    assert not replace(cell, roles={}).has("geometric.seen/mse")
    with pytest.raises(CellError, match=r"no finite 'geometric.seen/miou'"):
        cell.value("geometric.seen/miou")
