# SPDX-License-Identifier: Apache-2.0
"""What was routed: there for the callbacks of a batch, gone before the next one, and never that of padding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from moeapps.moe.record import Record
from moeapps.moe.routing import DenseRouting
from moeapps.training.callbacks import RoutingMonitor
from moeapps.training.callbacks.routing import expert_work, routing_entropy
from moeapps.training.task import BaseTask
from tests.toy import ToyData, ToyNet, ToyTask

ROWS, TOP_K = 24, 2


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A trainer of toys on one CPU that writes below ``folder``."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "use_distributed_sampler": False, "accelerator": "cpu", "devices": 1}
    return L.Trainer(callbacks=list(callbacks), default_root_dir=folder, **{"max_epochs": 1, **quiet, **options})


class Held(L.Callback):
    """Write down how many records the task holds when a batch begins and when it ends."""

    def __init__(self) -> None:
        self.begin: list[int] = []
        self.end: list[int] = []

    def begins(self, trainer: L.Trainer, task: BaseTask, *args: Any, **kwargs: Any) -> None:
        self.begin.append(len(task.last_records))

    def ends(self, trainer: L.Trainer, task: BaseTask, *args: Any, **kwargs: Any) -> None:
        self.end.append(len(task.last_records))

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = begins  # type: ignore[assignment]
    on_train_batch_end = on_validation_batch_end = on_test_batch_end = ends  # type: ignore[assignment]


def test_records_are_there_for_callbacks_and_gone_before_the_next_batch(tmp_path: Path) -> None:
    held, data = Held(), ToyData()
    task = ToyTask(net=ToyNet(), facts=data.facts)
    runner = trainer(tmp_path, held)
    runner.fit(task, datamodule=data)
    runner.test(task, datamodule=data, verbose=False)

    assert len(held.begin) == len(held.end) > 9 + 12
    assert set(held.begin) == {0}
    assert set(held.end) == {1}
    assert task.last_records == []


class PaddedData(ToyData):
    """The second batch of every evaluation loader is the padding of a process that has run out of batches."""

    def is_padding(self, stage: str, loader_idx: int, batch_idx: int) -> bool:
        return batch_idx == 1


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_padding_batches_are_neither_scored_nor_counted_as_work(tmp_path: Path, stage: str) -> None:
    monitor, data = RoutingMonitor(figures=False), PaddedData(batch_size=8)
    task = ToyTask(net=ToyNet(), facts=data.facts)
    getattr(trainer(tmp_path, monitor), stage)(task, datamodule=data, verbose=False)

    domains = data.eval_domains("val" if stage == "validate" else "test")
    assert {score.domain: score.n for score in task.results.scores} == dict.fromkeys(domains, ROWS - 8)
    assert monitor._layers["net.moe"].table_SE.sum(1).tolist() == [(ROWS - 8) * TOP_K] * len(domains)


def test_a_report_is_that_of_one_evaluation(tmp_path: Path) -> None:
    monitor, data = RoutingMonitor(figures=False), ToyData()
    task = ToyTask(net=ToyNet(), facts=data.facts)
    trainer(tmp_path, monitor, num_sanity_val_steps=-1, max_epochs=2).fit(task, datamodule=data)

    assert monitor._layers["net.moe"].table_SE.sum(1).tolist() == [ROWS * TOP_K] * len(data.eval_domains("val"))


class LoadOfStep(L.Callback):
    """Compare the logged variation of the load with that of the records of the steps since the last log."""

    def __init__(self, every: int) -> None:
        self.every, self.seen, self.found, self.expected = every, torch.zeros(4), [], []

    def on_train_batch_end(self, trainer: L.Trainer, task: BaseTask, outputs: Any, batch: Any, batch_idx: int) -> None:
        for expert in task.last_records[0].routing.expert_M.tolist():
            self.seen[expert] += 1
        if (batch_idx + 1) % self.every == 0:
            self.found.append(float(trainer.callback_metrics["moe/net.moe/train_load_cv"]))
            self.expected.append(float(self.seen.std(correction=0) / self.seen.mean()))
            self.seen.zero_()


@pytest.mark.parametrize("every", [1, 3])
def test_the_load_logged_in_training_is_that_of_the_steps_since_the_last_log(tmp_path: Path, every: int) -> None:
    tape, data = LoadOfStep(every), ToyData()
    options = {"log_every_n_steps": every, "limit_val_batches": 0}
    runner = trainer(tmp_path, RoutingMonitor(figures=False), tape, **options)
    runner.fit(ToyTask(net=ToyNet(), facts=data.facts), datamodule=data)

    assert len(set(tape.expected)) > 1
    assert tape.found == pytest.approx(tape.expected)


def test_masked_rows_are_no_work_and_have_no_entropy() -> None:
    weight = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])
    mask = torch.tensor([True, True, False])
    record = Record("gate", DenseRouting(weight, 2, probs_NE=weight), nn.Identity(), mask)  # type: ignore[arg-type]

    assert expert_work(record).tolist() == [1.5, 0.5]
    entropy, rows = routing_entropy(record)
    assert rows == 2
    assert float(entropy) == pytest.approx(math.log(2) / 2)
