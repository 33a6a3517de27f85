# SPDX-License-Identifier: Apache-2.0
"""A witness of a training: a line per step that names the whole state, and a signal to itself where one is asked for.

The settings come from the environment, so that the words of a command stay the same from process to process:
``MOEAPPS_TAPE`` is the file for the lines, ``MOEAPPS_STRIKE`` a `Strike` in words.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

TAPE, STRIKE = "MOEAPPS_TAPE", "MOEAPPS_STRIKE"
Moment = Literal["step", "epoch end", "saving", "epoch start"]
# What a clock says is no result.
_CLOCK = ("seconds", "per_second")


@dataclass(frozen=True)
class Strike:
    """A signal that a process sends to itself.

    Args:
        signal: its name, such as ``SIGKILL``.
        moment: at the end of a training step, at the end of its epoch before checkpoints, when the state for one has
            been gathered and its file is about to be written, or when the next epoch begins.
        step: training steps (batches, however many optimizers each moves) done by then.
        run: name of the run (a stage of a curriculum has one of its own).
    """

    signal: str
    moment: Moment
    step: int
    run: str

    def __str__(self) -> str:
        return ":".join((self.signal, self.moment, str(self.step), self.run))

    @classmethod
    def of(cls, text: str) -> Strike:
        """Read what ``str`` wrote."""
        name, moment, step, run = text.split(":")
        return cls(name, moment, int(step), run)  # type: ignore[arg-type]


class Witness(L.Callback):
    """Write what every step and every score is, to the bit; strike where the environment says so.

    Steps are counted here, and kept in checkpoints: Lightning counts the steps of all optimizers of a batch.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._tape = Path(os.environ[TAPE])
        self._strike = Strike.of(os.environ[STRIKE]) if os.environ.get(STRIKE) else None

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        state = {
            "weights": pl_module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedules": [entry.scheduler.state_dict() for entry in trainer.lr_scheduler_configs],
            "random": [torch.get_rng_state(), np.random.get_state(legacy=True), random.getstate()],  # noqa: NPY002
        }
        self._write(trainer, "step", {"state": digest(state), "loss": digest(outputs)})
        self._fall(trainer, "step")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, "validation", {"metrics": scores(trainer.callback_metrics, "val")})

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, "test", {"metrics": scores(trainer.callback_metrics, "test")})

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._fall(trainer, "epoch end")

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
        self._fall(trainer, "saving")

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._fall(trainer, "epoch start")

    def _write(self, trainer: L.Trainer, what: str, line: dict[str, Any]) -> None:
        named = {"run": run_name(trainer), "what": what, "step": self.steps}
        with open(self._tape, "a", encoding="utf-8") as tape:  # closed each time: a killed process loses no line
            tape.write(json.dumps({**named, **line}) + "\n")

    def _fall(self, trainer: L.Trainer, moment: Moment) -> None:
        strike = self._strike
        if strike is not None and strike == Strike(strike.signal, moment, self.steps, run_name(trainer)):
            self._strike = None
            os.kill(os.getpid(), signal.Signals[strike.signal])


def run_name(trainer: L.Trainer) -> str:
    """Name of a run: the folder that its versions are in."""
    return Path(str(trainer.log_dir)).parent.name


def scores(metrics: Mapping[str, Any], stage: str) -> dict[str, str]:
    """Return the metrics of a stage as text that is equal where they are equal to the bit, without what clocks say."""
    of_stage = {key: value for key, value in metrics.items() if key.startswith(stage)}
    told = {key: value for key, value in of_stage.items() if not any(word in key for word in _CLOCK)}
    return {key: float(value).hex() for key, value in sorted(told.items())}


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits of nested dictionaries, lists, tensors and plain values."""
    known = hashlib.sha256()
    _feed(known, value)
    return known.hexdigest()[:16]


def _feed(known: Any, value: Any) -> None:
    if isinstance(value, Tensor | np.ndarray):
        held = torch.as_tensor(value).detach().cpu()
        known.update(f"{held.dtype}{tuple(held.shape)}".encode())
        known.update(held.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            known.update(repr(key).encode())
            _feed(known, item)
    elif isinstance(value, list | tuple):
        known.update(f"{len(value)}(".encode())
        for item in value:
            _feed(known, item)
    else:
        known.update(repr(value).encode())
