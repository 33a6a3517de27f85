# SPDX-License-Identifier: Apache-2.0
"""A finished cell can be counted again: without training, and without a change of what it measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.grids import load_grid
from moeapps.evidence.cells import cell_path, read_cells, write_cell
from moeapps.evidence.grid import Cell, Grid, Variant
from moeapps.evidence.recount import count_variant, rewrite
from tests.evaluation.evidence_common import result

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--trainer.accelerator=cpu", "--data.init_args.batch_size=6", "--trainer.max_epochs=2")
VARIANTS = {"moe": Variant(flags=FLAGS), "long": Variant(flags=(*FLAGS, "--trainer.max_epochs=8"))}
TOY = Grid("toy", "tests/toy.yaml", VARIANTS, ())


def test_a_variant_is_counted_without_a_step_or_a_file() -> None:
    before = sorted((ROOT / "runs").glob("*")) if (ROOT / "runs").exists() else []
    found, long = (count_variant(TOY, name, ROOT) for name in ("moe", "long"))

    # By hand, widths 2 - 8 - (router of 4, two gated experts of width 8) - 2; the inputs ask for no gradient.
    layers = 2 * (2 * 8 + 8 * 4 + 2 * 3 * 8 * 8 + 8 * 2)
    step = 6 * (3 * layers - 2 * 2 * 8)
    assert found["flops_per_token"] == layers
    assert found["train_flops"] == 2 * 12 * step  # 72 rows of three domains in batches of 6
    assert long["train_flops"] == 4 * found["train_flops"]
    assert sorted((ROOT / "runs").glob("*") if (ROOT / "runs").exists() else []) == before


def test_only_what_was_counted_changes_and_only_in_cells_of_the_variant_as_it_is(tmp_path: Path) -> None:
    cells = [result("moe", seed, 0.1 * seed, train_flops=None) for seed in (1, 2)]
    cells += [result("dense", 1, 0.3), result("moe", 3, 0.4, definition="other")]
    for cell in cells:
        write_cell(tmp_path, cell)
    others = [cell_path(tmp_path, cell) for cell in (Cell("dense", 1, 1), Cell("moe", 3, 3))]
    texts = [path.read_text() for path in others]

    rewrite(tmp_path, "toy", "moe", "d", {"flops_per_token": 3.0, "params_active": 4, "train_flops": 5})

    counted = {"flops_per_token": 3.0, "params_active": 4, "train_flops": 5}
    found = read_cells(tmp_path, "toy")
    assert [found[c.cell] for c in cells[:2]] == [replace(c, **counted) for c in cells[:2]]
    assert [path.read_text() for path in others] == texts


@pytest.mark.parametrize("system", ["home", "mixer", "point_moe", "promoe"])
def test_every_committed_cell_of_the_present_configs_says_what_its_training_has_cost(system: str) -> None:
    grid = load_grid(system)
    now = {grid.definition(name, ROOT) for name in grid.all_variants}
    cells = read_cells(ROOT / "benchmarks" / "results" / system / "cells", system).values()
    silent = [cell.cell.stem for cell in cells if cell.definition in now and not cell.train_flops]
    assert not silent, f"python -m benchmarks.evidence {system} --recount counts {silent}"
