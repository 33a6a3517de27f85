# SPDX-License-Identifier: Apache-2.0
"""``moeapps list``: the systems at hand. Standard library only."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LONGEST_PATH = 255


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


def packaged_configs() -> Path | None:
    """Return the folder of the configs that come with moeapps: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next((folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()), None)


def find_config(typed: str) -> Path:
    """Return the file that a ``--config`` means: the user's own, else the packaged one below ``configs/``."""
    given, packaged = Path(typed), packaged_configs()
    if packaged is None or given.exists() or given.parts[:1] != ("configs",):
        return given
    found = packaged.joinpath(*given.parts[1:])
    return found if found.is_file() else given


def is_config_text(typed: str) -> bool:
    """Whether a ``--config`` is YAML in place of a file, which the parser takes as well."""
    return any(sign in typed for sign in "\n{:") and (len(typed) > _LONGEST_PATH or not find_config(typed).is_file())


def located(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with every ``--config`` as the file that it means."""
    found: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if before in ("-c", "--config"):
            word = str(find_config(word))
        elif equals and name in ("-c", "--config"):
            word = f"{name}={find_config(value)}"
        found.append(word)
    return found


def _configs(pattern: str) -> dict[str, Path]:
    """Configs by what is to be typed: packaged ones and those below ``configs`` here, which win."""
    here = Path("configs")
    folders = [packaged_configs() or here, here]
    found = {(here / path.relative_to(folder)).as_posix(): path for folder in folders for path in folder.glob(pattern)}
    return dict(sorted(found.items()))


def _described(pattern: str) -> list[System]:
    return [System(path.stem, typed, first_comment(path)) for typed, path in _configs(pattern).items()]


def systems() -> list[System]:
    """Return the base configs in order of their names; each says what it is in its first comment line."""
    return _described("*.yaml")


def overlays_of(system: str) -> list[System]:
    """Return the baselines of one system, each with its first comment line."""
    return _described(f"baselines/{system}_*.yaml")


def overlays() -> dict[str, list[str]]:
    """Return the overlay files by sub-folder of the config folder."""
    groups: dict[str, list[str]] = {}
    for typed in _configs("*/*.yaml"):
        groups.setdefault(Path(typed).parent.name, []).append(Path(typed).stem)
    return groups


def all_configs() -> list[str]:
    """Return what to type for every config, base configs first."""
    return [*_configs("*.yaml"), *_configs("*/*.yaml")]


def first_comment(path: Path) -> str:
    """Return the first comment line of a config, which says what it is; "" without one."""
    with path.open(encoding="utf-8") as lines:
        first = lines.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""


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
        print("no configs found; give your own file to `moeapps fit --config FILE`")
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
