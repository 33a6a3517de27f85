# SPDX-License-Identifier: Apache-2.0
"""The learning rate of ProMoE and its dense twin at half the width: ``python -m benchmarks.promoe_rates``.

Of each network by itself, after three times the steps of the other cells; with a seed of its own (100), by the loss on
the style that is kept for choices (:mod:`benchmarks.rates`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.grids import load_grid, without
from benchmarks.rates import RATE, RateSearch

GRID = load_grid("promoe")
MODELS = ("dense_narrow", "promoe_narrow")

SEARCH = RateSearch(
    system="promoe",
    command="python -m benchmarks.promoe_rates",
    models={model: without(GRID.variants[model], RATE) for model in MODELS},
    metric="validation/null",
    rates=(8e-3, 1.2e-2),
    further=(1.8e-2, 2.7e-2),
    kept=("validation/null",),
    seed=100,
    data_seed_flags=GRID.data_seed_flags,
    path=Path(__file__).parent / "results" / "promoe_rates.json",
    direction="lower",
)

if __name__ == "__main__":
    sys.exit(SEARCH.run())
