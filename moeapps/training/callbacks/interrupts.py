# SPDX-License-Identifier: Apache-2.0
"""What a training leaves when it is interrupted, and how several processes agree on the step after which they stop."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from moeapps.training.callbacks.finite import DivergedError
from moeapps.training.checkpoints import CheckpointError, first_whole
from moeapps.training.run import run_dir
from moeapps.training.task import BaseTask

log = logging.getLogger("moeapps")
_STOPS: tuple[type[BaseException], ...] = (KeyboardInterrupt, SIGTERMException)


class InterruptCheckpoint(L.Callback):
    """Write checkpoints/interrupted.ckpt when training is stopped by Ctrl-C, a signal or, alone, an error.

    Ctrl-C waits for the end of the training step that it meets, so that whatever counts steps counts alike; a second
    one stops at once. Several processes stop after the same step, whichever of them Ctrl-C or SIGTERM reached: else one
    would wait for ever for sums of gradients that another no longer adds to; a validation runs to its end before that.
    Of a model that has diverged nothing is written: the checkpoints before it are what is left.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._asked = 0  # 1 + the place in _STOPS of what was asked for
        self._in_validation = False  # one that an exception has ended
        self._scored = False  # the last one, wholly
        self._agreement: _Agreement | None = None
        self.begun = False

    def _begin(self, *args: Any, **kwargs: Any) -> None:
        """Note that a step has begun; the scores that are made before a training, to try them, are none."""
        self.begun = True

    on_train_batch_start = on_test_batch_start = on_predict_batch_start = _begin

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """As for the other steps."""
        self.begun = self.begun or not trainer.sanity_checking

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have a training with ``max_steps`` go on from an end of an epoch as one without goes on."""
        # Lightning 2.6 takes each checkpoint of a training with max_steps for one within an epoch: it ends that epoch
        # a second time, and the order of the next one is left out.
        cast(Any, trainer.fit_loop)._iteration_based_training = lambda: False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, BaseTask) or threading.current_thread() is not threading.main_thread():
            return
        self._agreement = _Agreement() if dist.is_initialized() and trainer.world_size > 1 else None
        self._asked, pl_module.stop_asked = 0, None
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, lambda *_: self._ask(trainer, KeyboardInterrupt))
        # Lightning's handler tells the others within itself, in between their sums, and stops after a batch, also where
        # a step takes several; it is back when the trainer ends. Under SLURM it leaves SIGTERM to the queue.
        several = self._agreement is not None or trainer.accumulate_grad_batches > 1
        if several and not isinstance(_environment(trainer), SLURMEnvironment):
            signal.signal(signal.SIGTERM, lambda *_: self._ask(trainer, SIGTERMException))

    def _ask(self, trainer: L.Trainer, stop: type[BaseException]) -> None:
        """Let the step end, if it is the first time and a step can be under way."""
        if self._asked and stop is SIGTERMException:
            return
        if self._asked or not (trainer.training or self._agreement):
            raise stop
        self._asked = 1 + _STOPS.index(stop)
        if self._agreement is None:
            cast(BaseTask, trainer.lightning_module).stop_asked = stop
        if trainer.is_global_zero:  # not through a logger, which may be in use just now
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Have the task stop if any process was asked to; it is the last that hears of the step."""
        if self._agreement is not None:
            self._agree(cast(BaseTask, pl_module))

    def _agree(self, task: BaseTask, *, at_once: bool = False) -> None:
        """Have the task stop if any process was asked to; what was agreed on stays, until a whole step is taken."""
        assert self._agreement is not None
        if task.stop_asked is not None:
            return
        asked = self._agreement.reached(self._asked, at_once=at_once)
        task.stop_asked = _STOPS[asked - 1] if asked else None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop also where no step came any more."""
        self._give_back()
        if not isinstance(pl_module, BaseTask):
            return
        if self._agreement is not None:
            self._agree(pl_module, at_once=True)
        if pl_module.stop_asked is not None:
            raise pl_module.stop_asked

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        self._before = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the state of the run and say how to go on."""
        if not isinstance(exception, KeyboardInterrupt):  # then Lightning lets nothing interrupt the end
            self._give_back()
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.global_step == 0:
            return
        folder = run_dir(trainer)
        if folder is None or not trainer.checkpoint_callbacks:
            return
        agreed = isinstance(exception, SIGTERMException) or getattr(pl_module, "stop_asked", None) is not None
        if trainer.world_size > 1 and not agreed:  # the others may never reach the barrier inside save_checkpoint
            if isinstance(exception, KeyboardInterrupt):
                self._tell(trainer, folder, first_whole(folder / "checkpoints"))
            return
        _let_them_end()
        path: Path | None = folder / "checkpoints" / "interrupted.ckpt"
        try:
            if isinstance(exception, DivergedError | CheckpointError):
                path = first_whole(folder / "checkpoints")
            else:
                self._in_validation = trainer.validating
                trainer.save_checkpoint(cast(Path, path))
        except CheckpointError as error:
            log.error("%s", error)
            path = first_whole(folder / "checkpoints")
        self._tell(trainer, folder, path)

    def _tell(self, trainer: L.Trainer, folder: Path, path: Path | None) -> None:
        if path is None:
            log.info("interrupted; there is no checkpoint yet")
        elif trainer.is_global_zero:
            if (folder / "config.yaml").is_file():
                words = ["--run", str(folder)]
            else:  # the run folder was deleted meanwhile
                words = ["--config", "FILE", "--ckpt_path", str(path)]
            log.info("interrupted; go on with: %s fit %s", program(), shlex.join(words))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that a checkpoint from here on lies within a validation: SLURM's signal has one written at any time."""
        self._scored = False

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that all of it is scored."""
        self._scored = True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have a validation that was interrupted made anew: Lightning would leave it out, or score its rest alone."""
        within = trainer.state.fn == "fit" and trainer.validating and not self._scored
        if self._in_validation or within:
            done, begun = {"ready": 0, "started": 0, "processed": 0, "completed": 0}, {"ready": 1, "started": 1}
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            progress |= {"total": {**done, **begun}, "current": done, "is_last_batch": False}
        if trainer.state.fn == "fit":
            _reopen_cut_epoch(checkpoint["loops"]["fit_loop"], cast(float, trainer.num_training_batches))


