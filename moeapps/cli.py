# SPDX-License-Identifier: Apache-2.0
"""The command line: ``moeapps`` and its alias ``lightning``.

This file loads the standard library only, so that help answers at once; torch and Lightning are imported when a command
needs them. The training commands live in ``moeapps/commands/run.py``, each further command in a file of its own.
"""

from __future__ import annotations

import difflib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

import moeapps

RUN_COMMANDS = ("fit", "validate", "test", "predict")
# command -> (module with main(args) -> exit code, one line)
COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("moeapps.commands.run", "train, then test with the best checkpoint"),
    "validate": ("moeapps.commands.run", "evaluate on the seen and validation domains"),
    "test": ("moeapps.commands.run", "evaluate on all domains, unseen ones included"),
    "predict": ("moeapps.commands.run", "write predictions into the run folder"),
    "list": ("moeapps.commands.listing", "show the systems and their configs"),
    "sample": ("moeapps.commands.sample", "draw images with a trained run"),
    "fid-stats": ("moeapps.commands.fid_stats", "statistics of images, for Fréchet distances"),
    "xeval": ("moeapps.commands.xeval", "compare runs: seen/unseen matrix, intervals, paired differences"),
    "data": ("moeapps.commands.data", "list or prepare data packages: licence, size, source"),
    "doctor": ("moeapps.commands.doctor", "show versions, threads, caches and who owns `lightning` on PATH"),
}


def help_text() -> str:
    """Return the text of ``moeapps --help``, made without importing anything heavy."""
    from moeapps.commands.listing import systems

    lines = ["usage: moeapps COMMAND [options]", "", "Mixture-of-experts models outside language.", "", "commands:"]
    lines += [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    found = systems()
    if found:
        lines += ["", "systems (moeapps fit --config FILE):"]
        lines += [f"  {system.config:<32}{system.summary}" for system in found]
    lines += [
        "",
        "moeapps COMMAND --help shows all options of a command (fit, validate, test and predict import torch first).",
    ]
    lines += ["Later --config files win, flags win over files: moeapps fit --config A.yaml --config B.yaml --name mine"]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: the words after the program name; None takes them from the command line.

    Returns:
        Exit code: 0 done, 1 failed, 2 wrong usage or configuration.
    """
    words = list(sys.argv[1:] if args is None else args)
    program = Path(sys.argv[0]).stem if args is None else "moeapps"
    first = words[0] if words else "--help"
    if first in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if first in ("-V", "--version"):
        print(f"moeapps {moeapps.__version__}")
        return 0
    if first not in COMMANDS:
        return _unknown(first, words, program)
    if first in RUN_COMMANDS and (complaint := _missing_config(words[1:])):
        print(complaint, file=sys.stderr)
        return 2
    _extend_path()
    command: Callable[[list[str]], int] = import_module(COMMANDS[first][0]).main
    return command(words if first in RUN_COMMANDS else words[1:])


def _missing_config(words: Sequence[str]) -> str | None:
    """Return a message on a missing ``--config`` file, before anything slow is imported; None where all exist."""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        path = value if equals else following
        # Anything with a line break or a brace is YAML in place of a file, which the parser takes as well.
        if name not in ("-c", "--config") or Path(path).is_file() or any(sign in path for sign in "\n{:"):
            continue
        from moeapps.commands.listing import all_configs

        known = {Path(config).name: config for config in reversed(all_configs())}  # base configs win
        close = difflib.get_close_matches(Path(path).name, known, n=1)
        hint = f"did you mean {known[close[0]]}? " if close else ""
        return f"error: there is no config file {path!r}; {hint}`moeapps list` shows all configs"
    return None


def _unknown(first: str, words: list[str], program: str) -> int:
    """Pass an unknown command to lightning-sdk if we were called as ``lightning``; else explain."""
    if program == "lightning":
        foreign = _lightning_sdk()
        if foreign is not None:
            sys.argv[1:] = words
            result = foreign.load()()
            return result if isinstance(result, int) else 0
        print(
            f"error: `lightning {first}` is not a command of moeapps, which owns this `lightning`, and lightning-sdk "
            f"(the cloud client of that name) is not installed.\nmoeapps knows: {', '.join(COMMANDS)}. "
            "See `moeapps --help`; for the cloud client, pip install lightning-sdk.",
            file=sys.stderr,
        )
        return 2
    close = difflib.get_close_matches(first, COMMANDS, n=1)
    hint = f"did you mean `moeapps {close[0]}`? " if close else ""
    print(f"error: unknown command {first!r}; {hint}moeapps knows: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


def _lightning_sdk() -> EntryPoint | None:
    """Return the entry point of lightning-sdk's own ``lightning`` script, if that package is installed."""
    for distribution in distributions(name="lightning-sdk"):
        for entry in distribution.entry_points:
            if entry.group == "console_scripts" and entry.name == "lightning":
                return entry
    return None


def _extend_path() -> None:
    """Make task packages importable: those of the working directory and of the checkout that holds this package.

    A console script, unlike ``python -m``, does not put the working directory on the import path.
    """
    checkout = Path(__file__).resolve().parents[1]
    for folder in (str(checkout) if (checkout / "tasks").is_dir() else None, os.getcwd()):
        if folder is not None and folder not in sys.path and "" not in sys.path:
            sys.path.insert(0, folder)


if __name__ == "__main__":
    sys.exit(main())
