# SPDX-License-Identifier: Apache-2.0
"""The base of all reports: what is gathered from the batches of a test and told at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L
from typing_extensions import override

from moeapps.training.callbacks.side import SideReport
from moeapps.training.run import run_dir
from moeapps.training.task import BaseTask

Groups = dict[str, dict[str, float]]


class Report(SideReport):
    """Gather from the batches of a test and tell at its end; a subclass overrides `start`, `gather` and `finish`.

    Attributes:
        result: groups of numbers that ``finish`` found, for the summary of metrics/test.json.
    """

    def __init__(self) -> None:
        self.result: Groups = {}

    def start(self, task: BaseTask) -> None:
        """Forget the last test."""

    def gather(self, task: BaseTask, batch: Any, domain: str, batch_idx: int) -> None:
        """Add a batch of a domain; the task has its records and its answer, neither of a padding batch."""

    def finish(self, task: BaseTask, folder: Path | None) -> None:
        """Set ``result`` and write into the run folder; None where nothing is written, see `writing_dir`."""

    @override
    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.result = {}
        self.start(cast(BaseTask, pl_module))

    @override
    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        task = cast(BaseTask, pl_module)
        self.gather(task, batch, str(task.last_domain), batch_idx)

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.finish(cast(BaseTask, pl_module), writing_dir(trainer))

    def describe_results(self) -> Groups:
        """Return the numbers for the summary of the results file."""
        return self.result


def writing_dir(trainer: L.Trainer) -> Path | None:
    """Return the run folder on the process that writes; None on others and where no run writes (fast_dev_run)."""
    folder = run_dir(trainer)
    return folder if trainer.is_global_zero else None
