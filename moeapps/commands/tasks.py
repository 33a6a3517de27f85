# SPDX-License-Identifier: Apache-2.0
"""What the folders below ``tasks`` bring to the command line; nothing here knows one of them.

Each task may have ``packages.py`` with a tuple ``PACKAGES`` and ``commands.py`` with a tuple ``COMMANDS``; both are
found by their names. This file loads the standard library only, and so does a ``commands.py``: help answers at once.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

from moeapps.commands.boundary import UsageError


@dataclass(frozen=True)
class TaskCommand:
    """A further command of the command line, provided by a task.

    Args:
        name: word after ``moeapps``.
        summary: one line of help.
        function: ``module:function``, called with the user's words, the task module and its data; gives the exit code.
        data: ``module:Class`` of the data modules that it works on.
        systems: which systems those are, for people.
        weights: it needs trained weights, hence a run.
        options: ``module:function`` that gives the parser of the user's words: wrong ones are then told, and ``--help``
            answered, before the run is built.
    """

    name: str
    summary: str
    function: str
    data: str
    systems: str
    weights: bool = False
    options: str | None = None


def load(path: str) -> object:
    """Return what ``module:name`` names."""
    module, _, name = path.partition(":")
    found: object = getattr(import_module(module), name)
    return found


def extend_path() -> None:
    """Make task packages importable: those of the working directory and those beside this package.

    A console script, unlike ``python -m``, does not put the working directory on the import path. At a prompt, in a
    notebook and with ``-c`` it is there as "", which is another folder while a config is read. Inside of a run it is
    left out: code of a run is never imported.
    """
    here = None if run_folder_of(Path.cwd() / "code.py") else os.getcwd()
    for folder in (str(_home()) if (_home() / "tasks").is_dir() else None, here):
        if folder is not None and folder not in sys.path:
            sys.path.insert(sys.path.index("") if "" in sys.path else 0, folder)


def run_folder_of(file: Path, *others: Path) -> Path | None:
    """The run folder, or folder of runs, that a file lies in, by its name or by where its links lead; None: in none.

    Args:
        file: any file, there or not.
        others: folders that are known to be of runs.
    """
    roots = (Path("runs"), Path(os.environ.get("MOEAPPS_RUNS") or "runs"), *others)
    known = {form for root in roots for form in _forms(root)}
    for form in _forms(file):
        for folder in form.parents:
            if folder in known or re.fullmatch(r"version_\d+", folder.name) or _is_run(folder):
                return folder
    return None


def _is_run(folder: Path) -> bool:
    written = ("run.json", "checkpoints", "metrics", "hparams.yaml")
    return (folder / "config.yaml").is_file() and any((folder / name).exists() for name in written)


def _forms(path: Path) -> tuple[Path, Path]:
    return Path(os.path.abspath(path)), path.resolve()


def foreign_tasks() -> str | None:
    """Say that something else of the name ``tasks`` hides ours; None where ours is found, or none at all."""
    spec = find_spec("tasks")
    ours = _home() / "tasks" / "__init__.py"
    if spec is None or spec.origin is None or Path(spec.origin).resolve() == ours:
        return None
    found = Path(spec.origin)
    found = found.parent if found.name == "__init__.py" else found
    return f"error: {found} hides the package `tasks` of moeapps; rename it, or run moeapps in another folder"


def _home() -> Path:
    """The folder that holds the packages moeapps and tasks: a checkout or site-packages."""
    return Path(__file__).resolve().parents[2]


def task_names() -> list[str]:
    """Return the names of the task packages, without importing them; none where something else is called ``tasks``."""
    spec = find_spec("tasks")
    if spec is None or spec.submodule_search_locations is None or foreign_tasks() is not None:
        return []
    return sorted(module.name for module in iter_modules(spec.submodule_search_locations) if module.ispkg)


def task_modules(part: str) -> list[str]:
    """Return the dotted names of all ``tasks.<task>.<part>`` that are there."""
    return [name for task in task_names() if find_spec(name := f"tasks.{task}.{part}") is not None]


def task_commands() -> dict[str, tuple[TaskCommand, ...]]:
    """Return the commands of all tasks by name; a name that several tasks provide is told apart by the data."""
    found: dict[str, tuple[TaskCommand, ...]] = {}
    for module in task_modules("commands"):
        for command in import_module(module).COMMANDS:
            found[command.name] = (*found.get(command.name, ()), command)
    return found


def moved_paths(text: str) -> dict[str, str]:
    """Return the class paths in a text that are of before: old -> new.

    ``moved.json`` beside the tasks maps old prefixes of class paths to new ones. A path that still leads to something
    is not of before, whatever its prefix.
    """
    found: dict[str, str] = {}
    for path in sorted(set(re.findall(r"(?<![\w.])[A-Za-z_]\w*(?:\.\w+)+", text))):
        prefix = moved_prefix(path)
        if prefix is not None and not _leads_somewhere(path):
            found[path] = _moved()[prefix] + path[len(prefix) :]
    return found


def refuse_moved(where: str, text: str) -> None:
    """Name the new class paths in place of those of before.

    Raises:
        UsageError: the text has class paths of before.
    """
    moved = [f"{old} is now {new}" for old, new in moved_paths(text).items()]
    if moved:
        raise UsageError(
            f"{where}: {'; '.join(moved)}. Write the new path; checkpoints from before the move are not supported, "
            "train their runs again"
        )


def moved_prefix(path: str) -> str | None:
    """Return the longest prefix of a class path in the table of what has moved."""
    return max((old for old in _moved() if path == old or path.startswith(old + ".")), key=len, default=None)


def _moved() -> dict[str, str]:
    spec = find_spec("tasks")
    table = Path(spec.origin).with_name("moved.json") if spec is not None and spec.origin is not None else None
    return {} if table is None or not table.is_file() else json.loads(table.read_text(encoding="utf-8"))


def _leads_somewhere(path: str) -> bool:
    module, _, name = path.rpartition(".")
    try:
        return hasattr(import_module(module), name) or find_spec(path) is not None
    except ImportError:
        return False
