# SPDX-License-Identifier: Apache-2.0
"""The compute of compared runs, and whether it allows a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeapps.evaluation.results import RunResults

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
    for run in {run.path: run for run in runs}.values():
        sizes = {name: run.header.get(name) for name in SIZES}
        known = {name: float(size) for name, size in sizes.items() if isinstance(size, int | float) and size > 0}
        found.append(RunCost(run.label, run.seed, known))
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
    for variant in dict.fromkeys(run.label for run in others):
        mine = run_costs([run for run in others if run.label == variant])
        for name, text in SIZES.items():
            left, right = _mean(mine, name), _mean(run_costs(baseline), name)
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
