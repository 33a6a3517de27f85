# SPDX-License-Identifier: Apache-2.0
"""Published multi-task networks as plans of one bank: single task to HoME, each a table of who reads and sees what.

Each function returns a factory for `RankingTask`. Experts of one network are alike: ``width`` units, one layer or, with
``hidden``, two. T tasks, C categories.
"""

from __future__ import annotations

from tasks.recommendation.presets.home_plan import home
from tasks.recommendation.presets.one_level import mmoe, omoe, shared_bottom, single_task
from tasks.recommendation.presets.several_levels import adatt, cgc, cross_stitch, ml_mmoe, ple, stem

__all__ = [
    "adatt",
    "cgc",
    "cross_stitch",
    "home",
    "ml_mmoe",
    "mmoe",
    "omoe",
    "ple",
    "shared_bottom",
    "single_task",
    "stem",
]
