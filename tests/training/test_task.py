# SPDX-License-Identifier: Apache-2.0
"""What the Lightning side of a task does around ``shared_step``: scores per domain, the schedule, clipping."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from moeapps.cli import main
from moeapps.training.optim import Cosine, OptimizerConfig
from tests.toy import TOY, ToyData, ToyNet, ToyTask

ROWS = 24


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "use_distributed_sampler": False, "devices": 1, "max_epochs": 1}
    return L.Trainer(callbacks=list(callbacks), default_root_dir=folder, **{**quiet, **options})


def counts(task: ToyTask) -> dict[str, int]:
    return {score.domain: score.n for score in task.results.scores}


def test_every_validation_counts_its_own_items_after_a_sanity_check_too(tmp_path: Path) -> None:
    data = ToyData()
    task = ToyTask(net=ToyNet(), facts=data.facts)
    trainer(tmp_path, num_sanity_val_steps=-1, max_epochs=2).fit(task, datamodule=data)

    assert counts(task) == dict.fromkeys(data.eval_domains("val"), ROWS)


def test_a_second_test_is_a_test_of_its_own(tmp_path: Path) -> None:
    data, runner = ToyData(), trainer(tmp_path)
    task = ToyTask(net=ToyNet(), facts=data.facts)
    for _ in range(2):
        runner.test(task, datamodule=data, verbose=False)

    assert counts(task) == dict.fromkeys(data.eval_domains("test"), ROWS)


def test_each_domain_is_scored_by_its_own_items(tmp_path: Path) -> None:
    data = ToyData()
    task = ToyTask(net=ToyNet(), facts=data.facts)
    trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(task, datamodule=data)
    trainer(tmp_path).test(task, datamodule=data, verbose=False)

    found = {score.domain: score.value for score in task.results.scores if score.metric == "accuracy"}
    expected = {}
    for domain in data.eval_domains("test"):
        x, label, group = (torch.stack(column) for column in zip(*data.dataset(domain, "test"), strict=True))
        expected[domain] = float((task.net.eval()(x, group).argmax(1) == label).float().mean())
    assert found == pytest.approx(expected)
    assert len(set(found.values())) > 1


class Rates(L.Callback):
    """Keep the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_training_without_an_end_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOEAPPS_RUNS", str(tmp_path))

    assert main(["fit", *TOY, "--trainer.max_epochs=-1", "--trainer.max_time", "00:00:01:00"]) == 2
    assert "max_epochs=-1 gives the training no end" in capsys.readouterr().err


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_schedule_spans_the_optimizer_steps_of_the_run(tmp_path: Path, accumulate: int) -> None:
    data, tape, steps = ToyData(), Rates(), 18 // accumulate
    task = ToyTask(net=ToyNet(), facts=data.facts, optimizer=OptimizerConfig(lr=0.1), schedule=Cosine())
    options = {"max_epochs": 2, "limit_val_batches": 0, "accumulate_grad_batches": accumulate}
    trainer(tmp_path, tape, **options).fit(task, datamodule=data)

    expected = [0.05 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    assert tape.rates == pytest.approx([rate for rate in expected for _ in range(accumulate)])


class TableNet(nn.Module):
    """A linear map and a vector per domain, whose gradient is sparse or not."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.map, self.table = nn.Linear(2, 2), nn.Embedding(5, 2, sparse=sparse)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        return self.map(x) + self.table(group)


class Gradients(L.Callback):
    """Keep the gradients that the optimizer got."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, *args: Any) -> None:
        self.steps.append([parameter.grad.to_dense().clone() for parameter in task.parameters()])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_as_the_trainer_says_with_tables_and_without(
    tmp_path: Path, algorithm: str, sparse: bool
) -> None:
    tape, data = Gradients(), ToyData()
    task = ToyTask(net=TableNet(sparse), facts=data.facts)  # type: ignore[arg-type]
    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm, "limit_val_batches": 0}
    trainer(tmp_path, tape, **options).fit(task, datamodule=data)

    for gradients in tape.steps:
        numbers = torch.cat([gradient.flatten() for gradient in gradients])
        size = numbers.norm() if algorithm == "norm" else numbers.abs().max()
        assert float(size) == pytest.approx(1e-3, rel=2e-3)
