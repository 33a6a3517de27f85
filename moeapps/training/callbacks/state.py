# SPDX-License-Identifier: Apache-2.0
"""The state of a run besides its weights: random states, config, origin, and a checkpoint when it is interrupted."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from typing_extensions import override

from moeapps.commands.listing import first_comment
from moeapps.data.mixing import fold
from moeapps.files import write_json
from moeapps.training.checkpoints import CheckpointError, check_whole, copy_checkpoint
from moeapps.training.run import (
    config_hash,
    git_commit,
    machine,
    own_packages,
    run_dir,
    seeds_of,
    variant_hash,
    versions,
)
from moeapps.training.scores import ScoreTable
from moeapps.training.selection import select

log = logging.getLogger("moeapps")


class TipFilter(logging.Filter):
    """Drop the two advertising tips that Lightning prints at every run, and lines that only say what is not there."""

    unwanted = (
        "Tip: For seamless",
        "TPU available",
        "Loading `train_dataloader` to estimate",
        "`weights_only` was not",
    )

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in self.unwanted)


class RandomState(L.Callback):
    """Keep the global random states (python, numpy, torch, CUDA) of every process in the checkpoint.

    They are put back when training starts again, after everything that draws numbers while setting up. A training that
    begins gives every process but the first a seed of its own: with one seed for all, dropout, noise and drawn times
    would be the same in each, and n processes would draw no more of them than one.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None
        self._alone = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ask no other process for its state any more: it may be gone, unless all agreed to stop after this step."""
        self._alone = getattr(pl_module, "stop_asked", None) is None

    def state_dict(self) -> dict[str, Any]:
        """Return the random states of all processes in order of rank (collective, except after an exception)."""
        mine = _random_state()
        states: list[Any] = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized() and not self._alone:
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, mine)
        return {"states": states}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["states"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the stored state of this process back; one that had none begins with a seed of its own."""
        if self._restored is not None and trainer.global_rank < len(self._restored):
            _set_random_state(self._restored[trainer.global_rank])
        elif trainer.global_rank:
            seed = fold(torch.initial_seed(), trainer.global_rank)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - the state others draw from
            torch.manual_seed(seed)
        self._restored = None


class BestCheckpoint(ModelCheckpoint):
    """Keep best.ckpt by the task's monitor, and last.ckpt at the end of every epoch.

    Where too few units lie behind ``val/validation/...``, the score of the seen domains chooses, and a line says so
    (see `moeapps.training.selection`). An epoch whose score is not defined is never the best; if none is, there is no
    best.ckpt, and the last weights are what is tested.

    Lightning's own ``save_last`` writes only when the best improves, which is of no use for going on. A resumed run
    gets a folder of its own; it takes the best checkpoint so far, and its score, along. Where nothing was left to
    train, last.ckpt there is a copy of what was resumed.

    Args:
        monitor: key of the metric that decides.
        mode: whether it should be small (``min``) or large (``max``).
    """

    def __init__(self, monitor: str, mode: Literal["min", "max"]) -> None:
        super().__init__(filename="best", monitor=monitor, mode=mode, save_top_k=1, enable_version_counter=False)
        self._said: set[str] = set()
        self._resumes = True
        self._resumed: Path | None = None  # the checkpoint that training goes on from
        self._trains = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note whether a training will go on: a test takes nothing along."""
        self._resumes = trainer.state.fn == "fit"
        self._resumed, self._trains = None, False
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that there is something to train."""
        self._trains = True
        super().on_train_start(trainer, pl_module)

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """Store the score that chooses under the monitor's name, where Lightning looks for it."""
        found = super()._monitor_candidates(trainer)
        task, monitor = trainer.lightning_module, self.monitor
        table = getattr(task, "results", None)
        if monitor is not None and isinstance(table, ScoreTable):
            selection = select(
                *(monitor, table),
                minimum=getattr(task, "monitor_minimum", 1),
                unit=getattr(task, "monitor_unit", "items"),
            )
            if selection.key in found:
                found[monitor] = found[selection.key]
            self._say(trainer, selection.reason)
        return found

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Leave an epoch out whose score is not defined: Lightning would keep the first of them."""
        value = monitor_candidates.get(self.monitor or "")
        if value is not None and bool(value.isnan()):
            self._say(trainer, f"{self.monitor} is not defined (nan): an epoch without it is never the best")
            return
        super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _say(self, trainer: L.Trainer, line: str | None) -> None:
        if line is not None and line not in self._said and trainer.is_global_zero:
            self._said.add(line)
            log.info(line)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save best.ckpt if the monitor improved, then last.ckpt."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.dirpath is not None and not getattr(trainer, "fast_dev_run", False):
            self.last_model_path = str(Path(self.dirpath) / "last.ckpt")
            trainer.save_checkpoint(self.last_model_path)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have the folder of a training that was over already begin where it ended, for whoever goes on from here."""
        dry = self.dirpath is None or getattr(trainer, "fast_dev_run", False)
        if self._trains or dry or self._resumed is None or not self._resumed.is_file():
            return
        last = Path(cast(str, self.dirpath)) / "last.ckpt"
        if trainer.is_global_zero and not last.is_file():
            copy_checkpoint(self._resumed, last)
        self.last_model_path = str(last)
        trainer.strategy.barrier("last.ckpt")  # who reads it next may be another process

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where the checkpoint lies: its best is looked for beside it."""
        self._resumed = None if trainer.ckpt_path is None else Path(trainer.ckpt_path)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the scores, and a copy of the best checkpoint of the run that goes on here."""
        state = dict(state_dict)
        taken = self._resumes and self.dirpath is not None
        old = self._best_so_far(Path(state["best_model_path"])) if taken else None
        if taken and old is None:
            if state["best_model_path"]:
                told = "%s is damaged or gone; the best of the epochs from here on is kept instead"
                log.warning(told, state["best_model_path"])
            fresh = type(self)(cast(str, self.monitor), cast(Any, self.mode)).state_dict()
            state |= {key: fresh[key] for key in fresh if key != "monitor"}
        elif old is not None:
            new = Path(cast(str, self.dirpath)) / old.name
            if old.resolve() != new.resolve() and getattr(rank_zero_only, "rank", 0) == 0:
                copy_checkpoint(old, new)
            state["best_k_models"] = {str(new): score for score in state["best_k_models"].values()}
            state["best_model_path"] = state["kth_best_model_path"] = str(new)
            state["last_model_path"] = ""
        super().load_state_dict({**state, "dirpath": self.dirpath})

    def _best_so_far(self, stored: Path) -> Path | None:
        """Return the best checkpoint of the run that goes on, None where it is damaged or gone.

        The stored path is that of a moment: from another working directory, or once folders were moved, it leads
        nowhere, or to the best of another run. So what lies beside the resumed checkpoint, in a folder of the same
        name, comes first.
        """
        places = [stored]
        if self._resumed is not None and stored.name:
            beside = self._resumed.with_name(stored.name)
            places.insert(0 if beside.parent.name == stored.parent.name else 1, beside)
        return next((path for path in places if _is_whole(path)), None)


