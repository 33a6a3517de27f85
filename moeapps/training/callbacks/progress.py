# SPDX-License-Identifier: Apache-2.0
"""Progress: a rich bar on a terminal, a few plain lines anywhere else; both name the domain that is evaluated."""

from __future__ import annotations

import logging
import time
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.console import Console
from typing_extensions import override

log = logging.getLogger("moeapps")


def progress_bar() -> ProgressBar:
    """Return the bar that suits the output: rich on a terminal, lines in a file or a pipe."""
    console = Console()
    if console.is_terminal and not console.is_jupyter:
        return DomainBar(leave=True)
    return ProgressLines()


def domain_of(trainer: L.Trainer, stage: str, loader: int) -> str:
    """Return the domain of a loader of ``val``, ``test`` or ``predict``."""
    return str(cast(Any, trainer).datamodule.eval_domains(stage)[loader])


class DomainBar(RichProgressBar):
    """Lightning's bar, with the name of the domain in place of the number of its loader."""

    def _named(self, word: str, stage: str) -> str:
        loader = self._current_eval_dataloader_idx
        # Lightning asks for the text before there is a loader, too, to align the bars.
        return word if loader is None else f"{word} {domain_of(self.trainer, stage, loader)}"

    @property
    @override
    def validation_description(self) -> str:
        return self._named("Validation", "val")

    @property
    @override
    def test_description(self) -> str:
        return self._named("Testing", "test")

    @property
    @override
    def predict_description(self) -> str:
        return self._named("Predicting", "predict")


class ProgressLines(ProgressBar):
    """One line per epoch and, in long epochs and evaluations, one per interval: where it is, loss, metrics, seconds.

    Args:
        seconds: shortest time between two lines inside an epoch.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._last = self._begin = self._began = 0.0

    def disable(self) -> None:
        """Say nothing (Lightning calls this on all but the first process)."""
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._begin = self._last = time.monotonic()  # an epoch that was begun before does not begin again

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._begin = self._last = time.monotonic()

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if time.monotonic() - self._last >= self.seconds:
            self._line(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._line(trainer, pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = self._last = time.monotonic()

    on_validation_start = on_predict_start = on_test_start

    @override
    def on_test_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int, loader: int = 0
    ) -> None:
        self._tell(trainer, "test", i, loader)

    @override
    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int, loader: int = 0
    ) -> None:
        self._tell(trainer, "val", i, loader)

    @override
    def on_predict_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int, loader: int = 0
    ) -> None:
        self._tell(trainer, "predict", i, loader)

    def _tell(self, trainer: L.Trainer, stage: str, batch: int, loader: int) -> None:
        """Say which domain is evaluated, where the last line is long ago."""
        now = time.monotonic()
        if not self._enabled or now - self._last < self.seconds:
            return
        self._last = now
        words = {"val": "validating", "test": "testing", "predict": "predicting"}
        domain = domain_of(trainer, stage, loader)
        log.info("%s %s  batch %d  %.1f s", words[stage], domain, batch + 1, now - self._began)

    def _line(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._enabled:
            return
        self._last = time.monotonic()
        numbers = {key: value for key, value in self.get_metrics(trainer, pl_module).items() if key != "v_num"}
        text = "  ".join(
            f"{key} {float(value):.4g}" for key, value in numbers.items() if isinstance(value, int | float)
        )
        epochs = "?" if trainer.max_epochs in (None, -1) else trainer.max_epochs
        batch = f"{trainer.fit_loop.epoch_loop.batch_progress.current.ready}/{self.total_train_batches}"
        seconds = self._last - self._begin
        log.info("epoch %d/%s  batch %s  %s  %.1f s", trainer.current_epoch + 1, epochs, batch, text, seconds)
