# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a command works with: ``--run``, ``--ckpt_path last|best``, and the names that checkpoints have."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

from moeapps.commands.messages import UsageError
from moeapps.training.callbacks import BestCheckpoint
from moeapps.training.checkpoints import RESUMED, first_whole
from moeapps.training.folders import holds_checkpoint, known_runs, newest_version, run_place, versions_of

log = logging.getLogger("moeapps")

# What a command that trains nothing takes, by what is asked for: where no epoch had a score, there is no best.
_NAMES: dict[str | None, tuple[str, ...]] = {
    None: ("best.ckpt", "last.ckpt", "interrupted.ckpt"),
    "best": ("best.ckpt",),
    "last": ("last.ckpt", "interrupted.ckpt"),
}


def named_checkpoint(command: str, options: Any) -> str | None:
    """The checkpoint that was asked for: a file as it is; ``last`` and ``best`` are those of the named run.

    Args:
        command: fit, validate, test or predict.
        options: its parsed options.

    Raises:
        UsageError: there is none, or nothing was named where trained weights are needed.
    """
    path = options.get("ckpt_path")
    if path is None and command != "fit" and not options.untrained:
        raise UsageError(
            f"{command} needs trained weights: give --run DIR or --ckpt_path FILE, or --untrained for weights as they "
            "are drawn"
        )
    if path not in ("last", "best"):
        return None if path is None else str(path)
    place = run_place(options.system, options.name)
    # Newest first; one that was just begun, or broke off at once, holds none.
    runs = [run for run in versions_of(place) if holds_checkpoint(run)]
    if not runs:
        raise UsageError(f"--ckpt_path {path}: no run in {place} has a checkpoint; give a file, or --run DIR")
    found = checkpoint_of(runs[0], command, path)
    log.info("--ckpt_path: %s", found)
    return str(found)


def refuse_taken_names(callbacks: Sequence[Callback]) -> None:
    """Keep the names of our checkpoints: a further ModelCheckpoint would overwrite them, and later delete its own.

    Raises:
        UsageError: one writes files of those names into the run folder.
    """
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and not _is_ours(callback) and callback.dirpath is None:
            if callback.save_last:
                raise UsageError("ModelCheckpoint: save_last is not allowed; last.ckpt is written anyway: leave it out")
            if callback.filename in ("best", "last", "interrupted"):
                raise UsageError(
                    f"ModelCheckpoint: filename {callback.filename!r} is a checkpoint of every run; choose another name"
                )


def _is_ours(callback: Callback) -> bool:
    return isinstance(callback, BestCheckpoint)


def ours_first(callbacks: Sequence[Callback]) -> list[Callback]:
    """Put our checkpoints before the user's: the first is the one whose best is tested."""
    return sorted(callbacks, key=lambda each: isinstance(each, Checkpoint) and not _is_ours(each))


def expand_run(args: list[str]) -> tuple[list[str], Path | None]:
    """Replace ``--run DIR`` by DIR's config and checkpoint; runs/<system>/<name> is its newest version that has one.

    ``fit`` goes on from interrupted.ckpt, else last.ckpt, in a new run folder; the other commands take best.ckpt and
    write into DIR. ``--ckpt_path last`` and ``best`` are those of DIR.

    Returns:
        The words without ``--run``, and the folder to write into (None: a new one).

    Raises:
        UsageError: DIR is no run folder, or holds no checkpoint.
    """
    words, folder = list(args), None
    for i, word in enumerate(args):
        if word == "--run" or word.startswith("--run="):
            name = word[6:] if word.startswith("--run=") else (args[i + 1] if i + 1 < len(args) else "")
            folder = newest_version(Path(name), trained=True)
            words = [*args[:i], *args[i + (1 if "=" in word else 2) :]]
            break
    if folder is None:
        return words, None
    head = [words[0], "--config", str(config_of(folder))]
    named = _last_value(words, "--ckpt_path")
    if named in ("last", "best"):
        words += ["--ckpt_path", str(checkpoint_of(folder, words[0], named))]
    elif named is None and "--untrained" not in words:
        head += ["--ckpt_path", str(checkpoint_of(folder, words[0]))]
    return [*head, *words[1:]], None if words[0] == "fit" else folder


def _last_value(words: Sequence[str], option: str) -> str | None:
    """Return what an option says, the last time if it is given several times."""
    found = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else following
    return found


def config_of(run: Path) -> Path:
    """The config of a run.

    Raises:
        UsageError: there is none.
    """
    if not (run / "config.yaml").is_file():
        what = "it holds no config.yaml" if run.is_dir() else "there is no such folder"
        raise UsageError(f"--run {run}: {what}; give {known_runs()}")
    return run / "config.yaml"


def checkpoint_of(run: Path | None, command: str = "test", which: str | None = None) -> Path:
    """The checkpoint of a run that a command takes.

    Args:
        run: its folder.
        command: ``fit`` goes on from the newest whole checkpoint, and says so if a newer one is damaged; all others
            take the best, else (no epoch had a score) the last.
        which: ``last`` or ``best`` where the user says it.

    Raises:
        UsageError: there is none of them.
    """
    held = Path() if run is None else run / "checkpoints"
    resumed = command == "fit" and which != "best"
    names = RESUMED if resumed else _NAMES[which]
    present = [held / name for name in names if run is not None and (held / name).is_file()]
    # Of damaged ones alone the first is taken: who reads it says what is wrong.
    found = (first_whole(held) if resumed and present else None) or next(iter(present), None)
    if found is None:
        others = [] if run is None else [one for one in versions_of(run.parent) if holds_checkpoint(one)]
        earlier = f"give --run {others[0]}, which has one, or " if others else ""
        raise UsageError(f"--run {run}: no checkpoints/{names[0]} there; {earlier}name a file with --ckpt_path")
    return found
