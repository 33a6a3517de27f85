# SPDX-License-Identifier: Apache-2.0
"""Stages of a training: a run starts from what an earlier run has trained, and may train some parameters only.

A run with ``start`` takes over weights once, before its first step. A resumed run goes on from its own checkpoint and
never starts again. What the earlier runs have cost is carried on, so that the results of the last stage count the whole
curriculum. YAML::

    model:
      init_args:
        start:
          class_path: moeapps.training.stages.FromCheckpoint
          init_args: {path: runs/toy/first}
        trained: ["net.*.router.*"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import override

from moeapps.data.domain import DomainDataModule
from moeapps.files import sha256_of
from moeapps.moe.surgery import Shared, fuse
from moeapps.training.checkpoints import CheckpointError, read_checkpoint
from moeapps.training.folders import RunError, newest_version

Which = Literal["last", "best"]
# Of the source's task, not of its networks: a stage has losses (and counters of their schedules) of its own.
_OWN = ("aux_losses.",)


class StageError(RunError):
    """A run that cannot start as it was told; the command line prints the text alone."""


@dataclass(frozen=True)
class Origin:
    """What a run started from; saved in its checkpoints and told in its results.

    Args:
        path: the checkpoints, in order.
        sha256: the first 16 hexadecimal digits of theirs, in order.
        train_flops: operations of all trainings up to there, those they started from included; None if not known.
    """

    path: tuple[str, ...]
    sha256: tuple[str, ...]
    train_flops: int | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint or a results file."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Origin:
        """From plain values."""
        return cls(tuple(plain["path"]), tuple(plain["sha256"]), plain["train_flops"])


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read.

    Args:
        path: the file.
        state: the state of its task, without what belongs to the stage itself.
        sha256: the first 16 hexadecimal digits of the file's.
        train_flops: what its training, and those before, have cost in all; None if its run did not count.
        about: everything else it holds, such as the state of its data module under that class's name.
    """

    path: Path
    state: dict[str, Tensor]
    sha256: str
    train_flops: int | None
    about: dict[str, Any]


class Start:
    """How a network begins; a subclass says what goes where.

    Nothing is read before a training begins: a run can be built, tested and shared without the files it came from.

    Args:
        path: a run (``runs/<system>/<name>``: its newest version), a run folder or a checkpoint file; or several.
        checkpoint: which checkpoint of a run; a file is taken as it is.
    """

    def __init__(self, path: str | list[str], *, checkpoint: Which = "last") -> None:
        self.paths = [path] if isinstance(path, str) else list(path)
        if not self.paths or checkpoint not in ("last", "best"):
            raise ValueError(f"path={path!r}, checkpoint={checkpoint!r}: give a path, and 'last' or 'best'.")
        self.checkpoint: Which = checkpoint

    def check(self) -> None:
        """Look for the checkpoints, before anything costly is done.

        Raises:
            StageError: one is missing.
        """
        for path in self.paths:
            checkpoint_file(path, self.checkpoint)

    def begin(self, task: nn.Module, data: DomainDataModule | None = None) -> Origin:
        """Take the weights over into the task, once, before it trains.

        Args:
            task: the task.
            data: what it will train on; may refuse weights to which its numbers would mean something else.

        Raises:
            StageError: a missing or damaged checkpoint, or one of another network or of other data.
        """
        sources = [read_source(path, self.checkpoint) for path in self.paths]
        try:
            if data is not None:
                for source in sources:
                    data.check_trained_on(source.about.get(type(data).__qualname__, {}))
            self.apply(task, [source.state for source in sources])
        except ValueError as error:
            names = ", ".join(str(source.path) for source in sources)
            raise StageError(f"cannot start from {names}: {error}") from error
        costs = [source.train_flops for source in sources]
        return Origin(
            path=tuple(str(source.path) for source in sources),
            sha256=tuple(source.sha256 for source in sources),
            train_flops=None if None in costs else sum(cost or 0 for cost in costs),
        )

    def apply(self, task: nn.Module, states: Sequence[dict[str, Tensor]]) -> None:
        """Put the states of the sources into the task.

        Raises:
            ValueError: they do not fit.
        """
        raise NotImplementedError


