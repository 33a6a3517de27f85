# SPDX-License-Identifier: Apache-2.0
"""A command of moeapps that notes what its CPU seconds go to: ``python benchmarks/fit_phases.py OUT.json fit ...``.

`benchmarks.fit_share` starts it, with the code of any commit: it knows Lightning's loops and, of ours, the command line
alone. It wraps what the loops call; each second counts for the innermost part that it is spent in.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import moeapps.cli

FIRST = "--first-step"
"""Given before the command: end with the first training step."""
WITHOUT = "--without"
"""Given before the command with a function of `moeapps.commands.later`: it does nothing."""


class Clock:
    """CPU seconds of this process by part, since the interpreter started."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.stack, self.last = ["imports"], 0.0
        self.start: float | None = None
        self.steps = 0

    def tick(self) -> None:
        """Count the time since the last tick for the part that runs."""
        now = time.process_time()
        self.spent[self.stack[-1]] += now - self.last
        self.last = now

    def enter(self, part: str) -> None:
        """Begin a part inside the one that runs."""
        self.tick()
        self.stack.append(part)

    def leave(self) -> None:
        """End the innermost part."""
        self.tick()
        self.stack.pop()

    def base(self, part: str) -> None:
        """What is no part of its own counts for this from now on."""
        self.tick()
        self.stack[0] = part

    def wrap(self, owner: Any, name: str, part: str, *, inside: str | None = None) -> None:
        """Count the calls of a function for a part; with ``inside``, only those made within that part."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if inside is not None and inside not in self.stack:
                return function(*args, **kwargs)
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, name, timed)


def watch(clock: Clock, out: Path, *, first_only: bool) -> None:
    """Wrap Lightning's loops, loggers and hooks."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.loops import evaluation_loop, training_epoch_loop
    from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
    from lightning.pytorch.loops.optimization import automatic, manual
    from lightning.pytorch.trainer.connectors.logger_connector import logger_connector

    clock.base("setup")
    for fetcher in (_DataFetcher, _PrefetchDataFetcher):
        clock.wrap(fetcher, "__next__", "loader", inside="loop")
    for name in ("on_batch_start", "on_batch_end", "update_train_step_metrics", "log_metrics"):
        clock.wrap(logger_connector._LoggerConnector, name, "logging")
    clock.wrap(LightningModule, "log", "logging")
    for logger in (CSVLogger, TensorBoardLogger):
        clock.wrap(logger, "log_metrics", "logging")
        clock.wrap(logger, "save", "logging")
    clock.wrap(training_epoch_loop._TrainingEpochLoop, "run", "loop")
    clock.wrap(evaluation_loop._EvaluationLoop, "run", "validation", inside="loop")
    clock.wrap(Trainer, "save_checkpoint", "checkpoint")
    clock.wrap(Trainer, "test", "test")
    for kind in (automatic._AutomaticOptimization, manual._ManualOptimization):
        watch_steps(clock, kind, out, first_only=first_only)
    watch_callbacks(clock)


def watch_steps(clock: Clock, kind: Any, out: Path, *, first_only: bool) -> None:
    """Count training steps, and note when the first one begins."""
    run = kind.run

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.start = time.process_time() if clock.start is None else clock.start
        if first_only:
            write(clock, out)
            os._exit(0)
        clock.steps += 1
        return run(self, *args, **kwargs)

    kind.run = step
    clock.wrap(kind, "run", "steps")


def watch_callbacks(clock: Clock) -> None:
    """Count the hooks of callbacks at the ends of batches and evaluations, once it is known which there are."""
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.trainer import call

    hooks = call._call_callback_hooks

    def calling(trainer: Any, hook_name: str, *args: Any, **kwargs: Any) -> None:
        evaluating = hook_name.startswith(("on_test", "on_validation"))
        for callback in trainer.callbacks if evaluating or hook_name.startswith("on_train_batch") else ():
            if not getattr(getattr(callback, hook_name), "counted", False):
                part = "reports" if evaluating else "callbacks"
                part = "checkpoint" if isinstance(callback, Checkpoint) else part
                clock.wrap(callback, hook_name, "gate fits" if type(callback).__name__ == "RouterFit" else part)
                getattr(callback, hook_name).counted = True
        hooks(trainer, hook_name, *args, **kwargs)

    call._call_callback_hooks = calling


def write(clock: Clock, out: Path) -> None:
    """Write the seconds of the parts."""
    clock.tick()
    found = {"start": clock.start, "total": clock.last, "steps": clock.steps, "parts": dict(clock.spent)}
    out.write_text(json.dumps(found), encoding="utf-8")


def main(words: list[str]) -> int:
    """Run a command."""
    out, words = Path(words[0]), words[1:]
    first_only = words[0] == FIRST
    words = words[1:] if first_only else words
    if words[0] == WITHOUT:
        setattr(importlib.import_module("moeapps.commands.later"), words[1], contextlib.nullcontext)
        words = words[2:]
    clock = Clock()
    cli: Any = moeapps.cli
    real = cli.import_module

    def importing(name: str) -> Any:
        module = real(name)
        if name == "moeapps.commands.run":
            watch(clock, out, first_only=first_only)
        return module

    cli.import_module = importing
    code = int(cli.main(words))
    write(clock, out)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
