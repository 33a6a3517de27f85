# SPDX-License-Identifier: Apache-2.0
"""What a variant costs, counted again without training it: for cells that were made before the count was mended."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L

from moeapps.commands.run import Cli, import_tasks, quiet
from moeapps.evidence.cells import CellResult, read_cells, write_cell
from moeapps.evidence.grid import Cell, Grid
from moeapps.training.callbacks import MoESummary
from moeapps.training.cost import Cost, TrainingCost

COUNTED = ("flops_per_token", "params_active", "train_flops")


class _CountedError(Exception):
    """Raised when the count is there, so that no step is taken."""


class _Stop(L.Callback):
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise _CountedError


def count_variant(grid: Grid, variant: str, root: Path) -> dict[str, float]:
    """Build a variant with its first pair of seeds and count a batch of it and one training step of each kind.

    Args:
        grid: the grid.
        variant: its name.
        root: the repository, where configs are looked for.

    Returns:
        The fields of a cell that are named in ``COUNTED``.
    """
    words = grid.arguments(Cell(variant, *grid.pairs(variant)[0]))[1:]
    with apart(root):
        quiet()
        import_tasks(words)
        cli = Cli(words, run=False)
        summary = MoESummary()
        trainer: Any = cli.trainer
        trainer.callbacks = [summary, _Stop()]
        with suppress(_CountedError), redirect_stdout(io.StringIO()):  # the table of the parts
            trainer.fit(cli.model, datamodule=cli.datamodule)
    return counted(summary.cost, summary.training)


def counted(cost: Cost | None, training: TrainingCost | None) -> dict[str, float]:
    """Give the fields of a cell, for a training that takes the steps it planned."""
    assert cost is not None
    assert training is not None
    return dict(zip(COUNTED, (cost.flops_per_token, cost.active, training.flops()), strict=True))


def rewrite(folder: Path, system: str, variant: str, definition: str, found: Mapping[str, float]) -> list[CellResult]:
    """Write the counted fields into the cells of a variant and give them; nothing else in them changes.

    Cells that were made with other configs cost what those cost: they are left alone.
    """
    cells = [
        result
        for result in read_cells(folder, system).values()
        if result.variant == variant and result.definition == definition
    ]
    changed = [replace(result, **dict(found)) for result in cells]  # type: ignore[arg-type]
    for result in changed:
        write_cell(folder, result)
    return changed


@contextmanager
def apart(root: Path) -> Iterator[None]:
    """The repository as working directory, and a folder for runs that is gone afterwards."""
    before, here = os.environ.get("MOEAPPS_RUNS"), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOEAPPS_RUNS"] = folder
        os.chdir(root)
        try:
            yield
        finally:
            os.chdir(here)
            if before is None:
                del os.environ["MOEAPPS_RUNS"]
            else:
                os.environ["MOEAPPS_RUNS"] = before
