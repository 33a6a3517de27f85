# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses inside a training run: when they are asked, and when they are told to forget."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeapps.moe.losses import Anneal, AuxLoss, ChosenBalance, SwitchBalance, ZLoss
from moeapps.moe.objectives import switch_balance
from moeapps.moe.record import MoERecorder, Record
from moeapps.training.callbacks import StopDiverged
from tests.toy import ToyData, ToyNet, ToyTask
from tests.toy_callbacks import Poison


def trainer(folder: Path, *callbacks: L.Callback, max_epochs: int = 1, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
        **options,
    )


class Diary(AuxLoss):
    """Writes down what it is asked."""

    name = "diary"

    def __init__(self) -> None:
        super().__init__(0.01)
        self.seen = ""

    def compute(self, record: Record) -> Tensor:
        self.seen += "."
        return switch_balance(record)

    def on_optimizer_step(self) -> None:
        self.seen += "|"


@pytest.mark.parametrize(("accumulate", "diary"), [(1, ".|.|.|"), (2, "..|.|")])
def test_losses_hear_of_every_optimizer_step_after_its_micro_batches(
    tmp_path: Path, accumulate: int, diary: str
) -> None:
    data, first, second = ToyData(batch_size=24), Diary(), Diary()
    options = {"accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    runner = trainer(tmp_path, **options)
    runner.fit(ToyTask(net=ToyNet(), facts=data.facts, aux_losses=[first]), datamodule=data)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    resumed = ToyTask(net=ToyNet(), facts=data.facts, aux_losses=[second])
    trainer(tmp_path, max_epochs=2, **options).fit(resumed, datamodule=data, ckpt_path=str(tmp_path / "half.ckpt"))

    assert first.seen == diary
    assert second.seen == diary


def test_a_step_that_is_left_out_costs_no_other_step_its_count(tmp_path: Path) -> None:
    """What is put back are the buffers before the bad step, not those before the end of the good one before it."""
    data, loss = ToyData(batch_size=24), ChosenBalance(0.01, anneal=Anneal(final=0.001, steps=100))
    runner = trainer(tmp_path, Poison([1]), StopDiverged(skip=1), limit_val_batches=0)
    runner.fit(ToyTask(net=ToyNet(), facts=data.facts, aux_losses=[loss]), datamodule=data)

    assert int(loss.get_buffer("steps_taken")) == runner.global_step == 3


class FirstBatch(L.Callback):
    """Keep the first batch, the network that met it, and what training made of it."""

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch, self.net = batch, copy.deepcopy(task.net)

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.total, self.logged = outputs["loss"].detach(), dict(trainer.callback_metrics)
        self.gradients = [parameter.grad.clone() for parameter in task.net.parameters()]


def test_a_step_trains_on_the_task_plus_each_weighted_loss_and_logs_them_apart(tmp_path: Path) -> None:
    losses, data, kept = [SwitchBalance(0.3), ZLoss(0.02)], ToyData(), FirstBatch()
    task = ToyTask(net=ToyNet(dropout=0.0), facts=data.facts, aux_losses=losses)
    trainer(tmp_path, kept, limit_train_batches=1, limit_val_batches=0).fit(task, datamodule=data)

    x, label, domain = kept.batch
    with MoERecorder() as recorder:
        own = F.cross_entropy(kept.net(x, domain), label)
    probs_NE, logits_NE = recorder.records[0].routing.probs_NE, recorder.records[0].routing.logits_NE
    share_E = F.one_hot(probs_NE.topk(2).indices, 4).sum((0, 1)) / (2 * len(x))
    balance, size = 4 * (share_E * probs_NE.mean(0)).sum(), logits_NE.exp().sum(1).log().square().mean()
    total = own + 0.3 * balance + 0.02 * size

    torch.testing.assert_close(kept.total, total.detach())
    torch.testing.assert_close(kept.gradients, list(torch.autograd.grad(total, list(kept.net.parameters()))))
    for name, value in {"loss": own, "aux/switch_balance": balance, "aux/z": size}.items():
        torch.testing.assert_close(kept.logged[f"train/{name}"], value.detach())


# --- weights that change ----------------------------------------------------------------------------------------------


def test_an_annealed_weight_falls_in_a_straight_line_and_then_stays() -> None:
    """The weights of UniMoE-Audio: 0.025 at first, 0.013 half way, 0.001 after 10,000 steps and from then on."""
    loss = ChosenBalance(0.025, anneal=Anneal(final=0.001, steps=10_000))
    found = {}
    for step in range(12_001):
        if step in (0, 5000, 10_000, 12_000):
            found[step] = loss.weight
        loss.on_optimizer_step()

    assert found == pytest.approx({0: 0.025, 5000: 0.013, 10_000: 0.001, 12_000: 0.001})


def test_the_annealed_weight_is_what_training_adds_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    def fit(loss: ChosenBalance, epochs: int, ckpt: Path | None = None) -> L.Trainer:
        data = ToyData(batch_size=24)
        task = ToyTask(net=ToyNet(), facts=data.facts, aux_losses=[loss])
        runner = trainer(tmp_path, max_epochs=epochs, limit_val_batches=0)
        runner.fit(task, datamodule=data, ckpt_path=None if ckpt is None else str(ckpt))
        return runner

    first, second = (ChosenBalance(0.1, anneal=Anneal(final=0.0, steps=8)) for _ in range(2))
    runner = fit(first, 1)
    assert runner.global_step == 3
    assert first.weight == pytest.approx(0.1 * 5 / 8)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, 2, tmp_path / "half.ckpt")
    assert second.weight == pytest.approx(0.1 * 2 / 8)


def test_a_weight_that_stays_has_no_state() -> None:
    assert not ChosenBalance(0.025).state_dict()
    assert list(ChosenBalance(0.025, anneal=Anneal(0.001, 5)).state_dict()) == ["steps_taken"]


@pytest.mark.parametrize(("final", "steps"), [(float("nan"), 5), (0.001, 0)])
def test_a_wrong_anneal_is_told(final: float, steps: int) -> None:
    with pytest.raises(ValueError, match="1 step or more"):
        Anneal(final, steps)
