# SPDX-License-Identifier: Apache-2.0
"""How a task is validated and tested: scores by domain, held against the contract, logged and written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from moeapps.data.domain import DomainDataModule
from moeapps.moe.record import Kept, Record
from moeapps.training.contract import check_scores
from moeapps.training.results import write_results
from moeapps.training.run import run_dir
from moeapps.training.scores import DomainScores, ScoreTable
from moeapps.training.selection import select
from moeapps.training.step import Stage, StepOutput

if TYPE_CHECKING:
    from moeapps.training.task import BaseTask


class Evaluated(L.LightningModule):
    """The part of `BaseTask` that scores; it has the attributes that are declared here.

    Attributes:
        results: scores of the last evaluation.
    """

    monitor: ClassVar[str]
    main_metric: ClassVar[str]
    monitor_minimum: ClassVar[int]
    monitor_unit: ClassVar[str]
    scores: dict[str, DomainScores]
    results: ScoreTable
    last_records: list[Record]
    last_answer: Callable[[], Any] | None
    last_domain: str | None
    record_keeps: Collection[Kept]
    _checked: set[str]
    _trained: dict[str, int]

    if TYPE_CHECKING:

        def recorded_step(self, batch: Any, stage: Stage) -> StepOutput:
            """Of `BaseTask`."""

    @property
    def data(self) -> DomainDataModule:
        """The data module of the running trainer."""
        return cast(DomainDataModule, cast(Any, self.trainer).datamodule)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the scores of the domain whose loader gave the batch."""
        self.evaluation_step(batch, "val", batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the scores of the domain whose loader gave the batch."""
        self.evaluation_step(batch, "test", batch_idx, dataloader_idx)

    def evaluation_step(self, batch: Any, stage: Literal["val", "test"], batch_idx: int, dataloader_idx: int) -> None:
        """Run one evaluation batch; padding batches of a multi-process run are computed but not counted."""
        self.last_domain = self.data.eval_domains(stage)[dataloader_idx]
        out = self.recorded_step(batch, stage)
        if self.data.is_padding(stage, dataloader_idx, batch_idx):
            self.last_records, self.last_answer = [], None
            return
        self.scores[stage].update(
            *(self.last_domain, out.loss, out.batch_size, out.metric_args, out.units),
            weight=out.labelled,
            parts=out.parts,
        )

    def on_validation_epoch_start(self) -> None:
        """Forget what an earlier evaluation (the sanity check, too) left in the metrics."""
        self.scores["val"].reset()

    def on_test_epoch_start(self) -> None:
        """Forget what an earlier evaluation left in the metrics."""
        self.scores["test"].reset()

    def on_validation_epoch_end(self) -> None:
        """Log the validation keys and, under ``validate``, write metrics/val.json."""
        if not self.trainer.sanity_checking:
            self._finish("val", write=self.trainer.state.fn == "validate")
            return
        with isolate_rng(), warnings.catch_warnings():  # a handful of items may leave a score undefined
            warnings.simplefilter("ignore")
            self._check("val", self.scores["val"].compute(self.data.eval_domains("val")))

    def _check(self, stage: Literal["val", "test"], table: ScoreTable) -> None:
        """Hold the first evaluation of a stage against the contract."""
        if stage not in self._checked:
            monitored = getattr(cast(Any, self.trainer).checkpoint_callback, "monitor", None) == self.monitor
            chosen = select(self.monitor, table, minimum=self.monitor_minimum, unit=self.monitor_unit).key
            monitored = monitored and stage == "val"
            check_scores(cast("BaseTask", self), stage, self.scores[stage], table, chosen if monitored else None)
            self._checked.add(stage)

    def on_test_epoch_end(self) -> None:
        """Log the test keys and write metrics/test.json."""
        self._finish("test", write=True)

    def _finish(self, stage: Literal["val", "test"], *, write: bool) -> None:
        table = self.scores[stage].compute(self.data.eval_domains(stage))
        self._check(stage, table)
        bar = {f"{stage}/{role}/{self.main_metric}" for role in ("seen", "validation")}
        for key, value in ({} if self.trainer.barebones else table.keys(stage)).items():
            self.log(key, value, prog_bar=key in bar, batch_size=1, sync_dist=True)
        self.results = table
        folder = run_dir(self.trainer)
        if write and folder is not None and self.trainer.is_global_zero:
            write_results(cast("BaseTask", self), stage, table, folder, self._trained)

    @override
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.last_records = []
        self.last_answer = None

    @override
    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.last_records = []
        self.last_answer, self.record_keeps = None, ()
