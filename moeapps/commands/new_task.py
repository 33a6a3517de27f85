# SPDX-License-Identifier: Apache-2.0
"""``moeapps new-task NAME``: a task of one's own that trains, tests and passes its tests as it is written.

Its files are those of ``moeapps/templates/new_task``; ``$name`` in them is what was asked for. Standard library only.
"""

from __future__ import annotations

import argparse
import keyword
import re
import shutil
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from string import Template

from moeapps.commands.boundary import UsageError
from moeapps.commands.listing import packaged_configs

TEMPLATES = Path(__file__).resolve().parents[1] / "templates" / "new_task"
_ENDING = ".template"
_SHAPE = re.compile(r"[a-z](?:[a-z0-9_]{0,38}[a-z0-9])?")
# Folders beside the package, and words that mean something to the command line.
_TAKEN = ("configs", "runs", "tests", "tasks", "moeapps")


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="moeapps new-task",
        description="Write a package that trains, tests, compares with its dense twin and passes its tests at once: "
        "model, module, datamodule, config, twin, evidence grid, tests. Replace its parts by yours "
        "(docs/extending.md).",
    )
    parser.add_argument("name", metavar="NAME", help="name of the package and of its folder here, such as my_task")
    return parser


def check_name(name: str, place: Path) -> None:
    """Check that a package of this name can be made.

    Args:
        name: what was asked for.
        place: the folder that the package's own is made in.

    Raises:
        UsageError: it cannot; one sentence why.
    """
    if not _SHAPE.fullmatch(name) or keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise UsageError(
            f"{name!r} is no name for a task; use 1 to 40 of a-z, 0-9 and _, a letter first, no _ last, and no word of "
            "Python's own: moeapps new-task my_task"
        )
    if (place / name).exists() or (place / name).is_symlink():
        raise UsageError(f"{place / name} is there already; choose another name, or remove it")
    if name in _TAKEN or _is_package(name):
        raise UsageError(f"{name!r} is a package already, which yours would hide; choose another name")
    configs = packaged_configs()
    if configs is not None and (configs / f"{name}.yaml").exists():
        raise UsageError(f"{name!r} is a system that comes with moeapps; choose another name")


def _is_package(name: str) -> bool:
    """Whether Python finds a module of this name; of folders without code of their own, those that were installed."""
    spec = find_spec(name)
    return spec is not None and (spec.origin is not None or name in packages_distributions())


def write_task(name: str, place: Path) -> list[Path]:
    """Write the package; of several processes that ask for one name, one gets it.

    Args:
        name: of the package and its folder.
        place: the folder to make it in.

    Returns:
        The files, relative to ``place``.

    Raises:
        UsageError: the name cannot be had.
    """
    check_name(name, place)
    words = {"name": name, "project": name.replace("_", "-")}
    folder = place / name
    try:
        folder.mkdir()
    except FileExistsError:  # another process was faster
        raise UsageError(f"{folder} is there already; choose another name, or remove it") from None
    written = []
    try:
        for source in sorted(TEMPLATES.rglob(f"*{_ENDING}")):
            target = folder / _target(source.relative_to(TEMPLATES), name)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = Template(source.read_text(encoding="utf-8")).substitute(words)
            target.write_text(text, encoding="utf-8")
            written.append(target.relative_to(place))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return written


def _target(source: Path, name: str) -> Path:
    """Where a template's text goes: ``package`` is the package's folder, ``gitignore`` gets its dot."""
    first, *rest = source.parts
    parts = [{"package": name, f"gitignore{_ENDING}": f".gitignore{_ENDING}"}.get(first, first), *rest]
    return Path(*(part.replace("__NAME__", name) for part in parts)).with_suffix("")


def main(args: list[str]) -> int:
    """Write the package into the working folder and say what to do next."""
    name = parser().parse_args(args).name
    for path in write_task(name, Path()):
        print(f"  {path}")
    print(
        f"\nA task that works as it is. Next:\n\n  cd {name}\n  pytest\n"
        f"  lightning fit --config configs/{name}.yaml\n"
        f"  lightning fit --config configs/{name}.yaml --config configs/baselines/{name}_dense.yaml\n"
        f"  moeapps xeval runs/{name}/base runs/{name}/dense --baseline runs/{name}/dense\n\n"
        f"Then replace {name}/datamodule.py, model.py and module.py by yours, step by step: docs/extending.md."
    )
    return 0
