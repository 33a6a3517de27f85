# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every network of UniMoE-Audio's evidence: ``python -m benchmarks.unimoe_audio_rates``.

With seeds of its own (100 to 102), by the mean bits of the first book on the validation domains, another voice and
another piece of music (:mod:`benchmarks.rates`): between two seeds these differ as much as between two rates. All
stages of a curriculum have one rate.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.grids import given, load_grid, without
from benchmarks.rates import RATE, RateSearch

GRID = load_grid("unimoe_audio")
METRIC = "validation/bits_0"
TRAINED = [name for name, variant in GRID.variants.items() if given(variant, RATE) and not name.startswith("tuned_")]
"""Networks that are trained by gradients: each has a rate of its own."""

SEARCH = RateSearch(
    system="unimoe_audio",
    command="python -m benchmarks.unimoe_audio_rates",
    models={name: without(GRID.variants[name], RATE) for name in TRAINED},
    metric=METRIC,
    rates=(1.25e-3, 2.5e-3, 5e-3),
    further=(1e-2, 2e-2),
    kept=(METRIC, "validation/bits"),
    seed=100,
    data_seed_flags=GRID.data_seed_flags,
    path=Path(__file__).parent / "results" / "unimoe_audio_rates.json",
    direction="lower",
    more_seeds=(101, 102),
)

if __name__ == "__main__":
    sys.exit(SEARCH.run(jobs=2))
