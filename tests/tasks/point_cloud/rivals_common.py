# SPDX-License-Identifier: Apache-2.0
"""Sizes and facts of small networks, and batches of mixed domains, for the tests of Point-MoE's rivals and reports."""

from __future__ import annotations

from typing import Any

from torch_geometric.data import Batch

SIZES: dict[str, Any] = {
    "enc_depths": (1, 1),
    "enc_dims": (16, 32),
    "dec_depths": (1,),
    "dec_dims": (16,),
    "drop_path": 0.0,
}
ATTENTION = {**SIZES, "patch_size": 16}
FACTS = {
    "domains": {"seen": ["room", "street"], "validation": ["office"], "unseen": []},
    "domain_names": ["room", "street", "office"],
    "label_sets": {"room": ["wall", "floor", "chair"], "street": ["road", "car", "wall"], "office": ["floor", "wall"]},
    "in_dim": 6,
}


def mixed(make_scan, *domains: int) -> Batch:
    return Batch.from_data_list([make_scan(40 + 7 * i, seed=i, domain=d) for i, d in enumerate(domains)])
