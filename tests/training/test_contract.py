# SPDX-License-Identifier: Apache-2.0
"""What a task owes the library: each breach is told in one sentence, before the first epoch begins."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from moeapps.cli import main
from moeapps.data.domain import Split
from moeapps.moe import LinearScore, MLPExperts, MoELayer, Router, TopK
from moeapps.moe.presets import point_moe
from moeapps.training.contract import ContractError, check_facts, tell_idle_layers
from moeapps.training.task import Stage, StepOutput
from tests.toy import TOY, ToyData, ToyNet, ToyTask

pytestmark = pytest.mark.medium


class NoEpoch(L.Callback):
    """Whoever comes as far as an epoch has not been checked before."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise AssertionError("an epoch has begun")


class NumpyFacts(ToyData):
    """A number of numpy's among the facts."""

    @property
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "num_classes": np.int64(2)}


class Streamed(IterableDataset[Any]):
    """Items without a number."""

    def __iter__(self) -> Any:
        return iter([])


class StreamedData(ToyData):
    """A data set that has no length."""

    def dataset(self, domain: str, split: Split) -> Any:
        return Streamed()


class EmptyData(ToyData):
    """A data set without an item."""

    def dataset(self, domain: str, split: Split) -> Any:
        return []


class BadMonitor(ToyTask):
    """A monitor that nothing logs."""

    monitor: ClassVar[str] = "val/validation/acc"


class BadMain(ToyTask):
    """A main metric that no table has."""

    main_metric: ClassVar[str] = "acuracy"


class BadMode(ToyTask):
    """A direction that is none."""

    monitor_mode: ClassVar[Any] = "maximum"


class NeverUpdated(ToyTask):
    """Metrics that are given nothing."""

    def shared_step(self, batch: Any, stage: Stage) -> StepOutput:
        out = super().shared_step(batch, stage)
        return StepOutput(out.loss, out.batch_size)


class ManyNumbers(ToyTask):
    """A metric of one number per class."""

    def configure_metrics(self, domain: str) -> MetricCollection:
        return MetricCollection({"accuracy": MulticlassAccuracy(2, average=None)})


class PlainMetrics(ToyTask):
    """Metrics in a plain dictionary."""

    def configure_metrics(self, domain: str) -> Any:
        return {"accuracy": MulticlassAccuracy(2)}


class LossAlone(ToyTask):
    """A step in the manner of Lightning."""

    def shared_step(self, batch: Any, stage: Stage) -> Any:
        return super().shared_step(batch, stage).loss


class LossPerItem(ToyTask):
    """A loss that is no scalar."""

    def shared_step(self, batch: Any, stage: Stage) -> StepOutput:
        return StepOutput(super().shared_step(batch, stage).loss.expand(3), 3)


class NothingToPredict(ToyTask):
    """Neither predict_step nor forward."""

    predict_step = L.LightningModule.predict_step