class FromCheckpoint(Start):
    """Begin with the weights of one earlier run, name by name.

    Args:
        path: a run (``runs/<system>/<name>``: its newest version), a run folder or a checkpoint file.
        checkpoint: which checkpoint of a run; a file is taken as it is.
        source: the part of the earlier task that is taken; empty is all of it (auxiliary losses are never taken).
        into: the parts of this task that each begin as that, as patterns on names of modules (``*`` is one level);
            None means the part of the same name. Several parts begin as copies.

    Raises:
        ValueError: no path, or more than one.
    """

    def __init__(
        self, path: str, *, checkpoint: Which = "last", source: str = "", into: list[str] | None = None
    ) -> None:
        super().__init__(path, checkpoint=checkpoint)
        self.source, self.into = source, into

    @override
    def apply(self, task: nn.Module, states: Sequence[dict[str, Tensor]]) -> None:
        found = parts_of(states[0], self.source)
        if len(found) != 1:
            raise ValueError(f"source={self.source!r} names {len(found)} parts of it; name one.")
        state = next(iter(found.values()))
        for name in [self.source] if self.into is None else modules_of(task, self.into):
            load(task.get_submodule(name), state, name)


class Fused(Start):
    """Begin as the fusion of specialists, see :func:`moeapps.moe.surgery.fuse`.

    Args:
        path: one run that holds all specialists, or one run per specialist.
        checkpoint: which checkpoint of a run; a file is taken as it is.
        source: the specialists in those checkpoints, as a pattern on names of modules (``*`` is one level), in
            ascending order.
        into: the mixture in this task.
        shared: what shared experts start from: ``random`` or ``first_slice`` of the specialists in turn.
        rescale: give the fused layer the size of a specialist's output.

    Source: UniMoE-Audio (docs/papers/unimoe_audio.md, equations 16 and 17).
    """

    def __init__(
        self,
        path: str | list[str],
        *,
        checkpoint: Which = "last",
        source: str = "net",
        into: str = "net",
        shared: Shared = "random",
        rescale: bool = True,
    ) -> None:
        super().__init__(path, checkpoint=checkpoint)
        self.source, self.into, self.shared, self.rescale = source, into, shared, rescale

    @override
    def apply(self, task: nn.Module, states: Sequence[dict[str, Tensor]]) -> None:
        specialists = [part for state in states for part in parts_of(state, self.source).values()]
        net = task.get_submodule(self.into)
        load(net, fuse(specialists, net, shared=self.shared, rescale=self.rescale), self.into)


def read_source(path: str | Path, which: Which = "last") -> Source:
    """Read the checkpoint of an earlier run.

    The cost is that of the whole run, also where its best checkpoint is an earlier one, and not known if it is not
    known at the run's end.

    Args:
        path: a run, a run folder or a file.
        which: which checkpoint of a run.

    Raises:
        StageError: there is none, or it cannot be read.
    """
    file = checkpoint_file(path, which)
    held = _read(file)
    spent = [_spent(held)]
    last = file.with_name("last.ckpt")
    if file != last and last.is_file():
        spent.append(_spent(_read(last)))
    latest = max(spent, key=lambda each: (each[0], each[1] or 0))
    state = {key: value for key, value in held["state_dict"].items() if not key.startswith(_OWN)}
    about = {key: value for key, value in held.items() if key not in ("state_dict", "optimizer_states")}
    return Source(file, state, file_digest(file), latest[1], about)


def checkpoint_file(path: str | Path, which: Which = "last") -> Path:
    """Return the checkpoint that a path stands for.

    Raises:
        StageError: there is none.
    """
    given = Path(path)
    if given.is_file():
        return given
    file = newest_version(given, trained=True) / "checkpoints" / f"{which}.ckpt"
    if not file.is_file():
        told = "" if given.is_dir() else f" ({given} is not there)"
        raise StageError(f"no checkpoint {file} to start from{told}; train the earlier stage first, or correct `path`")
    return file


