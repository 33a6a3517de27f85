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
    """Refuse overlays without their base config, and those of another system.

    Args:
        command: the command, for the text.
        read: config files in order, each with what it says.
        flags: the other words.

    Raises:
        UsageError: one is refused; the text names its base, or its system.
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
    system = next((str(config.get("system")) for _, config in read if _names_class(config.get("model"))), "")
    for file, _ in read if system in bases else ():
        meant = owners_of(file, bases)
        if meant and system not in meant:
            raise UsageError(
                f"{file} is an overlay for {' or '.join(meant)}, the base config is of {system}; "
                f"`moeapps list {system}` shows the overlays of {system}"
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
