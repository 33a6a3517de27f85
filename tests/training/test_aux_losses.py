# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses inside a training run: when they are asked, and when they are told to forget."""

from __future__ import annotations

import lightning as L
import pytest
from torch import Tensor

from moeapps.moe.losses import AuxLoss, switch_balance
from moeapps.moe.record import Record
from tests.toy import ToyData, ToyNet, ToyTask


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
def test_losses_hear_of_every_optimizer_step_after_its_micro_batches(tmp_path, accumulate: int, diary: str) -> None:
    data, loss = ToyData(batch_size=24), Diary()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        use_distributed_sampler=False,
    )
    trainer.fit(ToyTask(net=ToyNet(), facts=data.facts, aux_losses=[loss]), datamodule=data)
    assert loss.seen == diary
