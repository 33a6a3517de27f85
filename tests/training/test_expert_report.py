# SPDX-License-Identifier: Apache-2.0
"""The expert report: reads the records of the test's own pass, whatever the task; its numbers are those of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor

from moeapps.moe import DenseRouting
from moeapps.moe.metrics import mutual_information
from moeapps.moe.presets import dense, point_moe
from moeapps.moe.record import Kept, Place, Record, place_of
from moeapps.training.callbacks import ExpertReport
from moeapps.training.callbacks.experts import group_names
from moeapps.training.task import BaseTask, Factor
from tests.toy import ToyData, ToyNet, ToyTask


class CountingNet(ToyNet):
    """Counts its calls."""

    calls = 0

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(x, group)


class FactorTask(ToyTask):
    """Knows the class of a row."""

    def routing_factors(self, batch: Any) -> dict[str, Factor]:
        return {"class": Factor(batch[1], 2)}


class Tape(L.Callback):
    """Keeps the rows of every seen batch: work of the experts, class and domain."""

    def __init__(self) -> None:
        self.work, self.label, self.domain = [], [], []

    def on_test_batch_end(self, trainer: L.Trainer, task: BaseTask, outputs: Any, batch: Any, *rest: int) -> None:
        if task.last_domain in task.data.present("seen"):
            self.work.append(task.last_records[0].work())
            self.label.append(batch[1])
            self.domain.append(batch[2])


def run_of(folder: Path, task: BaseTask, *callbacks: L.Callback) -> L.Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "devices": 1, "logger": False}
    trainer = L.Trainer(callbacks=list(callbacks), default_root_dir=folder, **quiet)
    trainer.test(task, datamodule=ToyData(batch_size=7), verbose=False)
    return trainer


def test_numbers_are_those_of_all_rows_and_the_network_runs_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("moeapps.training.callbacks.report.run_dir", lambda trainer: tmp_path)
    report, tape, net = ExpertReport(), Tape(), CountingNet(point_moe())
    task = FactorTask(net=net, facts=ToyData().facts)
    run_of(tmp_path, task, report, tape)

    work_NE, label_N, domain_N = (torch.cat(rows) for rows in (tape.work, tape.label, tape.domain))
    found = report.describe_results()["experts"]
    assert len(work_NE) == 3 * 24
    assert found["mi_class"] == pytest.approx(float(mutual_information(work_NE, label_N)))
    assert found["mi_domain"] == pytest.approx(float(mutual_information(work_NE, domain_N)))
    assert found["per_token"] == 2
    assert found["least"] == pytest.approx(float(work_NE.sum(0).min() / work_NE.sum(0).mean()))
    assert net.calls == 5 * 4  # batches of all domains, each once
    written = json.loads((tmp_path / "metrics" / "experts.json").read_text())
    assert written["experts"] == found
    assert torch.tensor(written["work"]["experts"]["class"]).sum().item() == pytest.approx(len(work_NE))


def test_a_dense_network_has_nothing_to_report(tmp_path: Path) -> None:
    report = ExpertReport()
    run_of(tmp_path, FactorTask(net=ToyNet(dense()), facts=ToyData().facts), report)

    assert report.describe_results() == {}


class Listener(ExpertReport):
    """Wants the outputs of experts of the first batch of domain a."""

    keep: ClassVar[tuple[Kept, ...]] = ("output",)

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def wants(self, domain: str) -> bool:
        return domain == "a" and not self.kept

    def count(self, task: BaseTask, batch: Any, records: list[Record], domain: int) -> None:
        self.kept.append(records[0].output)


def test_outputs_are_kept_for_a_report_that_asks_and_only_then(tmp_path: Path) -> None:
    listener, task = Listener(), FactorTask(net=ToyNet(), facts=ToyData().facts)
    seen: list[bool] = []

    class Watch(L.Callback):
        def on_test_batch_end(self, trainer: L.Trainer, task: BaseTask, *rest: Any) -> None:
            seen.append(task.last_records[0].output is not None)

    run_of(tmp_path, task, listener, ExpertReport(), Watch())

    assert [tuple(output.shape) for output in listener.kept] == [(7, 8)]
    assert seen == [True] + [False] * (len(seen) - 1)
    assert task.record_keeps == ()


def test_places_are_read_from_names() -> None:
    names = ["net.blocks.3.mlp", "encoder.1.blocks.0.attn.proj", "net.layer", "0", "net.levels.1.moe"]
    places = [place_of(name) for name in names]

    assert places == [
        Place("blocks", (3,)),
        Place("encoder", (1, 0)),
        Place("layer", ()),
        Place("layers", (0,)),
        Place("levels", (1,)),
    ]
    assert [Record(name, DenseRouting(torch.ones(1, 1), 1), None).index for name in names] == [3, 1, 0, 0, 1]
    assert group_names(places[:1]) == {places[0]: "experts.3"}
    assert group_names(places[:1], by_stage=True) == {places[0]: "blocks.3"}
    assert group_names(places[:2]) == {places[0]: "blocks.3", places[1]: "encoder.1.0"}
