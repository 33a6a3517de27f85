# SPDX-License-Identifier: Apache-2.0
"""Where runs lie: runs/<system>/<name>/version_k, who takes the next one, and which one a command reads."""

from __future__ import annotations

import logging
import os
import re
import shutil
from functools import cache
from pathlib import Path

from moeapps.text import lines

log = logging.getLogger("moeapps")

# What a run folder holds before the first step: of a run that an error ends there, nothing is worth keeping.
_BEFORE_STEPS = re.compile(r"run\.json|config(_\w+)?\.yaml|hparams\.yaml|events\.out\..*")


class RunError(ValueError):
    """What a run cannot do or go on with; the command line prints the text alone."""


def runs_root() -> Path:
    """Return the folder of all runs: $MOEAPPS_RUNS, or ``runs`` in the working directory."""
    return Path(os.environ.get("MOEAPPS_RUNS") or "runs")


def run_place(system: str, name: str, root: Path | None = None) -> Path:
    """Return the folder of all versions of a run, <root>/<system>/<name>; names may have levels, but none upwards.

    Args:
        system: of the run.
        name: of the variant.
        root: of all runs; None for the usual one.

    Raises:
        RunError: a name that leads elsewhere.
    """
    for option, given in (("system", system), ("name", name)):
        # A backslash and a colon lead elsewhere on other systems, a line break in the tables that show names.
        if not given.isprintable() or any(sign in given for sign in "\\:") or {"", ".", ".."} & set(given.split("/")):
            raise RunError(
                f"{option}: {given!r} is no name for a folder below {root or runs_root()}; use letters, digits, '_', "
                "'-', '.' and '/' between levels, and MOEAPPS_RUNS=FOLDER to keep runs elsewhere"
            )
    return (root or runs_root()) / system / name


def known_runs() -> str:
    """The newest runs there are, for an error; what a run is called where there is none."""
    files = sorted(runs_root().glob("*/*/version_*/config.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    names = list(dict.fromkeys(str(file.parents[1]) for file in files))
    if not names:  # where $MOEAPPS_RUNS leads
        return f"a run folder such as {runs_root() / 'promoe' / 'base' / 'version_0'}"
    return f"a run such as {', '.join(names[:3])}" + (f" ({len(names)} in all)" if len(names) > 3 else "")


def claim_version(folder: Path) -> Path:
    """Make the next ``version_k`` of a folder and return it; of runs that begin at once each gets its own.

    Raises:
        RunError: no folder can be made there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            claimed = folder / f"version_{next_version(folder)}"
            try:
                claimed.mkdir()
            except FileExistsError:  # another run was faster
                continue
            return claimed
    except OSError as error:
        raise RunError(
            f"cannot make a run folder in {folder} ({error}); set MOEAPPS_RUNS to a folder you can write"
        ) from error


def next_version(folder: Path) -> int:
    """Return the first k for which no ``version_k`` of ``folder`` has that or a higher number."""
    return max(_versions(folder), default=-1) + 1


def drop_unbegun(version: Path) -> None:
    """Remove a version that an error has ended before its first step; one that holds anything else stays."""
    if all(_BEFORE_STEPS.fullmatch(path.name) for path in version.rglob("*") if not path.is_dir()):
        shutil.rmtree(version, ignore_errors=True)


def newest_version(folder: Path, *, trained: bool = False) -> Path:
    """Return the newest ``version_k`` in runs/<system>/<name>; a folder without versions is returned as it is.

    A run that has just begun, or died early, hides no earlier one that came further; which one is taken is told then.

    Args:
        folder: the run's.
        trained: whether weights are wanted; else results count as much.
    """
    versions = versions_of(folder)
    wanted = holds_checkpoint if trained else _holds_anything
    chosen = next(filter(wanted, versions), None)
    if chosen is None:  # those that say why come before the empty ones
        return next((one for one in versions if one.is_dir() and any(one.iterdir())), versions[0])
    if chosen != versions[0]:
        _tell(
            f"{folder}: {versions[0].name} has no checkpoint{'' if trained else ' and no results'}; {chosen.name} is "
            "taken"
        )
    return chosen


def holds_checkpoint(version: Path) -> bool:
    """Whether a version holds weights."""
    return any((version / "checkpoints").glob("*.ckpt"))


def _holds_anything(version: Path) -> bool:
    return holds_checkpoint(version) or any((version / "metrics").glob("*.json"))


@cache
def _tell(text: str) -> None:
    """Say it once: one command asks for the same version at several places."""
    log.warning("%s", lines(text))


def versions_of(folder: Path, first: int = 0) -> list[Path]:
    """Return the versions in runs/<system>/<name>, the newest first; a folder without any is returned itself.

    Args:
        folder: the run's.
        first: the smallest number that counts.
    """
    versions = _versions(folder)
    counted = [versions[number] for number in sorted(versions, reverse=True) if number >= first]
    return counted if versions else [folder]


def _versions(folder: Path) -> dict[int, Path]:
    found = {path.name.removeprefix("version_"): path for path in folder.glob("version_*")}
    return {int(number): path for number, path in found.items() if number.isdigit()}
