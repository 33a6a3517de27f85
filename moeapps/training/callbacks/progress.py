# SPDX-License-Identifier: Apache-2.0
"""Progress: a rich bar on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.console import Console
from typing_extensions import override

log = logging.getLogger("moeapps")


def progress_bar() -> ProgressBar:
    """Return the bar that suits the output: rich on a terminal, lines in a file or a pipe."""
    console = Console()
    if console.is_terminal and not console.is_jupyter:
        return RichProgressBar(leave=True)
    return ProgressLines()


class ProgressLines(ProgressBar):
    """One line per epoch and, in long epochs, one per interval: steps, loss, main metrics, seconds.

    Args:
        seconds: shortest time between two lines inside an epoch.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._last = self._begin = 0.0

    def disable(self) -> None:
        """Say nothing (Lightning calls this on all but the first process)."""
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

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
