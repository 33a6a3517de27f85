# SPDX-License-Identifier: Apache-2.0
"""What is hung into a training of the toy: tapes that keep what it did, reports, and faults at a given step."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any, cast

import lightning as L
from torch import Tensor

from moeapps.training.callbacks import SideReport


class KeepEpochs(L.Callback):
    """Copy last.ckpt of every epoch to ``epoch=<k>.ckpt``."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        last = Path(trainer.log_dir) / "checkpoints" / "last.ckpt"
        if last.is_file():
            shutil.copy(last, last.with_name(f"epoch={trainer.current_epoch - 1}.ckpt"))


class RowTape(L.Callback):
    """Keep the first coordinates of the rows of every training step."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.rows.append(batch[0][:, 0].tolist())


class WeightTape(L.Callback):
    """Keep the weights that training begins and ends with."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.first = {key: value.clone() for key, value in task.state_dict().items()}

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.last = {key: value.clone() for key, value in task.state_dict().items()}


class PressCtrlC(L.Callback):
    """Interrupt training after the given number of steps."""

    def __init__(self, step: int = 13) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


class SendSigterm(L.Callback):
    """Ask this process to end after the given number of steps."""

    def __init__(self, step: int = 13) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class StopWithin(L.Callback):
    """End training after the given number of steps, wherever its epoch is, as ``max_time`` does."""

    def __init__(self, step: int = 4) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


class SignalInBatch(L.Callback):
    """Send this process a signal before the given batch, from 0; not in a resumed run.

    Args:
        batch: of the training.
        number: of the signal.
    """

    def __init__(self, batch: int, number: int = int(signal.SIGINT)) -> None:
        self.batch, self.number = batch, number
        self.seen = 0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.seen == self.batch:
            os.kill(os.getpid(), self.number)
        self.seen += 1


class SendSigusr1(L.Callback):
    """Do as SLURM does when the time of a job is nearly over, under SLURM alone, in a training that was not resumed.

    Args:
        step: optimizer steps before it.
    """

    def __init__(self, step: int = 13) -> None:
        self.step = step
        self.resumed = False

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.resumed = trainer.global_step > 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.resumed and "SLURM_JOB_ID" in os.environ:
            os.kill(os.getpid(), signal.SIGUSR1)


class PressKeyInside(L.Callback):
    """Send a real Ctrl-C in the middle of a training step, before the optimizer has stepped; not in a resumed run.

    Args:
        step: optimizer steps before it.
    """

    def __init__(self, step: int = 5) -> None:
        self.step = step
        self.seen = 0
        self.resumed = False

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.resumed = trainer.global_step > 0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.seen += 1
        if self.seen == self.step + 1 and not self.resumed:
            os.kill(os.getpid(), signal.SIGINT)


class PressKeyInValidation(L.Callback):
    """Send a real Ctrl-C after a number of validation batches of an epoch.

    Args:
        epoch: of training, from 0.
        batch: of the first loader, from 0.
    """

    def __init__(self, epoch: int = 1, batch: int = 1) -> None:
        self.epoch, self.batch = epoch, batch

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int, loader: int = 0
    ) -> None:
        if trainer.current_epoch == self.epoch and (i, loader) == (self.batch, 1) and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGINT)


class Poison(L.Callback):
    """Spoil a training: numbers that are not finite in batches or, at the end of a step, in a weight.

    Args:
        batches: steps, from 0, whose batches are spoilt.
        weight: step after which a weight is; None for none.
    """

    def __init__(self, batches: list[int] | None = None, weight: int | None = None) -> None:
        self.batches, self.weight = batches or [], weight
        self.seen = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, i: int) -> None:
        if self.seen in self.batches:
            batch[0].fill_(float("nan"))

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if self.seen == self.weight:
            next(p for p in module.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")
        self.seen += 1


class FailingReport(SideReport):
    """A report that adds one number, and then fails."""

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise ArithmeticError("the distance of images that are not numbers")

    def describe_results(self) -> dict[str, dict[str, float]]:
        return {"half": {"done": 1.0}}


class StepTape(L.Callback):
    """Keep the weights and running statistics after every training step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self.states.append({key: value.clone() for key, value in cast(Any, module).net.state_dict().items()})


class DeleteRun(L.Callback):
    """Delete the run folder in the middle of the second epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 13:
            shutil.rmtree(str(trainer.log_dir))


class HalfReport(SideReport):
    """A report of one number."""

    def describe_results(self) -> dict[str, dict[str, float]]:
        return {"half": {"done": 0.5}}
