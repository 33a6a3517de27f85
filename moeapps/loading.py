# SPDX-License-Identifier: Apache-2.0
"""A trained run as an object that answers raw inputs, and as files that other programs read.

``moeapps.load(run).predict(inputs)`` is the whole interface; what inputs are is a matter of the task (its README). An
exported folder (`moeapps export`) is loaded like a run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from yaml import YAMLError

from moeapps.commands.boundary import UsageError, sentence
from moeapps.commands.tasks import extend_path, foreign_tasks
from moeapps.commands.trained import build
from moeapps.data.domain import DomainDataModule
from moeapps.training.checkpoints import read_checkpoint
from moeapps.training.folders import RunError, newest_version, versions_of
from moeapps.training.task import BaseTask

if TYPE_CHECKING:
    from moeapps.commands.run import Cli

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Trained:
    """A trained system.

    Attributes:
        run: the folder that it was read from.
        checkpoint: the file of its weights.
        task: the network and all around it, in evaluation mode.
        data: what it was trained with, as far as inputs need it (names of classes, tokenizers); nothing is read from
            disk or generated for it before an input needs it.
    """

    run: Path
    checkpoint: Path
    task: BaseTask
    data: DomainDataModule

    def predict(self, inputs: Any, **options: Any) -> Any:
        """Answer raw inputs of the task.

        Args:
            inputs: a file or arrays; the task's README says which.
            options: of the task, too.

        Returns:
            Tensors on the CPU, by name.

        Raises:
            ValueError: inputs that the task cannot read.
        """
        try:
            batches = self.data.batches_of(inputs, **options)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            raise ValueError(f"{type(self.data).__name__}: {str(error).split('() ')[-1]}") from None
        with isolate_rng(), torch.no_grad():
            moved = [move_data_to_device(batch, self.task.device) for batch in batches]
            return self.task.answer_inputs(moved)


def load_run(
    run: str | Path,
    *,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    trust: frozenset[str] | None = None,
) -> Trained:
    """Build the system of a run or of an exported folder, with its weights; see `moeapps.load`.

    Raises:
        ValueError: no such run, no weights, weights of another network, or something else is called ``tasks``.
    """
    extend_path()
    if (complaint := foreign_tasks()) is not None:
        raise ValueError(complaint.removeprefix("error: "))
    folder = newest_version(Path(run), trained=True)
    if not (folder / "config.yaml").is_file():
        what = "an empty run" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"{run}: {what}, there is no config.yaml; give runs/<system>/<name>, a version_<k> below it, or a folder "
            "of `moeapps export`"
        )
    weights = _weights_of(folder) if checkpoint is None else Path(checkpoint)
    with isolate_rng(), _own_seed():  # building draws first weights, and sets the seed of the run
        built = _build(folder, trust)
    task, data = cast(BaseTask, built.model), cast(DomainDataModule, built.datamodule)
    _restore(task, weights)
    data.load_parts(folder)
    # What `trainer.predict` would set: answers look up their data there.
    trainer = cast(Any, built.trainer)
    trainer.datamodule, task.trainer = data, trainer
    task.to(device).eval()
    return Trained(folder, weights, task, data)


@contextmanager
def _own_seed() -> Iterator[None]:
    """Keep the seed that Lightning leaves in the environment: a later trainer and child processes would take it up."""
    before = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _build(folder: Path, trust: frozenset[str] | None) -> Cli:
    """Build task and data; what is wrong with a config is told without the parser's own errors behind it.

    Raises:
        ValueError: a wrong config, or a package that is not there.
    """
    told: Exception
    try:
        return build(folder, packages=trust)
    except (UsageError, RunError) as error:
        told = error
    except (ImportError, YAMLError) as error:
        told = UsageError(f"{folder / 'config.yaml'}: {sentence(error).splitlines()[0]}")
    raise told.with_traceback(None) from None


def _weights_of(folder: Path) -> Path:
    names = (WEIGHTS, "checkpoints/best.ckpt", "checkpoints/last.ckpt")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        others = [one for one in versions_of(folder.parent) if any((one / name).is_file() for name in names)]
        earlier = f"give {others[0]}, which has one, or " if others else "give "
        looked = f"no checkpoint, looked for {', '.join(names)}"
        raise ValueError(f"{folder}: {looked}; {earlier}a file as checkpoint=..., or train the run")
    return found


def _restore(task: BaseTask, file: Path) -> None:
    """Put the weights of a file into the task; nothing but tensors is unpickled.

    Raises:
        ValueError: the file is missing, damaged, or of another network.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give a checkpoint of the run")
    try:
        state = _read(file)
    except Exception as error:  # each format has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"{file} is damaged or no checkpoint ({reason}); give another") from error
    own = task.state_dict()
    # Counters that only training has (scores of a fit, positions in it) are not of the network.
    missing = [name for name in own if name not in state]
    spare = [name for name in state if name not in own and not name.startswith(("val_scores.", "test_scores."))]
    wrong: list[str] = []
    if not missing and not spare:
        try:  # not by comparing sizes: a fitted gate takes over how many rows it was fitted on
            task.load_state_dict({name: value for name, value in state.items() if name in own})
        except RuntimeError as error:
            wrong = re.findall(r"size mismatch for ([\w.]+):", str(error)) or [str(error).splitlines()[0]]
    if missing or spare or wrong:
        told = (("lacks", missing), ("has more:", spare), ("has in another size:", wrong))
        what = "; ".join(f"{word} {', '.join(names[:3])}{' ...' * (len(names) > 3)}" for word, names in told if names)
        raise ValueError(f"{file} {what}; it is of another network than {file.parent} says, give that run's own file")


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    state: dict[str, Tensor] = read_checkpoint(file)["state_dict"]
    return state
