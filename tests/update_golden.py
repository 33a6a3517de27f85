# SPDX-License-Identifier: Apache-2.0
"""The first five training losses of every system, to catch changes of numbers that nobody meant.

A change that is meant to alter numbers regenerates the files and says why in its commit:

    python -m tests.update_golden            # all systems
    python -m tests.update_golden point_moe  # one
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch

from moeapps.commands.run import run
from tests.systems import BASES, GOLDEN, tiny


class LossTape(L.Callback):
    """Keep the loss of every training step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def first_losses(base: Path) -> list[float]:
    """Train five tiny steps of a base config on one thread and return the losses."""
    torch.set_num_threads(1)
    limits = ["--trainer.limit_train_batches", "5", "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "5"]
    flags = [*tiny(base), *limits, "--trainer.max_steps", "5", "--test_after_fit", "false"]
    done = run(["fit", *flags, "--trainer.callbacks", "tests.update_golden.LossTape"])
    tape = next(callback for callback in done.trainer.callbacks if isinstance(callback, LossTape))
    return tape.losses


def main(names: list[str]) -> None:
    """Rewrite the files of the named systems, or of all."""
    GOLDEN.mkdir(exist_ok=True)
    for base in BASES:
        if not names or base.stem in names:
            with tempfile.TemporaryDirectory() as folder:
                os.environ["MOEAPPS_RUNS"] = folder
                losses = first_losses(base)
            text = json.dumps({"config": str(base), "losses": losses}, indent=1) + "\n"
            (GOLDEN / f"{base.stem}.json").write_text(text, encoding="utf-8")
            print(base.stem, losses)


if __name__ == "__main__":
    # Not this file's own main: run as a script its callback is another class than the one the command line imports.
    import_module("tests.update_golden").main(sys.argv[1:])
