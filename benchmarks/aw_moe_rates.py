# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every network of AW-MoE's evidence, on each log: ``python -m benchmarks.aw_moe_rates``.

With a seed of its own (100), on the validation domain (:mod:`benchmarks.rates`): by expected list-AUC on the generated
log, by list-AUC on MovieLens 100K.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.evidence.aw_moe import DATA_SEED_FLAGS, RATE, VARIANTS
from benchmarks.evidence.grid import Variant
from benchmarks.rates import RateSearch

NETWORKS = ("aw_moe", "din_wide", "category_wide", "mmoe_wide", "no_attention", "dense", "dnn")


def without_rate(variant: Variant) -> Variant:
    """A variant of the evidence before its rate was chosen."""
    return replace(variant, flags=tuple(flag for flag in variant.flags if not flag.startswith(RATE)), pairs=1)


def search(log: str, metric: str, file: str) -> RateSearch:
    """The search on one log."""
    return RateSearch(
        system="aw_moe",
        command="python -m benchmarks.aw_moe_rates",
        models={name: without_rate(VARIANTS[f"{log}{name}"]) for name in NETWORKS},
        metric=metric,
        rates=(2.5e-3, 5e-3, 1e-2),
        further=(2e-2, 4e-2),
        kept=tuple(dict.fromkeys((metric, "validation/list_auc", "validation/list_auc_truncated"))),
        seed=100,
        data_seed_flags=DATA_SEED_FLAGS,
        path=Path(__file__).parent / "results" / file,
    )


GENERATED = search("", "validation/list_auc_expected", "aw_moe_rates.json")
REAL = search("ml_", "validation/list_auc", "aw_moe_rates_ml100k.json")

if __name__ == "__main__":
    sys.exit(GENERATED.run() or REAL.run())