class IdleNet(ToyNet):
    """A second MoE layer that forward forgets."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.second = point_moe()(8)


class IdleTask(ToyTask):
    """A network with a layer that never runs."""

    def __init__(self, *, net: nn.Module, **options: Any) -> None:
        super().__init__(net=IdleNet(), **options)


BROKEN: list[tuple[str, str, str]] = [
    ("data", "NumpyFacts", "ToyTask: facts['num_classes'] is a numpy.int64; facts of the data must be plain values"),
    ("data", "StreamedData", "StreamedData.dataset('a', 'train') gave Streamed, which has no length; give a data set"),
    ("data", "EmptyData", "domain 'a' has no train item; give it data or take it out of the roles"),
    ("model", "BadMonitor", "BadMonitor.monitor, which chooses best.ckpt, is 'val/validation/acc' (did you mean "
     "'val/validation/accuracy'?), but the scores are "),
    ("model", "BadMain", "BadMain.main_metric is 'acuracy' (did you mean 'accuracy'?), but the scores are loss, accur"),
    ("model", "BadMode", "BadMode.monitor_mode is 'maximum'; allowed: 'min' and 'max'"),
    ("model", "NeverUpdated", "the metrics accuracy of domain 'a' were never updated; NeverUpdated.shared_step must"),
    ("model", "ManyNumbers", "metric 'accuracy' of domain 'a' gave [2] numbers; a metric must give one"),
    ("model", "PlainMetrics", "configure_metrics('a') returned dict; it must return a MetricCollection"),
    ("model", "LossAlone", "LossAlone.shared_step returned Tensor; it must return a StepOutput("),
    ("model", "LossPerItem", "LossPerItem.shared_step gave a loss that is a tensor [3] of torch.float32; it must be"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "kind", "told"), BROKEN, ids=[kind for _, kind, _ in BROKEN])
def test_a_breach_is_one_sentence_before_the_first_epoch(
    part: str, kind: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--{part}.class_path=tests.training.test_contract.{kind}", "--trainer.callbacks",
             "tests.training.test_contract.NoEpoch", "--trainer.enable_model_summary", "false"]  # fmt: skip
    assert main(["fit", *TOY, *flags]) == 2

    message = capsys.readouterr().err.split("error: ")[-1].strip()
    assert message.startswith(told)
    assert len(message.splitlines()) == 1


def test_the_same_is_told_where_the_sanity_check_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.class_path=tests.training.test_contract.NeverUpdated", "--trainer.num_sanity_val_steps", "0"]
    assert main(["fit", *TOY, *flags, "--trainer.limit_train_batches", "1"]) == 2
    assert "were never updated" in capsys.readouterr().err.split("error: ")[-1]


def test_a_task_that_cannot_predict_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["predict", *TOY, "--untrained", "--model.class_path=tests.training.test_contract.NothingToPredict"]) == 2
    )
    told = capsys.readouterr().err.split("error: ")[-1].splitlines()
    assert told == [
        "NothingToPredict has neither predict_step nor forward, so there is nothing to predict; define one of them"
    ]


@pytest.mark.usefixtures("no_routing_figures")
def test_a_layer_that_does_not_run_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--model.class_path=tests.training.test_contract.IdleTask", "--test_after_fit", "false"]
    with caplog.at_level(logging.WARNING, logger="moeapps"):
        assert main(["fit", *TOY, *flags, "--trainer.max_epochs", "1"]) == 0

    lines = [record.getMessage() for record in caplog.records if "did not run" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("MoE layer net.second did not run in the first training batch: ")


def test_a_layer_that_is_frozen_or_whose_experts_are_called_one_by_one_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = nn.Sequential(*(MoELayer(Router(LinearScore(2, 2), TopK(1)), MLPExperts(2, 2, 3)) for _ in range(3)))
    net[1].requires_grad_(False)
    net[2].experts.grouped(torch.ones(2, 2), [1, 1]).sum().backward()

    tell_idle_layers(net, ())

    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("MoE layer 0 did not run")


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (np.float64(1.0), "facts['x']"),
        (torch.ones(2), "facts['x']"),
        ([1, {"deep": Path("a")}], "facts['x'][1]['deep']"),
        ({1.5: 2}, "facts['x'] has the key 1.5"),
        ({"a"}, "facts['x']"),
    ],
)
def test_facts_that_a_checkpoint_could_not_hold_are_named_by_their_place(value: Any, where: str) -> None:
    with pytest.raises(ContractError) as caught:
        check_facts("Task", {"x": value})
    assert where in str(caught.value)


def test_plain_facts_pass_and_load_without_running_code(tmp_path: Path) -> None:
    facts = {"a": [1, 2.5, None, True, "word", (1, 2)], "b": {"c": {3: "d"}}}
    check_facts("Task", facts)
    torch.save({"facts": facts}, tmp_path / "facts.pt")
    assert torch.load(tmp_path / "facts.pt", weights_only=True)["facts"] == facts


def test_a_value_of_a_metric_may_be_a_tensor_of_one_number() -> None:
    from moeapps.training.contract import scalar

    values: list[Tensor | float] = [torch.tensor(0.5), torch.tensor([0.5]), 0.5]
    assert [scalar("d", "m", value) for value in values] == [0.5, 0.5, 0.5]
