# SPDX-License-Identifier: Apache-2.0
"""A cell may be a chain of stages: one command, whose definition holds every stage; other cells are as they were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.grids import list_systems, load_grid
from benchmarks.rates import RateSearch
from moeapps.evidence.cells import CellResult
from moeapps.evidence.grid import Cell, Grid, GridError, Ladder, Variant
from moeapps.evidence.runner import Failure, Runner

ROOT = Path(__file__).resolve().parents[2]
CHAIN = Variant(flags=("--x=1",), stages=(("0.yaml",), ("1.yaml", "--trainer.max_steps=9")))


def grid(variant: Variant = CHAIN, **options: object) -> Grid:
    return Grid("toy", "base.yaml", {"chain": variant, "dense": Variant()}, claims=(), **options)  # type: ignore[arg-type]


def definition(folder: Path, variant: Variant, **files: str) -> str:
    for name, text in {"base": "a: 1\n", "0": "b: 1\n", "1": "c: 1\n", **files}.items():
        (folder / f"{name.removeprefix('_')}.yaml").write_text(text, encoding="utf-8")
    return grid(variant).definition("chain", folder)


def test_the_words_of_a_chain_are_those_of_moeapps_curriculum() -> None:
    assert grid().arguments(Cell("chain", 2, 3)) == [
        *("curriculum", "--config", "base.yaml", "--x=1", "--seed_everything", "2", "--data.seed", "3"),
        *("--system", "toy", "--name", "chain-s2-d3", "--stage", "0.yaml"),
        *("--stage", "1.yaml", "--trainer.max_steps=9"),
    ]
    assert grid().arguments(Cell("dense", 1, 1))[0] == "fit"


def test_every_stage_and_its_words_count_in_the_definition(tmp_path: Path) -> None:
    given = definition(tmp_path, CHAIN)
    assert definition(tmp_path, CHAIN, _1="# why\nc: 1\n") == given
    others = (
        definition(tmp_path, CHAIN, _1="c: 2\n"),
        definition(tmp_path, replace(CHAIN, stages=CHAIN.stages[::-1])),
        definition(tmp_path, replace(CHAIN, stages=CHAIN.stages[:1])),
        definition(tmp_path, replace(CHAIN, stages=(("0.yaml",), ("1.yaml", "--trainer.max_steps=8")))),
        definition(tmp_path, replace(CHAIN, stages=())),
    )
    assert len({given, *others}) == 6
    with pytest.raises(GridError, match=r"'chain': cannot read 2\.yaml"):
        definition(tmp_path, replace(CHAIN, stages=(("2.yaml",),)))


def test_a_ladder_and_a_search_of_rates_keep_the_stages(tmp_path: Path) -> None:
    ladder = Ladder({"hard": Variant(flags=("--hard=1",))}, "chain", "dense", "seen/loss", "lower", "How hard.")
    level = grid(ladder=ladder).all_variants["ladder-hard-chain"]
    assert (level.flags, level.stages) == (("--x=1", "--hard=1"), CHAIN.stages)
    search = RateSearch("toy", "", {"chain": CHAIN}, "m", (0.1,), (), (), 100, (), tmp_path / "rates.json")
    assert search.grid().variants["chain-0.1"].stages == CHAIN.stages


RESULTS = ROOT / "benchmarks" / "results"
RUN = [name for name in list_systems() if any((RESULTS / name / "cells").glob("*.json"))]
"""Grids that have finished cells."""


@pytest.mark.parametrize("system", RUN)
def test_definitions_of_finished_cells_are_what_they_were(system: str) -> None:
    """Whether a cell is fresh must not depend on what grids have learned since."""
    loaded = load_grid(system)
    held: dict[str, set[str]] = {}
    for path in (RESULTS / system / "cells").glob("*-s1-d1.json"):
        cell = json.loads(path.read_text(encoding="utf-8"))
        held.setdefault(cell["variant"], set()).add(cell["definition"])
    fresh = [name for name in loaded.all_variants if loaded.definition(name, ROOT) in held.get(name, ())]
    assert len(fresh) > 0.9 * len(held) > 0


@pytest.mark.medium
@pytest.mark.usefixtures("no_routing_figures")
def test_a_chain_is_run_and_its_cell_counts_all_stages(tmp_path: Path) -> None:
    start = "{class_path: moeapps.training.stages.FromCheckpoint, init_args: {path: runs/none}}"
    for number, text in enumerate(("name: a\n", f"model: {{init_args: {{start: {start}}}}}\n")):
        (tmp_path / f"{number}.yaml").write_text(text + "trainer: {max_epochs: 1}\n", encoding="utf-8")
    stages = tuple((str(tmp_path / f"{number}.yaml"),) for number in range(2))
    quiet = ("--trainer.enable_progress_bar=false",)
    toy = Grid(
        "toy",
        "tests/toy.yaml",
        {
            "chain": Variant(stages=stages, pairs=1, flags=quiet),
            "one": Variant(flags=("--trainer.max_epochs=2", *quiet), pairs=1),
        },
        claims=(),
    )
    found: list[CellResult] = []
    failures: list[Failure] = []
    Runner(toy, ROOT, tmp_path / "work", jobs=1).run(toy.cells(), found.append, failures.append)

    assert failures == []
    assert [result.variant for result in found] == ["chain", "one"]
    assert found[0].train_flops == found[1].train_flops
