# SPDX-License-Identifier: Apache-2.0
"""No dispatch at all: for one expert, or where every row chose every expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moeapps.moe.feed_forward import FeedForward
    from moeapps.moe.plan import Plan


def is_dense(plan: Plan) -> bool:
    """Whether every row goes once to every expert and returns to itself, so that nothing has to be gathered."""
    if plan.top_k != plan.num_experts:
        return False
    if plan.num_experts == 1:
        return True
    # Equal counts are not enough: a row may hold one expert twice while another row misses it.
    in_order = torch.arange(plan.num_rows, device=plan.row_M.device).expand(plan.num_experts, -1)
    return all(count == plan.num_rows for count in plan.counts) and torch.equal(plan.row_M.view_as(in_order), in_order)


def dense(ffn: FeedForward, x_ND: Tensor, plan: Plan, *, at_input: bool = False) -> Tensor:
    """Apply every expert to every row (N, D), without a gather, and add up with the weights, (N, O).

    For plans of which ``is_dense`` holds; else as ``loop``.
    """
    weight_EN1 = plan.weight_M.to(x_ND.dtype).view(plan.num_experts, -1, 1)
    y_ENO = ffn.every(x_ND * weight_EN1 if at_input else x_ND).transpose(0, 1)
    if not at_input:
        y_ENO = y_ENO * weight_EN1
    return y_ENO.sum(0) if plan.num_experts > 1 else y_ENO.squeeze(0)