class SaveRun(SaveConfigCallback):
    """Save config.yaml and run.json (commit, versions, config hash, seed, machine, time) in the run folder.

    A command that works in the folder of an earlier run writes config_<command>.yaml and leaves config.yaml alone.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the file name, then save as Lightning does."""
        folder = run_dir(trainer)
        # A test of an earlier run's checkpoint reports the time of that run's training.
        known = json.loads((folder / "run.json").read_text()) if folder is not None and _has_run(folder) else {}
        self.times = {key: known[key] for key in ("fit_seconds", "fit_cpu_seconds") if key in known}
        # The config of an earlier run has no comments: what its first config said is kept.
        self.about = str(known.get("about") or comment_of(self.config.get("config") or ()))
        # Only a fit goes on from a checkpoint; a test of the run tells what its fit did.
        fitting = stage == "fit" or trainer.state.fn == "fit"
        self.continued = _as_found(self.config.get("ckpt_path")) if fitting else known.get("continued_from")
        self.known = known
        if not self.already_saved and stage != "fit" and folder is not None and _has_run(folder):
            self.config_filename = f"config_{getattr(stage, 'value', stage)}.yaml"
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = run_dir(trainer)
        if folder is not None and self.config_filename == "config.yaml":
            write_json(folder / "run.json", self.describe_run())

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter(), time.process_time()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note how long training and its validations took."""
        wall, cpu = self._started
        self.times = {"fit_seconds": time.perf_counter() - wall, "fit_cpu_seconds": time.process_time() - cpu}
        folder = run_dir(trainer)
        if folder is not None and trainer.is_global_zero:
            write_json(folder / "run.json", self.describe_run())

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The commit and versions of this run, read once at its start: later commits are not what ran."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, format="yaml"))
        return {
            "system": config.get("system"),
            "name": config.get("name"),
            "about": self.about,
            "seed": config.get("seed_everything"),
            "seeds": seeds_of({key: config.get(key) for key in ("seed_everything", "model", "data")}),
            "config_hash": config_hash(config),
            "variant_hash": self._variant_hash(config),
            "commit": git_commit(),
            "packages": own_packages(config),
            "versions": versions(),
            "machine": machine(),
        }

    def describe_run(self) -> dict[str, Any]:
        """Return what run.json says: names, seeds, hashes of the config, versions, machine and the time of training.

        ``about`` is the first comment line of the first config, which names the system and says what it is.
        ``commit`` is that of moeapps; ``packages`` has version and commit of the user's own packages.
        ``continued_from`` is the checkpoint that a resumed training went on from, with its whole path, None for one
        from the start.
        """
        return {**self.facts, "continued_from": self.continued, **self.times}

    def _variant_hash(self, config: dict[str, Any]) -> str:
        """What was run is known from the training on: the run it started from may have gone since."""
        known = self.known.get("variant_hash")
        same = self.known.get("config_hash") == config_hash(config)
        return str(known) if known and same else variant_hash(config)


def _as_found(checkpoint: Any) -> str | None:
    """A checkpoint as it is found from any folder: results are read elsewhere than runs are trained."""
    path = None if checkpoint is None else str(checkpoint)
    return str(Path(path).resolve()) if path is not None and Path(path).is_file() else path


def comment_of(configs: Sequence[Any]) -> str:
    """The first comment line of the first file after ``--config``, which says what the system is; else empty."""
    first = next(iter(configs), None)
    try:
        return "" if first is None else first_comment(Path(getattr(first, "absolute", str(first))))
    except (OSError, ValueError):  # YAML in place of a file, or a file that went away
        return ""


def _is_whole(path: Path) -> bool:
    try:
        check_whole(path)
    except CheckpointError:
        return False
    return True


def _has_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - the state others draw from
    return {
        "python": random.getstate(),
        # A tensor in place of the array: checkpoints must load with weights_only=True.
        "numpy": (name, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
