# SPDX-License-Identifier: Apache-2.0
"""Presets: annotated functions of plain options that return a factory, width in, layer (or router) out.

A network calls the factory once per block, so that no two blocks share parameters. YAML names a preset by class path::

    moe:
      class_path: moeapps.moe.presets.point_moe
      init_args: {num_experts: 4, top_k: 2}

A paper is a preset; the core knows none of them.
"""

from __future__ import annotations

from moeapps.moe.presets.basic import compose, dense, linear, random_router, table_router, top_k_router, top_p_router
from moeapps.moe.presets.published import deepseek_v3, expert_choice, mixtral, soft_moe, switch
from moeapps.moe.presets.ranking import aw_moe
from moeapps.moe.presets.systems import meta_dmoe, point_moe, promoe, unimoe_audio
from moeapps.moe.presets.twins import dense_twin

__all__ = [
    "aw_moe",
    "compose",
    "deepseek_v3",
    "dense",
    "dense_twin",
    "expert_choice",
    "linear",
    "meta_dmoe",
    "mixtral",
    "point_moe",
    "promoe",
    "random_router",
    "soft_moe",
    "switch",
    "table_router",
    "top_k_router",
    "top_p_router",
    "unimoe_audio",
]
