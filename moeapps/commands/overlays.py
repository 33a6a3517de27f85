# SPDX-License-Identifier: Apache-2.0
"""Which base config an overlay is for: said where it is given without one, or with another system's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeapps.commands.boundary import UsageError
from moeapps.commands.listing import find_config, systems

PARTS = ("model", "data")
# Folders of our configs whose files belong to the base whose name they begin with.
_OWNED = ("baselines", "paper", "stages", "debug")


def has_base(command: str, read: Sequence[tuple[str, dict[str, Any]]], flags: Sequence[str]) -> None:
    """Refuse overlays without their base config.

    Args:
        command: the command, for the text.
        read: config files in order, each with what it says.
        flags: the other words.

    Raises:
        UsageError: one is refused; the text names its base.
    """
    given = {word.partition("=")[0].removesuffix(".class_path") for word in flags}
    named = {part: f"--{part}" in given or any(_names_class(config.get(part)) for _, config in read) for part in PARTS}
    lacking = " and ".join(part for part, there in named.items() if not there)
    bases = {system.name: system.config for system in systems()}
    if read and lacking:
        file, meant = next(((file, owners) for file, _ in read if (owners := owners_of(file, bases))), (read[0][0], []))
        of = f" of {' or '.join(meant)}" if meant else ""
        base = bases[meant[0]] if meant else "configs/SYSTEM.yaml"
        raise UsageError(
            f"{file} is an overlay{of} without its base: nothing names the class of {lacking}; give the base first: "
            f"moeapps {command} --config {base} --config {file}"
        )


def one_system(read: Sequence[tuple[str, dict[str, Any]]], run: dict[str, Any] | None = None) -> None:
    """Refuse a second base config and overlays of another system: parts of both would be run under one name.

    Args:
        read: config files in order, each with what it says.
        run: what the config of the run says that they change.

    Raises:
        UsageError: one is refused; the text names its system.
    """
    bases = {system.name: system.config for system in systems()}
    whole = {file: str(config["system"]) for file, config in read if config.get("system") and _is_whole(config)}
    first = next(iter(whole), "")
    system = whole.get(first, "") if run is None else str(run.get("system"))
    for file, _ in read:
        meant = [whole[file]] if file in whole else owners_of(file, bases)
        told = system in bases or (run is None and file in whole)  # of systems of one's own there are no overlays here
        if not told or not meant or system in meant:
            continue
        of = " or ".join(meant)
        if run is not None:
            raise UsageError(f"{file} is of {of}, the run is of {system}; leave it out, or give a run of {of}")
        if file in whole:
            raise UsageError(
                f"{file} is the config of {of}, {first} that of {system}, and a training is of one system: leave one "
                "of them out"
            )
        raise UsageError(
            f"{file} is an overlay for {of}, the base config is of {system}; `moeapps list {system}` shows the "
            f"overlays of {system}"
        )


def owners_of(file: str, bases: dict[str, str]) -> list[str]:
    """Return the systems that an overlay of ours is for, by its name or the tasks it names; none where for all."""
    path = Path(file)
    if path.parts[:1] != ("configs",) or file in bases.values():
        return []
    if path.parent.name in _OWNED:
        found = [name for name in bases if path.stem == name or path.stem.startswith(f"{name}_")]
        return [max(found, key=len)] if found else []
    tasks = _tasks_of(file)
    return [name for name, base in bases.items() if tasks and tasks <= _tasks_of(base)]


def _tasks_of(file: str) -> set[str]:
    """Return the task packages whose classes a config names."""
    text = find_config(file).read_text(encoding="utf-8")
    return set(re.findall(r"class_path:\s*tasks\.(\w+)", text))


def _names_class(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and "class_path" in part)


def _is_whole(config: dict[str, Any]) -> bool:
    return all(_names_class(config.get(part)) for part in PARTS)
