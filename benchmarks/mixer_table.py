# SPDX-License-Identifier: Apache-2.0
"""Write the table of tasks/dynamics/README.md from the committed cells of MixER: ``python -m benchmarks.mixer_table``.

Errors of roll-outs spread over powers of ten, so that every number is a median over the pairs of seeds that all rows
of the table have.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.evidence.cells import CellResult, read_cells
from benchmarks.evidence.grid import Cell
from moeapps.training.run import write_text

ROOT = Path(__file__).resolve().parents[1]
CELLS = ROOT / "benchmarks" / "results" / "mixer" / "cells"
README = ROOT / "tasks" / "dynamics" / "README.md"
BLOCK = re.compile(r"(<!-- evidence:begin -->\n).*?(<!-- evidence:end -->)", re.DOTALL)
ROWS = {
    "robust": "robust (ours)",
    "mixer": "MixER as published",
    "mixer_gate": "its gate, all else as ours",
    "robust_cold": "robust without random start",
    "oracle": "families told",
    "hard_em": "hard EM",
    "switch": "Switch",
    "soft": "soft mixture, 4 times the FLOPs",
    "frozen": "frozen gate",
    "single": "one learner, an expert's size",
    "single_params": "one learner, all parameters",
}
"""Variants of the grid and their names in the table."""
COLUMNS = {
    "ARI": "partition/ari",
    "purity": "partition/purity",
    "MSE": "seen/mse",
    "relative": "seen/relative_mse",
    "relative, median": "seen/relative_mse_median",
    "new inside": "inside/relative_mse_median",
    "new outside": "outside/relative_mse_median",
    "new family": "pendulum/relative_mse_median",
}
"""Names of columns and the metrics they show."""


def medians(cells: Mapping[Cell, CellResult], metric: str) -> dict[str, float]:
    """The median of a metric over the pairs of seeds that all rows have, by variant."""
    pairs = {name: {(c.seed, c.data_seed) for c in cells if c.variant == name} for name in ROWS}
    common = set.intersection(*pairs.values())
    if not common:
        raise ValueError(f"no pair of seeds has all of {list(ROWS)}; run python -m benchmarks.evidence mixer first")
    values: dict[str, list[float]] = {name: [] for name in ROWS}
    for cell, result in cells.items():
        if cell.variant in ROWS and (cell.seed, cell.data_seed) in common:
            values[cell.variant].append(result.value(metric))
    return {name: statistics.median(found) for name, found in values.items()}


def table(cells: Mapping[Cell, CellResult]) -> str:
    """The Markdown between the two marks."""
    columns = {title: medians(cells, metric) for title, metric in COLUMNS.items()}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, title in ROWS.items():
        shown = (
            f"{found[name]:.2f}" if COLUMNS[c].startswith("partition") else f"{found[name]:.1e}"
            for c, found in columns.items()
        )
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrite the block."""
    text = README.read_text(encoding="utf-8")
    block = table(read_cells(CELLS, "mixer"))
    write_text(README, BLOCK.sub(lambda found: found[1] + block + found[2], text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
