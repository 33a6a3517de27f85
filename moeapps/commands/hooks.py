# SPDX-License-Identifier: Apache-2.0
"""Commands that a task provides: build the system of a run or config, then hand over to the task's function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from moeapps.commands.tasks import TaskCommand, load


def summary_of(commands: Sequence[TaskCommand]) -> str:
    """Say what a command does for each of the tasks that provide it."""
    return "; ".join(dict.fromkeys(command.summary for command in commands))


def run_hook(commands: Sequence[TaskCommand], args: list[str]) -> int:
    """Run a command that one or several tasks provide; the data of the run or config decides whose.

    Args:
        commands: what each task says of its command; they share a name, and whether it needs weights.
        args: words of the user; those that name no run or config go to the task.

    Returns:
        Exit code.
    """
    name, weights = commands[0].name, commands[0].weights
    ways = "--run DIR" if weights else "(--run DIR | --config FILE [--config FILE ...])"
    parser = argparse.ArgumentParser(
        prog=f"moeapps {name}",
        usage=f"moeapps {name} {ways} [options of the task]",
        description=f"{summary_of(commands)}; `moeapps {name} {ways} --help` shows the options of its task.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="run folder, or runs/<system>/<name>: its newest version"
    )
    if not weights:
        parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help="config files")
    if weights:
        parser.add_argument("--ckpt_path", type=Path, metavar="FILE", help="checkpoint (default: best, else last)")
    parser.add_argument("--trust", metavar="none|PACKAGE,...", help="what configs may import (docs/reliability.md)")
    options, rest = parser.parse_known_args(args)
    configs: list[Path] = getattr(options, "config", [])
    if options.run is not None:
        check_words(commands, rest, options.run)
    if options.run is None and not configs:
        if {"-h", "--help"} & set(rest):
            print(parser.format_help())
            return 0
        print(f"error: moeapps {name} needs {ways}", file=sys.stderr)
        return 2
    trust = [] if options.trust is None else ["--trust", options.trust]
    return _hand_over(commands, rest, options.run, configs, getattr(options, "ckpt_path", None), trust)


def check_words(commands: Sequence[TaskCommand], rest: list[str], run: Path) -> None:
    """Let the parser of a run's task read the words, if its config says whose they are; the building tells the rest."""
    import yaml

    from moeapps.training.folders import newest_version

    try:
        held = yaml.safe_load((newest_version(run, trained=True) / "config.yaml").read_text(encoding="utf-8"))
        data = ":".join(str(held["data"]["class_path"]).rsplit(".", 1))
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
        return
    for command in commands:
        if command.options is not None and command.data == data:
            parser = cast(Callable[[], argparse.ArgumentParser], load(command.options))()
            parser.parse_args(rest if has_out(rest) else [*rest, "--out", str(run)])


def has_out(words: Sequence[str]) -> bool:
    """Whether the user says where to write."""
    return "--out" in [word.split("=")[0] for word in words]


def _hand_over(
    commands: Sequence[TaskCommand],
    rest: list[str],
    run: Path | None,
    configs: list[Path],
    ckpt: Path | None,
    trust: list[str],
) -> int:
    from moeapps.commands.boundary import UsageError
    from moeapps.commands.checkpoints import checkpoint_of
    from moeapps.commands.trained import build, load_weights
    from moeapps.commands.trust import take_trust
    from moeapps.training.folders import newest_version

    run = None if run is None else newest_version(run, trained=True)
    built = build(run, configs, take_trust(trust)[1])
    kinds = [kind.__module__ + ":" + kind.__qualname__ for kind in type(built.datamodule).__mro__]
    command = next((command for command in commands if command.data in kinds), None)
    if command is None:
        kind = type(built.datamodule).__name__
        known = "; ".join(command.systems for command in commands)
        raise UsageError(f"{kind} has no command `{commands[0].name}`; it is for {known}")
    if command.weights:
        which = str(ckpt) if str(ckpt) in ("last", "best") else None
        load_weights(built.model, checkpoint_of(run, which=which) if ckpt is None or which is not None else ckpt)
        built.model.to(built.trainer.strategy.root_device)
        if not has_out(rest) and run is not None:
            rest = [*rest, "--out", str(run / command.name)]
    function = cast(Callable[[list[str], Any, Any], int], load(command.function))
    return function(rest, built.model, built.datamodule)
