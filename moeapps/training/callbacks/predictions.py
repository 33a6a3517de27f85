# SPDX-License-Identifier: Apache-2.0
"""Write the answers of ``predict`` into the run folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from moeapps.files import WholeFile
from moeapps.training.run import run_dir
from moeapps.training.task import BaseTask

log = logging.getLogger("moeapps")


def remove_earlier(
    trainer: L.Trainer, task: BaseTask, written: Callable[[str], str], wrote: Callable[[Path], bool] | None = None
) -> None:
    """Remove what an earlier ``predict`` of the run left of the domains that are predicted now; all processes call it.

    It may have had more batches, or other data: whoever reads a domain's files would read rows twice, or of both. Files
    of other domains, and whatever else lies there, stay.

    Args:
        trainer: the trainer.
        task: the task.
        written: domain -> regular expression of the paths of its files below ``predictions``.
        wrote: whether a file of such a name is a writer's; None means all are.
    """
    folder, data = run_dir(trainer), task.data
    if folder is None:
        return
    if trainer.is_global_zero:
        place, now = folder / "predictions", data.eval_domains("predict")
        # `a-1` may be the second batch of the domain `a`, or a domain that is not predicted now.
        others = [written(domain) for domain in data.domain_names if domain not in now]
        found = _files(place, [written(domain) for domain in now], others)
        for path in found if wrote is None else [path for path in found if wrote(path)]:
            path.unlink()
            _remove_empty(path.parent, place)
    trainer.strategy.barrier("predictions")  # before any process writes


class PredictionWriter(BasePredictionWriter):
    """Save the predictions of every batch as predictions/<domain>/<batch>.pt, readable with ``torch.load(path)``.

    What an earlier ``predict`` of the run left of the same domains is removed first. A task with a format of its own
    overrides `save` and `written`.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove what an earlier run of this command left."""
        remove_earlier(trainer, cast(BaseTask, pl_module), self.written, self.wrote)

    def written(self, domain: str) -> str:
        """Return a regular expression of the paths, below the folder of predictions, that `save` writes of a domain."""
        return rf"{re.escape(domain)}/\d+\.pt"

    def wrote(self, path: Path) -> bool:
        """Return whether a file of such a name is a writer's, where the name alone does not say so."""
        return True

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

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_dir(trainer)
        if folder is not None and trainer.is_global_zero:
            log.info("predictions: %s", folder / "predictions")


def _files(place: Path, wanted: Sequence[str], others: Sequence[str]) -> list[Path]:
    """Return the files below a place whose path there matches what is wanted and nothing of others."""

    def matches(path: Path, patterns: Sequence[str]) -> bool:
        return any(re.fullmatch(pattern, path.relative_to(place).as_posix()) for pattern in patterns)

    files = [path for path in place.rglob("*") if path.is_file()]
    return [path for path in files if matches(path, wanted) and not matches(path, others)]


def _remove_empty(folder: Path, place: Path) -> None:
    """Remove a folder that has become empty, and those above it, up to a place."""
    while folder != place and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
