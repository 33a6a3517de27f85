# SPDX-License-Identifier: Apache-2.0
"""Commands that a task provides: build the system of a run or config, then hand over to its data module.

``DomainDataModule.command(name)`` gives the function; nothing here knows a task.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def run_hook(name: str, summary: str, args: list[str], *, weights: bool) -> int:
    """Run a command of a task.

    Args:
        name: as ``DomainDataModule.command`` knows it.
        summary: one line of help.
        args: words of the user; those that name no run or config go to the task.
        weights: the command needs trained weights.

    Returns:
        Exit code.
    """
    ways = "--run DIR" if weights else "(--run DIR | --config FILE [--config FILE ...])"
    parser = argparse.ArgumentParser(
        prog=f"moeapps {name}",
        usage=f"moeapps {name} {ways} [options of the task]",
        description=f"{summary}; `moeapps {name} {ways} --help` shows the options of its task.",
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
    try:
        options, rest = parser.parse_known_args(args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    configs: list[Path] = getattr(options, "config", [])
    if options.run is None and not configs:
        if {"-h", "--help"} & set(rest):
            print(parser.format_help())
            return 0
        print(f"error: moeapps {name} needs {ways}", file=sys.stderr)
        return 2
    return _told(name, rest, options.run, configs, getattr(options, "ckpt_path", None), weights)


def _told(name: str, rest: list[str], run: Path | None, configs: list[Path], ckpt: Path | None, weights: bool) -> int:
    """Run it; report a wrong configuration or a damaged file without a traceback."""
    from moeapps.commands.messages import UsageError
    from moeapps.data.archives import ArchiveError

    try:
        return _hand_over(name, rest, run, configs, ckpt, weights)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except (UsageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ArchiveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _hand_over(
    name: str, rest: list[str], run: Path | None, configs: list[Path], ckpt: Path | None, weights: bool
) -> int:
    from moeapps.commands.messages import UsageError
    from moeapps.commands.trained import build, checkpoint_of, load_weights
    from moeapps.training.run import newest_version

    run = None if run is None else newest_version(run)
    built = build(run, configs)
    command = built.datamodule.command(name)
    if command is None:
        kind = type(built.datamodule).__name__
        raise UsageError(
            f"{kind} has no command `{name}`; it is for systems that draw images, such as configs/promoe.yaml"
        )
    if weights:
        load_weights(built.model, ckpt or checkpoint_of(run))
        built.model.to(built.trainer.strategy.root_device)
        if "--out" not in [word.split("=")[0] for word in rest] and run is not None:
            rest = [*rest, "--out", str(run / name)]
    code: int = command(rest, built.model)
    return code
