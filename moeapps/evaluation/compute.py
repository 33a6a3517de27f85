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


@dataclass(frozen=True)
class RunCost:
    """What one run cost.

    Args:
        run: as it is named in the matrix.
        seed: its seed.
        sizes: name in the header -> number; what a file does not say is left out.
    """

    run: str
    seed: int | None
    sizes: dict[str, float]


def run_costs(runs: Sequence[RunResults]) -> list[RunCost]:
    """Read what runs cost out of their headers, one entry per run."""
    found = []
    once = list({run.path: run for run in runs}.values())
    names = {run.path: variant.name for variant in variants_of(once) for run in variant.runs}
    for run in once:
        sizes = {name: run.header.get(name) for name in SIZES}
        known = {name: float(size) for name, size in sizes.items() if isinstance(size, int | float) and size > 0}
        found.append(RunCost(names[run.path], run.seed, known))
    return found


def cost_lines(runs: Sequence[RunResults], baseline: Sequence[RunResults] = ()) -> list[str]:
    """Return one line per variant and set of sizes: what it cost."""
    lines: dict[str, None] = {}
    for cost in run_costs([*runs, *baseline]):
        told = ", ".join(f"{SIZES[name]} {size:,.6g}" for name, size in cost.sizes.items())
        lines[f"{cost.run}: {told or 'cost unknown'}"] = None
    return list(lines)


def cost_warnings(runs: Sequence[RunResults], baseline: Sequence[RunResults]) -> list[str]:
    """Return a line for every size in which a variant is more than 2 per cent from the baseline, on average over runs.

    Sizes that one side does not say cannot be compared; a line says so for the training FLOPs.
    """
    base_paths = {run.path for run in baseline}
    others = [run for run in runs if run.path not in base_paths]
    lines: list[str] = []
    if not baseline:
        return lines
    base_costs = run_costs(baseline)
    for found in variants_of(others):
        mine, variant = run_costs(found.runs), found.name
        for name, text in SIZES.items():
            left, right = _mean(mine, name), _mean(base_costs, name)
            if left is None or right is None:
                if name == "train_flops":
                    lines.append(f"{variant}: its training FLOPs and the baseline's are not both known")
            elif abs(left / right - 1) > TOLERANCE:
                lines.append(
                    f"{variant}: {text} differ from the baseline's by {100 * (left / right - 1):+.1f} per cent; "
                    f"more than {100 * TOLERANCE:.0f} is no comparison at equal compute"
                )
    return lines


def _mean(costs: Sequence[RunCost], name: str) -> float | None:
    sizes = [cost.sizes[name] for cost in costs if name in cost.sizes]
    return math.fsum(sizes) / len(sizes) if sizes and len(sizes) == len(costs) else None