def _reopen_cut_epoch(progress: dict[str, Any], num_batches: float) -> None:
    """Have an epoch that ``max_steps`` or ``max_time`` cut go on: Lightning counts it as done, and leaves its rest out.

    Args:
        progress: of the loops of the training, as a checkpoint holds it; changed.
        num_batches: of an epoch.
    """
    epoch, batches = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
    ended = epoch["current"]["processed"] == epoch["current"]["started"] > 0
    if ended and 0 < batches["current"]["processed"] < num_batches and not batches["is_last_batch"]:
        for count in (epoch["total"], epoch["current"]):
            count["processed"] -= 1
            count["completed"] = count["processed"]


class _Agreement:
    """Whether any process was asked to stop, known to all at the same step, and nobody waits for it.

    The largest of what the processes say at the end of a step is found while the next step runs, in a group of its
    own; at the end of that one all read it.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo")
        self._largest: torch.Tensor | None = None
        self._work: Any = None

    def reached(self, asked: int, *, at_once: bool = False) -> int:
        """What all do now, 0 to go on; every process calls it after every step, and ``at_once`` after the last."""
        found = self._read()
        if found:
            return found
        self._largest = torch.tensor(asked)
        self._work = dist.all_reduce(self._largest, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return self._read() if at_once else 0

    def _read(self) -> int:
        if self._work is None or self._largest is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._largest)


def has_begun(trainer: L.Trainer) -> bool:
    """Whether a trainer has begun a step; if nothing looked on, it counts as one that has."""
    looking = [one for one in cast(Any, trainer).callbacks if isinstance(one, InterruptCheckpoint)]
    return not looking or any(one.begun for one in looking)


def _environment(trainer: L.Trainer) -> Any:
    return getattr(trainer.strategy, "cluster_environment", None)


def _let_them_end() -> None:
    """Have Lightning's observer no longer kill this process because others, which it started, end as they were told."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


def program() -> str:
    """What to type for this program: its bare name where PATH has it, else as it was called."""
    called = Path(sys.argv[0])
    if called.name not in ("moeapps", "lightning"):
        return "python -m moeapps"
    return called.name if shutil.which(called.name) else str(called)
