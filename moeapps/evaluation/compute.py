# SPDX-License-Identifier: Apache-2.0
"""What compared runs cost, and whether they may be compared at all: beside the scores, not in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeapps.evaluation.results import RunResults
from moeapps.evaluation.variants import variants_of

TOLERANCE = 0.02
SIZES = {
    "params_active": "active parameters",
    "flops_per_token": "FLOPs a token",
    "train_flops": "training FLOPs",
}


COLUMNS = {"params_total": "parameters", **SIZES}


@dataclass(frozen=True)
class Cost:
    """What the runs of a variant cost, on average.

    Args:
        variant: its name.
        runs: how many.
        sizes: name in the header -> number; what some run does not say is left out.
        ratio: training FLOPs in those of the baseline; None where there is none, or one side is not known.
    """

    variant: str
    runs: int
    sizes: dict[str, float]
    ratio: float | None


def sizes_of(run: RunResults) -> dict[str, float]:
    """Return what a run cost, name in the header -> number; what the file does not say is left out."""
    sizes = {name: run.header.get(name) for name in COLUMNS}
    return {name: float(size) for name, size in sizes.items() if isinstance(size, int | float) and size > 0}


def costs(runs: Sequence[RunResults], baseline: Sequence[RunResults] = ()) -> list[Cost]:
    """Return what each variant cost, in order of appearance."""
    once = list({run.path: run for run in (*runs, *baseline)}.values())
    against = _mean(baseline, "train_flops") if baseline else None
    found = []
    for variant in variants_of(once):
        sizes = {name: _mean(variant.runs, name) for name in COLUMNS}
        known = {name: size for name, size in sizes.items() if size is not None}
        mine = known.get("train_flops")
        ratio = None if mine is None or against is None else mine / against
        found.append(Cost(variant.name, len(variant.runs), known, ratio))
    return found


def cost_warnings(runs: Sequence[RunResults], baseline: Sequence[RunResults]) -> list[str]:
    """Return a line for every size in which a variant is more than 2 per cent from the baseline, on average over runs.

    Sizes that one side does not say cannot be compared; a line says so for the training FLOPs. Where these are level,
    other sizes are what the comparison is about, and a line says that.
    """
    base_paths = {run.path for run in baseline}
    others = [run for run in runs if run.path not in base_paths]
    lines: list[str] = []
    if not baseline:
        return lines
    for found in variants_of(others):
        variant = found.name
        whole = _mean(found.runs, "train_flops"), _mean(baseline, "train_flops")
        level = whole[0] is not None and whole[1] is not None and abs(whole[0] / whole[1] - 1) <= TOLERANCE
        for name, text in SIZES.items():
            left, right = _mean(found.runs, name), _mean(baseline, name)
            if left is None or right is None:
                if name == "train_flops":
                    lines.append(f"{variant}: its training FLOPs and the baseline's are not both known")
            elif abs(left / right - 1) > TOLERANCE:
                unequal = f"more than {100 * TOLERANCE:.0f} is no comparison at equal compute"
                so = "the training as a whole took equally many FLOPs" if level else unequal
                lines.append(
                    f"{variant}: {text} differ from the baseline's by {100 * (left / right - 1):+.1f} per cent; {so}"
                )
    return lines


def _mean(runs: Sequence[RunResults], name: str) -> float | None:
    """The mean of a size over different runs, None where one does not say it."""
    found = [sizes_of(run).get(name) for run in {run.path: run for run in runs}.values()]
    sizes = [size for size in found if size is not None]
    return math.fsum(sizes) / len(sizes) if sizes and len(sizes) == len(found) else None
