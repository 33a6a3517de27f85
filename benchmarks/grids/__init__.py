# SPDX-License-Identifier: Apache-2.0
"""The evidence grids of the seven systems, one YAML file each (docs/evidence_grids.md)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from moeapps.evidence.grid import Grid, GridError, Variant
from moeapps.evidence.reading import GridFile, read_grid

FOLDER = Path(__file__).resolve().parent


def list_systems() -> list[str]:
    """List the systems that have a grid."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def load_file(system: str) -> GridFile:
    """Read the grid of a system.

    Raises:
        GridError: there is none, or something in it is wrong.
    """
    if system not in list_systems():
        known = ", ".join(list_systems()) or "none yet"
        raise GridError(f"no grid for {system!r}; there are grids for: {known}. Add benchmarks/grids/{system}.yaml")
    return read_grid(FOLDER / f"{system}.yaml")


def load_grid(system: str) -> Grid:
    """Read the grid of a system."""
    return load_file(system).grid


def given(variant: Variant, option: str) -> str | None:
    """Give what the flags of a variant set an option to; None where they leave it alone."""
    found = [flag.partition("=")[2] for flag in variant.flags if flag.partition("=")[0] == option]
    return found[-1] if found else None


def without(variant: Variant, option: str) -> Variant:
    """Give a variant that leaves an option alone, and runs once: before its value was chosen."""
    flags = tuple(flag for flag in variant.flags if flag.partition("=")[0] != option)
    return Variant(variant.overlays, flags, 1, variant.data_seed_flags, variant.stages)