def file_digest(file: Path) -> str:
    """Return the first 16 hexadecimal digits of a file's sha256."""
    return sha256_of(file)[:16]


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_checkpoint(file)
    except CheckpointError as error:
        raise StageError(f"{error}, or train that run again") from error


def _spent(held: dict[str, Any]) -> tuple[int, int | None]:
    """Return the steps of a checkpoint, and what all trainings up to there have cost; None if that is not known."""
    found = held.get("callbacks", {}).get("MoESummary", {}).get("train_flops")
    return int(held.get("global_step", 0)), None if found is None else int(found)


def parts_of(state: dict[str, Tensor], pattern: str) -> dict[str, dict[str, Tensor]]:
    """Return the states of the modules whose name matches a pattern, with names from there on; "" is all of it.

    Raises:
        ValueError: there is none.
    """
    if not pattern:
        return {"": state}
    depth, found = pattern.count(".") + 1, dict[str, dict[str, Tensor]]()
    for key, value in state.items():
        levels = key.split(".")
        name = ".".join(levels[:depth])
        if len(levels) > depth and _matches(name, pattern):
            found.setdefault(name, {})[".".join(levels[depth:])] = value
    if not found:
        near = sorted({".".join(key.split(".")[:depth]) for key in state})
        raise ValueError(f"it has no part {pattern!r}; it has {_few(near)}.")
    return {name: found[name] for name in sorted(found, key=_by_number)}


def modules_of(task: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the modules that match patterns.

    Raises:
        ValueError: a pattern matches none.
    """
    names = [name for name, _ in task.named_modules()]
    found: list[str] = []
    for pattern in patterns:
        hits = [name for name in names if _matches(name, pattern)]
        if not hits:
            near = [name for name in names if name.count(".") == pattern.count(".") and name]
            raise ValueError(f"this task has no part {pattern!r}; it has {_few(near)}.")
        found += hits
    return found


def _matches(name: str, pattern: str) -> bool:
    levels, wanted = name.split("."), pattern.split(".")
    return len(levels) == len(wanted) and all(map(fnmatchcase, levels, wanted))


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(level), "") if level.isdigit() else (0, level) for level in name.split(".")]


def load(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Load a state into a module, all of it or nothing.

    Raises:
        ValueError: names or sizes differ; the text names the first of them.
    """
    own = module.state_dict()
    if not name:  # a whole task: what belongs to the stage itself stays as it is
        state = {**{key: value for key, value in own.items() if key.startswith(_OWN)}, **state}
    missing, spare = [key for key in own if key not in state], [key for key in state if key not in own]
    where = f"{name}." if name else ""
    if missing or spare:
        raise ValueError(
            f"it is another network: it lacks {_few([where + key for key in missing])} and has "
            f"{_few([where + key for key in spare])} beside; give both stages the same layers."
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"{where}{key} is {tuple(value.shape)} there and {tuple(own[key].shape)} here; give both stages the "
                "same widths, and data of the same shape."
            )
    module.load_state_dict(state)


def _few(names: Sequence[str]) -> str:
    return (", ".join(names[:4]) + (" ..." if len(names) > 4 else "")) or "nothing"


# What trains -----------------------------------------------------------------------------------------------------


def freeze_all_but(task: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Let only the parameters train whose full name matches a shell-style pattern; return their names.

    Raises:
        StageError: there is no pattern, or one matches no parameter.
    """
    names = [name for name, _ in task.named_parameters()]
    if not patterns:
        raise StageError("trained: [] trains nothing; name parameters, or leave it out to train all")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise StageError(
                f"trained: {pattern!r} matches no parameter; there are {_few(names)}. Use shell-style patterns on full "
                "names, such as '*.router.*'"
            )
    trained = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(name in trained)
    return trained


def hold_statistics(task: nn.Module) -> None:
    """Put norms with running statistics that train no parameter into evaluation mode: their buffers stay, too."""
    for module in task.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            parameters = list(module.parameters(recurse=False))
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
