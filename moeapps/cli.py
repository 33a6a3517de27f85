# SPDX-License-Identifier: Apache-2.0
"""The command line: ``moeapps`` and its alias ``lightning``.

This file loads the standard library only, so that help answers at once; torch and Lightning are imported when a command
needs them. The training commands live in ``moeapps/commands/run.py``, each further command in a file of its own; those
that only some systems have are listed in ``tasks/<task>/commands.py``.
"""

from __future__ import annotations

import difflib
import itertools
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import moeapps
from moeapps.commands.boundary import guarded, without_debug
from moeapps.commands.hooks import run_hook, summary_of
from moeapps.commands.listing import all_configs, find_config, is_config_text, systems
from moeapps.commands.tasks import extend_path, foreign_tasks, task_commands

RUN_COMMANDS = ("fit", "validate", "test", "predict")
TRAINING_COMMANDS = (*RUN_COMMANDS, "curriculum")
# These build no system: they work where something else is called `tasks`.
TASKLESS = ("list", "xeval", "report", "doctor", "new-task")
# command -> (module with main(args) -> exit code, one line)
COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("moeapps.commands.run", "train, then test with the best checkpoint"),
    "validate": ("moeapps.commands.run", "evaluate on the seen and validation domains"),
    "test": ("moeapps.commands.run", "evaluate on all domains, unseen ones included"),
    "predict": ("moeapps.commands.run", "write predictions into the run folder"),
    "curriculum": ("moeapps.commands.curriculum", "train in stages, each from the weights of the one before"),
    "list": ("moeapps.commands.listing", "show the systems and their configs"),
    "new-task": ("moeapps.commands.new_task", "write a task of your own that trains as it is"),
    "export": ("moeapps.commands.export", "write a trained run as safetensors, description and program"),
    "xeval": ("moeapps.commands.xeval", "compare runs: seen/unseen matrix, intervals, paired differences"),
    "evidence": ("moeapps.commands.evidence", "run a grid of variants and seeds, judge its claims"),
    "report": ("moeapps.commands.report", "write one page of runs: who won, what the experts learned, samples"),
    "data": ("moeapps.commands.data", "list or prepare data packages: licence, size, source"),
    "doctor": ("moeapps.commands.doctor", "show versions, threads, caches and who owns `lightning` on PATH"),
}


def help_text() -> str:
    """Return the text of ``moeapps --help``, made without importing anything heavy."""
    lines = ["usage: moeapps COMMAND [options]", "", "Mixture-of-experts models outside language.", "", "commands:"]
    lines += [f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()]
    lines += [f"  {name:<12}{summary_of(commands)}" for name, commands in task_commands().items()]
    found = systems()
    if found:
        lines += ["", "systems (moeapps fit --config FILE):"]
        width = max(len(system.config) for system in found) + 2
        lines += [f"  {system.config:<{width}}{system.summary}" for system in found]
    lines += [
        "",
        "moeapps COMMAND --help shows all options of a command (fit, validate, test and predict import torch first).",
    ]
    lines += ["Later --config files win, flags win over files: moeapps fit --config A.yaml --config B.yaml --name mine"]
    return "\n".join(lines)


def _run(words: list[str], program: str) -> int:
    extend_path()
    first = words[0] if words else "--help"
    if first in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if first in ("-V", "--version"):
        print(f"moeapps {moeapps.__version__}")
        return 0
    of_tasks = task_commands()
    if first not in COMMANDS and first not in of_tasks:
        return _unknown(first, words, program)
    complaint = foreign_tasks() if first not in TASKLESS else None
    if complaint or (first in RUN_COMMANDS and (complaint := _missing_config(words[1:]))):
        print(complaint, file=sys.stderr)
        return 2
    if first in RUN_COMMANDS:
        from moeapps.commands.names import check

        check(words)
    if first in of_tasks:
        return run_hook(of_tasks[first], words[1:])
    if first not in TRAINING_COMMANDS:
        return _command(first)(words[1:])
    from moeapps.commands.later import start_quickly, without_collector

    start_quickly()
    with without_collector():
        return _command(first)(words if first in RUN_COMMANDS else words[1:])


def _command(name: str) -> Callable[[list[str]], int]:
    command: Callable[[list[str]], int] = import_module(COMMANDS[name][0]).main
    return command


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: the words after the program name; None takes them from the command line.

    Returns:
        Exit code: 0 done, 1 nothing to do, 2 an error that was told, 130 after Ctrl-C, 143 after SIGTERM, 141 where
        nobody reads the output any more.
    """
    words, debug = without_debug(sys.argv[1:] if args is None else args)
    program = Path(sys.argv[0]).stem if args is None else "moeapps"
    return guarded(lambda: _run(words, program), debug=debug)


def _missing_config(words: Sequence[str]) -> str | None:
    """Return a message on a missing ``--config`` file, before anything slow is imported; None where all exist."""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        path = value if equals else following
        if name not in ("-c", "--config") or is_config_text(path) or find_config(path).is_file():
            continue
        known = {Path(config).name: config for config in reversed(all_configs())}  # base configs win
        close = difflib.get_close_matches(Path(path).name, known, n=1)
        hint = f"did you mean {known[close[0]]}? " if close else ""
        return f"error: there is no config file {path!r}; {hint}`moeapps list` shows all configs"
    return None


def _unknown(first: str, words: list[str], program: str) -> int:
    """Pass an unknown command to lightning-sdk if we were called as ``lightning``; else explain."""
    known = [*COMMANDS, *task_commands()]
    if program == "lightning":
        foreign = _lightning_sdk()
        if foreign is not None:
            sys.argv[1:] = words
            result = foreign.load()()
            return result if isinstance(result, int) else 0
        print(
            f"error: `lightning {first}` is not a command of moeapps, which owns this `lightning`, and lightning-sdk "
            f"(the cloud client of that name) is not installed.\nmoeapps knows: {', '.join(known)}. "
            "See `moeapps --help`; for the cloud client, pip install lightning-sdk.",
            file=sys.stderr,
        )
        return 2
    close = difflib.get_close_matches(first, known, n=1)
    hint = f"did you mean `moeapps {close[0]}`? " if close else ""
    unknown = f"error: unknown command {first!r}; {hint}moeapps knows: {', '.join(known)}"
    print(foreign_tasks() or unknown, file=sys.stderr)
    return 2


def _lightning_sdk() -> EntryPoint | None:
    """Return the entry point of lightning-sdk's own ``lightning`` script, if that package is installed."""
    scripts = entry_points(group="console_scripts", name="lightning")
    return next(
        (entry for entry in scripts if entry.dist and entry.dist.name.replace("_", "-") == "lightning-sdk"), None
    )


if __name__ == "__main__":
    sys.exit(main())
