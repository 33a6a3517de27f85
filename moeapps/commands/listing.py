# SPDX-License-Identifier: Apache-2.0
"""``moeapps list``: the systems at hand. Standard library only."""

from __future__ import annotations

import os
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
        with path.open(encoding="utf-8") as lines:
            first = lines.readline().strip()
        found.append(System(path.stem, os.path.relpath(path), first.lstrip("# ") if first.startswith("#") else ""))
    return found


def overlays() -> dict[str, list[str]]:
    """Return the overlay files by sub-folder of the config folder."""
    folder = config_folder()
    groups: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/*.yaml")) if folder is not None else []:
        groups.setdefault(path.parent.name, []).append(path.stem)
    return groups


def main(args: list[str]) -> int:
    """Print systems and overlays; ``-h`` explains."""
    if args and args[0] in ("-h", "--help"):
        print("usage: moeapps list\n\nShow the systems (base configs) and the overlays that can follow them.")
        return 0
    found = systems()
    if not found:
        print("no configs found: run this in a checkout, or give your own file to `moeapps fit --config FILE`")
        return 1
    for system in found:
        print(f"{system.config:<32}{system.summary}")
    for group, names in overlays().items():
        print(f"\noverlays configs/{group}/: " + ", ".join(names))
    return 0
