# SPDX-License-Identifier: Apache-2.0
"""The selection bias moves once per optimizer step, by the counts of that step, also where a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from moeapps.training.callbacks import BiasBalancing
from moeapps.training.task import BaseTask
from tests.toy import ToyData, ToyNet, ToyTask, biased_moe

RATE = 0.05


class Tape(L.Callback):
    """Keep, batch by batch, where each row went, how many steps were taken, and the bias after the callback before."""

    def __init__(self) -> None:
        self.start: tuple[int, Tensor] = (0, torch.zeros(4))
        self.batches: list[tuple[list[int], int, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, task: BaseTask) -> None:
        self.start = (trainer.global_step, task.net.moe.router.choose.bias.clone())

    def on_train_batch_end(self, trainer: L.Trainer, task: BaseTask, *args: Any) -> None:
        chosen = task.last_records[0].routing.expert_M.tolist()
        self.batches.append((chosen, trainer.global_step, task.net.moe.router.choose.bias.clone()))


def trained(folder: Path, epochs: int, checkpoint: str | None = None) -> tuple[L.Trainer, Tape]:
    torch.manual_seed(0)
    tape, data = Tape(), ToyData(batch_size=8)
    trainer = L.Trainer(
        callbacks=[BiasBalancing(RATE), tape], max_epochs=epochs, accumulate_grad_batches=2, limit_val_batches=0,
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(ToyTask(net=ToyNet(biased_moe()), facts=data.facts), datamodule=data, ckpt_path=checkpoint)
    return trainer, tape


def replayed(tape: Tape) -> list[list[float]]:
    """The bias after each batch, by hand."""
    step, bias = tape.start[0], tape.start[1].tolist()
    counts, after = [0] * 4, []
    for chosen, now, _ in tape.batches:
        counts = [count + chosen.count(e) for e, count in enumerate(counts)]
        if now != step:
            mean = sum(counts) / 4
            move = [RATE * ((mean > count) - (mean < count)) for count in counts]
            bias = [b + m - sum(move) / 4 for b, m in zip(bias, move, strict=True)]
            step, counts = now, [0] * 4
        after.append(list(bias))
    return after


def test_the_bias_moves_by_the_counts_of_each_step_also_after_a_checkpoint(tmp_path: Path) -> None:
    trainer, tape = trained(tmp_path, epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = trained(tmp_path, epochs=4, checkpoint=str(tmp_path / "half.ckpt"))

    for run in (tape, resumed):
        biases = [bias.tolist() for _, _, bias in run.batches]
        assert len({step for _, step, _ in run.batches}) == 11  # two epochs of nine batches by twos, and the start
        torch.testing.assert_close(torch.tensor(biases), torch.tensor(replayed(run)))
        assert len({tuple(bias) for bias in biases}) > 3
    assert resumed.start[0] == 10
    assert resumed.start[1].abs().max() > 0


def test_a_pattern_chooses_the_layers_that_are_balanced() -> None:
    task = ToyTask(net=ToyNet(biased_moe()), facts=ToyData().facts)
    runner = L.Trainer(barebones=True, accelerator="cpu", devices=1)
    BiasBalancing(layers="net.m*").on_train_start(runner, task)
    with pytest.raises(ValueError, match=r"no layer like 'net\.other\*'"):
        BiasBalancing(layers="net.other*").on_train_start(runner, task)
