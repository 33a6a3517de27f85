# SPDX-License-Identifier: Apache-2.0
"""A grid of three variants with two claims, and finished cells made up on the spot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeapps.evidence.cells import CellResult
from moeapps.evidence.grid import Cell, Claim, Grid, Variant

WIN = Claim("C1", "Experts help on unseen domains.", "unseen/miou", "higher", "moe", "dense")
TIE = Claim("C2", "Experts do not hurt.", "seen/miou", "higher", "same", "dense", "non-inferiority", 0.01)


def toy(variants: dict[str, Variant] | None = None, claims: tuple[Claim, ...] = (WIN, TIE), **changes: Any) -> Grid:
    default = {"moe": Variant(flags=("--gain", "0.1")), "dense": Variant(), "same": Variant()}
    return Grid("toy", "base.yaml", variants or default, claims, **{"show": ("unseen/miou",), **changes})


def result(variant: str, seed: int, value: float, **changes: Any) -> CellResult:
    """A finished cell made up on the spot."""
    plain = CellResult(
        system="toy", variant=variant, seed=seed, data_seed=seed, definition="d", config_hash="h", commit="c",
        params_total=1000, params_active=500, flops_per_token=2000.0,
        metrics={"unseen/miou": value, "seen/miou": value}, domains=["kitchen", "street"],
        cpu_s=60.0, machine="toy machine", train_flops=6_000_000,
    )  # fmt: skip
    return replace(plain, **changes)


def results(**values: list[float]) -> dict[Cell, CellResult]:
    found = [result(name, seed, value) for name, row in values.items() for seed, value in enumerate(row, start=1)]
    return {cell.cell: cell for cell in found}
