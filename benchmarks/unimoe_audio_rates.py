# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every network of UniMoE-Audio's evidence: ``python -m benchmarks.unimoe_audio_rates``.

With seeds of its own (100 to 102), by the mean bits of the first book on the validation domains, another voice and
another piece of music (:mod:`benchmarks.rates`): between two seeds these differ as much as between two rates. All
stages of a curriculum have one rate.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.evidence.grid import Variant
from benchmarks.evidence.unimoe_audio import DATA_SEED_FLAGS, RATE, SEARCHED, VARIANTS
from benchmarks.rates import RateSearch

METRIC = "validation/bits_0"


def without_rate(variant: Variant) -> Variant:
    """A variant of the evidence before its rate was chosen."""
    return replace(variant, flags=tuple(flag for flag in variant.flags if not flag.startswith(RATE)), pairs=1)


SEARCH = RateSearch(
    system="unimoe_audio",
    command="python -m benchmarks.unimoe_audio_rates",
    models={name: without_rate(VARIANTS[name]) for name in SEARCHED},
    metric=METRIC,
    rates=(1.25e-3, 2.5e-3, 5e-3),
    further=(1e-2, 2e-2),
    kept=(METRIC, "validation/bits"),
    seed=100,
    data_seed_flags=DATA_SEED_FLAGS,
    path=Path(__file__).parent / "results" / "unimoe_audio_rates.json",
    direction="lower",
    more_seeds=(101, 102),
)

if __name__ == "__main__":
    sys.exit(SEARCH.run(jobs=2))
