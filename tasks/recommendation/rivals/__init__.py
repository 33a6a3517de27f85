# SPDX-License-Identifier: Apache-2.0
"""Published rivals as level plans, from single task to STEM: tables of what experts read and gates see.

Each function returns a factory for `RankingTask`. Experts of one network are alike: ``width`` units, one layer or, with
``hidden``, two; `tasks.recommendation.nets.plan_parts.network` names these options. T tasks, C categories.
"""

from __future__ import annotations

from tasks.recommendation.rivals.one_level import mmoe, omoe, shared_bottom, single_task
from tasks.recommendation.rivals.several_levels import adatt, cgc, cross_stitch, ml_mmoe, ple, stem

__all__ = [
    "adatt",
    "cgc",
    "cross_stitch",
    "ml_mmoe",
    "mmoe",
    "omoe",
    "ple",
    "shared_bottom",
    "single_task",
    "stem",
]
