# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every network of AW-MoE's evidence, on each log: ``python -m benchmarks.aw_moe_rates``.

With a seed of its own (100), on the validation domain (:mod:`benchmarks.rates`): by expected list-AUC on the generated
log, by list-AUC on MovieLens 100K.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.grids import load_grid, without
from benchmarks.rates import RATE, RateSearch

GRID = load_grid("aw_moe")
NETWORKS = ("aw_moe", "din_wide", "category_wide", "mmoe_wide", "no_attention", "dense", "dnn")


def search(log: str, metric: str, file: str) -> RateSearch:
    """The search on one log."""
    return RateSearch(
        system="aw_moe",
        command="python -m benchmarks.aw_moe_rates",
        models={name: without(GRID.variants[f"{log}{name}"], RATE) for name in NETWORKS},
        metric=metric,
        rates=(2.5e-3, 5e-3, 1e-2),
        further=(2e-2, 4e-2),
        kept=tuple(dict.fromkeys((metric, "validation/list_auc", "validation/list_auc_truncated"))),
        seed=100,
        data_seed_flags=GRID.data_seed_flags,
        path=Path(__file__).parent / "results" / file,
    )


GENERATED = search("", "validation/list_auc_expected", "aw_moe_rates.json")
REAL = search("ml_", "validation/list_auc", "aw_moe_rates_ml100k.json")

if __name__ == "__main__":
    sys.exit(GENERATED.run() or REAL.run())
