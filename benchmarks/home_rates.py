# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every network of HoME's one-pass evidence: ``python -m benchmarks.home_rates``.

On a log of its own (seed 100), by the expected GAUC, mean over all six tasks, on the validation domain
(:mod:`benchmarks.rates`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.grids import load_grid, without
from benchmarks.rates import RATE, RateSearch

GRID = load_grid("home")
MODELS = ("home", "mmoe", "cgc", "ple", "layer_norm", "mmoe_layer_norm", "single_task", "adatt")

SEARCH = RateSearch(
    system="home",
    command="python -m benchmarks.home_rates",
    models={model: without(GRID.variants[f"once_{model}"], RATE) for model in MODELS},
    metric="validation/gauc_expected",
    rates=(1e-3, 2e-3, 4e-3, 8e-3),
    further=(1.6e-2, 3.2e-2),
    # Mean over all tasks, over the rare ones, over the dense ones.
    kept=("validation/gauc_expected", "validation.interaction/gauc_expected", "validation.watch/gauc_expected"),
    seed=100,
    data_seed_flags=GRID.data_seed_flags,
    path=Path(__file__).parent / "results" / "home_rates.json",
)

if __name__ == "__main__":
    sys.exit(SEARCH.run())
