# SPDX-License-Identifier: Apache-2.0
"""``moeapps list``: the systems at hand. Standard library only."""

from __future__ import annotations

import os
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class System:
    """One base config.

    Args:
        name: file name without its ending.
        config: path to type after ``--config``.
        summary: the first comment line of the file.
    """

    name: str
    config: str
    summary: str


def config_folder() -> Path | None:
    """Return the folder of the base configs: ``configs`` here, or in the checkout that holds the package; else None."""
    for folder in (Path("configs"), Path(__file__).resolve().parents[2] / "configs"):
        if folder.is_dir():
            return folder
    return None


def systems() -> list[System]:
    """Return the base configs in order of their names; each says what it is in its first comment line."""
    folder = config_folder()
    found = []
    for path in sorted(folder.glob("*.yaml")) if folder is not None else []:
        found.append(System(path.stem, os.path.relpath(path), first_comment(path)))
    return found


def overlays() -> dict[str, list[str]]:
    """Return the overlay files by sub-folder of the config folder."""
    folder = config_folder()
    groups: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/*.yaml")) if folder is not None else []:
        groups.setdefault(path.parent.name, []).append(path.stem)
    return groups


def all_configs() -> list[str]:
    """Return the paths of all configs, base configs first."""
    folder = config_folder()
    if folder is None:
        return []
    return [os.path.relpath(path) for pattern in ("*.yaml", "*/*.yaml") for path in sorted(folder.glob(pattern))]


def first_comment(path: Path) -> str:
    """Return the first comment line of a config, which says what it is; "" without one."""
    with path.open(encoding="utf-8") as lines:
        first = lines.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""


def overlays_of(system: str) -> list[System]:
    """Return the baselines of one system, each with its first comment line."""
    folder = config_folder()
    paths = [] if folder is None else sorted((folder / "baselines").glob(f"{system}_*.yaml"))
    return [System(path.stem, os.path.relpath(path), first_comment(path)) for path in paths]


def _wrapped(title: str, words: list[str]) -> str:
    """Names in lines of at most 100 columns, under a title."""
    return textwrap.fill(", ".join(words), 100, initial_indent=f"  {title:<14}", subsequent_indent=" " * 16)


def main(args: list[str]) -> int:
    """Print systems and overlays; ``-h`` explains."""
    if args and args[0] in ("-h", "--help"):
        print(
            "usage: moeapps list [SYSTEM]\n\nShow the systems (base configs) and the overlays that can follow them; "
            "with a SYSTEM,\nits rivals and controls with a line each."
        )
        return 0
    if args:
        return _one(args[0])
    found = systems()
    if not found:
        print("no configs found: run this in a checkout, or give your own file to `moeapps fit --config FILE`")
        return 1
    for system in found:
        print(f"{system.config:<32}{system.summary}")
    print("\noverlays, given as a further --config configs/GROUP/NAME.yaml:")
    for group, names in overlays().items():
        if group != "baselines":
            print(_wrapped(f"{group}/", names))
            continue
        for system in found:
            shown = [overlay.name.removeprefix(f"{system.name}_") for overlay in overlays_of(system.name)]
            if shown:
                print(_wrapped("baselines/", [f"{system.name}_*: {shown[0]}", *shown[1:]]))
    print("\nmoeapps list SYSTEM says what its baselines are.")
    return 0


def _one(name: str) -> int:
    """Print the baselines of one system."""
    known = [system.name for system in systems()]
    if name not in known:
        print(f"error: no system {name!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    for overlay in overlays_of(name):
        print(f"{overlay.config:<54}{overlay.summary}")
    return 0
