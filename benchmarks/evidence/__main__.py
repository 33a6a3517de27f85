# SPDX-License-Identifier: Apache-2.0
"""Run, verify or summarise the evidence of a system: ``python -m benchmarks.evidence SYSTEM``.

The same as ``moeapps evidence benchmarks/grids/SYSTEM.yaml``, at the root of a checkout; without a system,
``--summarise`` computes the results of all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.grids import list_systems, load_file
from moeapps.commands.evidence import add_options, run_grid, worst
from moeapps.evidence.cells import CellError
from moeapps.evidence.grid import GridError

ROOT = Path(__file__).resolve().parents[2]


def build_parser() -> argparse.ArgumentParser:
    """Give the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("system", nargs="?", help=f"one of: {', '.join(list_systems())}")
    add_options(parser)
    return parser


def main(words: Sequence[str] | None = None, *, root: Path = ROOT, command: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status."""
    options = build_parser().parse_args(words)
    console = Console(highlight=False)
    try:
        if options.system is None and not options.summarise:
            raise GridError(f"name a system: {', '.join(list_systems())}")
        systems = list_systems() if options.system is None else [options.system]
        return worst(
            run_grid(load_file(system), options, console=console, root=root, command=command) for system in systems
        )
    except (GridError, CellError) as error:
        console.print(f"error: {error}", markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
