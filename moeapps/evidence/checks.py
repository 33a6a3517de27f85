# SPDX-License-Identifier: Apache-2.0
"""Files and words of every variant, looked at before anything runs: what is wrong is told with file and line."""

from __future__ import annotations

import os
from pathlib import Path

from moeapps.commands.boundary import UsageError
from moeapps.commands.names import check
from moeapps.evidence.grid import Cell, GridError, Variant, located
from moeapps.evidence.reading import GridFile


def check_words(file: GridFile, root: Path) -> None:
    """Check the configs and words of every variant of a grid as ``moeapps fit`` does.

    Args:
        file: the grid.
        root: the folder that cells are run in.

    Raises:
        GridError: a file that is not there, a key or an option that cannot be right. The text names file and line.
    """
    if not located(file.grid.config, root).is_file():
        raise GridError(f"{file.at('config')}: there is no config {file.grid.config!r}")
    for name, variant in file.grid.variants.items():
        _check_files(file, variant, root, "variants", name)
    levels = file.grid.ladder.levels if file.grid.ladder is not None else {}
    for name, variant in levels.items():
        _check_files(file, variant, root, "ladder", "levels", name)
    here = Path.cwd()
    os.chdir(root)  # a config is looked for where it is run
    try:
        for name in file.grid.all_variants:
            _check_one(file, name)
    finally:
        os.chdir(here)


def _check_files(file: GridFile, variant: Variant, root: Path, *where: str) -> None:
    overlays = [(overlay, "overlays") for overlay in variant.overlays]
    overlays += [(stage[0], "stages") for stage in variant.stages]
    for overlay, key in overlays:
        if not located(overlay, root).is_file():
            raise GridError(f"{file.at(*where, key)}: {where[-1]}: there is no config {overlay!r}")


def _check_one(file: GridFile, name: str) -> None:
    """Check one variant by the words of its first cell; of a chain every stage."""
    words = file.grid.arguments(Cell(name, *file.grid.pairs(name)[0]))
    stages = file.grid.all_variants[name].stages
    common = ["fit", *(words[1 : words.index("--stage")] if stages else words[1:])]
    where = ("variants", name) if name in file.grid.variants else ("ladder", "levels", name.split("-")[1])
    try:
        for stage in stages or ((),):
            check([*common, *(("--config", *stage) if stage else ())])
    except UsageError as error:
        text = str(error)
        told_by_file = any(text.startswith(word) for word in words if word.endswith((".yaml", ".yml")))
        raise GridError(text if told_by_file else f"{file.at(*where, 'flags')}: {name}: {text}") from error
