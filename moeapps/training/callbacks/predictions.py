# SPDX-License-Identifier: Apache-2.0
"""Write the answers of ``predict`` into the run folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from moeapps.files import WholeFile
from moeapps.training.run import run_dir
from moeapps.training.task import BaseTask

log = logging.getLogger("moeapps")


class PredictionWriter(BasePredictionWriter):
    """Save the predictions of every batch as predictions/<domain>/<batch>.pt, readable with ``torch.load(path)``.

    A task with a format of its own overrides `save`.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Hand one batch to `save` (padding batches of a multi-process run are left out)."""
        folder, data = run_dir(trainer), cast(BaseTask, pl_module).data
        if folder is None or prediction is None or data.is_padding("predict", dataloader_idx, batch_idx):
            return
        number = batch_idx * trainer.world_size + trainer.global_rank
        self.save(folder / "predictions", data.eval_domains("predict")[dataloader_idx], number, prediction, data)

    def save(self, folder: Path, domain: str, number: int, prediction: Any, data: Any) -> None:
        """Write one batch of a domain; ``number`` counts the batches of all processes."""
        with WholeFile(folder / domain / f"{number:05d}.pt") as temporary:
            torch.save(prediction, temporary)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where they are."""
        folder = run_dir(trainer)
        if folder is not None and trainer.is_global_zero:
            log.info("predictions: %s", folder / "predictions")
