# SPDX-License-Identifier: Apache-2.0
"""Finished cells run again: which are drawn, what they are held to, and what is told."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moeapps.commands.evidence import parser, run_grid
from moeapps.evidence.cells import beside_seeds
from moeapps.evidence.grid import Claim, GridError, Ladder, Variant
from moeapps.evidence.reading import GridFile
from tests.evaluation.evidence_common import evidence, fill, result, toy


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return fill(tmp_path)


def test_verify_accepts_equal_numbers_and_refuses_others(repository: Path, monkeypatch) -> None:
    runs, console = evidence(repository, toy({"dense": Variant(pairs=3)}, ()))
    runs.run()
    before = (runs.cells_folder / "dense-s1-d1.json").read_text()
    assert runs.verify(2, seed=0) == 0
    monkeypatch.setenv("DRIFT", "1e-7")
    assert runs.verify(1, seed=0) == 0
    monkeypatch.setenv("DRIFT", "1e-5")
    assert runs.verify(1, seed=0) == 1
    assert "DIFFERS" in console.export_text()
    assert (runs.cells_folder / "dense-s1-d1.json").read_text() == before, "verifying changes no cell"
    with pytest.raises(GridError, match="only 3 cells"):
        runs.verify(4)


def test_verify_draws_of_the_variants_that_are_named_and_stops_what_takes_long(repository: Path, monkeypatch) -> None:
    runs, console = evidence(repository, toy({"dense": Variant(pairs=2), "moe": Variant(pairs=2)}, ()))
    runs.run()
    assert runs.verify(2, only="mo*") == 0
    text = console.export_text()
    assert all(f"{cell}: the same numbers" in text for cell in ("moe-s1-d1", "moe-s2-d2"))
    with pytest.raises(GridError, match=r"--verify 3: only 2 cells of --only 'mo\*' are finished"):
        runs.verify(3, only="mo*")
    with pytest.raises(GridError, match="matches no variant"):
        runs.verify(1, only="nothing")
    with pytest.raises(GridError, match="matches no variant"):
        runs.recount(only="nothing")
    monkeypatch.setenv("PAUSE", "60")
    assert runs.verify(1, timeout_s=1.0) == 1
    assert "stopped after 1 s" in console.export_text()


def test_the_command_verifies_what_it_is_told_and_names_results_that_lie_elsewhere(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch
) -> None:
    monkeypatch.setattr("moeapps.evidence.checks.check_words", lambda *_: None)  # the program has words of its own
    results = tmp_path_factory.mktemp("results")
    grid = toy({"dense": Variant(pairs=2), "moe": Variant(pairs=2)}, ())
    file = GridFile(Path("toy.yaml"), grid, results, results / "evidence.md", "moeapps evidence toy.yaml")

    def told(*words: str) -> tuple[int, str]:
        _, console = evidence(repository, grid)
        command = (sys.executable, str(repository / "fake.py"))
        options = parser().parse_args(["toy.yaml", *words])
        return run_grid(file, options, console=console, root=repository, command=command), console.export_text()

    status, text = told()
    assert status == 0
    assert f"results: {results / 'toy.json'}, {results / 'evidence.md'}" in text
    status, text = told("--verify", "2", "--only", "mo*")
    assert status == 0
    assert all(f"{cell}: the same numbers" in text for cell in ("moe-s1-d1", "moe-s2-d2"))
    monkeypatch.setenv("PAUSE", "60")
    status, text = told("--verify", "1", "--timeout", "0.02")
    assert status == 1
    assert "stopped after 1 s" in text


def test_what_no_claim_and_no_table_uses_is_verified_by_all_that_was_measured(repository: Path, monkeypatch) -> None:
    runs, console = evidence(repository, toy({"dense": Variant(pairs=3)}, (), show=()))
    monkeypatch.setenv("KERNELS", "AVX512")
    runs.run()
    monkeypatch.setenv("KERNELS", "AVX2")
    monkeypatch.setenv("DRIFT", "0.5")
    assert runs.verify(1, seed=0) == 1
    assert "DIFFERS" in console.export_text()


def test_what_is_compared_is_what_claims_tables_and_the_ladder_use(repository: Path) -> None:
    """A geometric mean is in no cell under its name, and a claim may have another metric of its baseline."""
    claim = Claim("C1", "", "geometric.seen/miou", "higher", "moe", "dense", baseline_metric="hall/miou", scale="log10")
    ladder = Ladder({"hard": Variant(flags=("--gain", "0"))}, "moe", "dense", "unseen/miou", "higher", "")
    runs, _ = evidence(repository, toy(None, (claim,), show=("seen/miou",), ladder=ladder))
    log = {"geometric.seen/miou": "log10", "hall/miou": "log10"}
    assert runs._used_metrics("moe") == {"seen/miou": "linear", **log}
    assert runs._used_metrics("ladder-hard-moe") == {"seen/miou": "linear", "unseen/miou": "linear"}
    assert runs._used_metrics("same") == {"seen/miou": "linear"}


# Seeds 1 to 3 of each of two variants score 0.51, 0.52, 0.53: their standard deviation is 0.01, with 4 degrees of
# freedom. Student's t there is 4.604 at 0.995 (one metric; any table of it), so two seeds differ by up to
# 4.604 * sqrt(2) * 0.01 = 0.06511.
@pytest.mark.parametrize(
    ("made_with", "run_with", "drift", "bad"),
    [
        ("AVX2", "AVX512", 1e-3, 0),
        ("AVX2", "AVX512", 0.0650, 0),
        ("AVX2", "AVX512", 0.0652, 1),
        ("AVX2", "AVX2", 1e-3, 1),
        ("", "AVX2", 1e-3, 0),  # a cell older than the field
        ("", "AVX2", 0.07, 1),
    ],
)
def test_other_arithmetic_is_held_to_what_two_seeds_differ_by(
    repository: Path, monkeypatch, made_with: str, run_with: str, drift: float, bad: int
) -> None:
    runs, console = evidence(repository, toy({"dense": Variant(pairs=3), "moe": Variant(pairs=3)}, ()))
    monkeypatch.setenv("KERNELS", made_with)
    runs.run()
    assert {cell.instruction_set for cell in runs.read().values()} == {made_with}
    assert {cell.threads for cell in runs.read().values()} == {1}
    monkeypatch.setenv("KERNELS", run_with)
    monkeypatch.setenv("DRIFT", str(drift))

    assert runs.verify(1, seed=0) == bad

    text = " ".join(console.export_text().split())
    if made_with != run_with:
        assert f"made with {made_with or 'an unknown instruction set'}" in text
        assert f"{drift / 0.01:.2g} of the standard deviation over seeds" in text
    assert ("DIFFERS" in text) == bool(bad)


def test_the_seeds_of_one_variant_are_not_mixed_with_the_next_ones() -> None:
    """Two variants far apart, each steady: the difference between variants is no spread over seeds."""
    cells = [result("dense", seed, 0.1 + seed / 1e4) for seed in (1, 2, 3)]
    cells += [result("moe", seed, 0.9 + seed / 1e4) for seed in (1, 2, 3)]
    name = next(iter(cells[0].metrics))
    moved = replace(cells[0], metrics={**cells[0].metrics, name: cells[0].metrics[name] + 0.001})

    lines, largest = beside_seeds(cells[0], moved, cells, {name: "linear"})

    assert len(lines) == 1  # 0.001 is ten times the spread of 1e-4; two seeds differ by 6.5 times at most
    assert "10 of the standard deviation" in largest


@pytest.mark.parametrize(("old", "new", "lines"), [(0.0, 0.1, 1), (0.1, -0.1, 1), (0.0, 0.0, 0), (0.10, 0.11, 0)])
def test_a_value_without_a_logarithm_is_told_and_ends_nothing(old: float, new: float, lines: int) -> None:
    cells = [result("dense", seed, value) for seed, value in ((1, old), (2, 0.2), (3, 0.0), (4, 0.3))]

    found, _ = beside_seeds(cells[0], result("dense", 1, new), cells, {"unseen/miou": "log10"})

    assert [line.endswith("has no logarithm to be compared by") for line in found] == [True] * lines


def test_a_geometric_mean_is_compared_though_no_cell_has_it_by_name() -> None:
    cells = [
        result("dense", s, 0.0, roles={"kitchen": "seen"}, domains=["kitchen"], metrics={"kitchen/mse": 0.1 + s / 1e4})
        for s in (1, 2, 3)
    ]
    moved = replace(cells[0], metrics={"kitchen/mse": 0.2})
    found, largest = beside_seeds(cells[0], moved, cells, {"geometric.seen/mse": "linear"})
    assert len(found) == 1
    assert largest.startswith("the largest difference is geometric.seen/mse: 0.1001 before, 0.2 now")
