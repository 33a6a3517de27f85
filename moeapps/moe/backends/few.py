# SPDX-License-Identifier: Apache-2.0
"""A handful of rows without gradients: two products per assignment, and no plan at all.

Sorting, counting and gathering take as long as the products of a single row; here nothing is sorted or gathered. More
rows read the weights of an expert once per assignment instead of once, so only few are done like this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moeapps.moe.feed_forward import FeedForward
    from moeapps.moe.routing import Routing

MAX_ASSIGNMENTS = 8


def few_rows(ffn: FeedForward, x_ND: Tensor, routing: Routing, *, at_input: bool = False) -> Tensor | None:
    """Compute the weighted sum of the chosen experts, (N, O), assignment by assignment; None where that cannot be.

    For routings of which ``top_k`` is known and whose outputs return to their rows.

    Args:
        ffn: The bank.
        x_ND: Rows (N, D).
        routing: Their routing, of at most ``MAX_ASSIGNMENTS`` assignments or it would be slow.
        at_input: Multiply the weight into the row before the expert instead of into its output.
    """
    experts: list[int] = routing.expert_M.tolist()
    num_experts = routing.num_experts
    if not experts or min(experts) < 0 or max(experts) > num_experts:
        return None
    weights: list[float] = routing.weight_M.tolist()
    outputs: list[Tensor] = []
    top_k = len(experts) // x_ND.shape[0]
    for row, x_1D in enumerate(x_ND.split(1) if len(x_ND) > 1 else (x_ND,)):
        y_1O: Tensor | None = None
        for m in range(row * top_k, (row + 1) * top_k):
            if experts[m] < num_experts:
                y_1O = _add(ffn, experts[m], x_1D, weights[m], at_input, y_1O)
        outputs.append(x_ND.new_zeros(1, ffn.w_out.shape[2]) if y_1O is None else y_1O)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _add(ffn: FeedForward, expert: int, x_1D: Tensor, weight: float, at_input: bool, y_1O: Tensor | None) -> Tensor:
    """``y + weight E(x)``, or ``y + E(weight x)``; y itself is written to."""
    factor = 1.0 if at_input else weight
    w_in, w_out, b_out = ffn.w_in.select(0, expert), ffn.w_out.select(0, expert), ffn.b_out
    x_1D = x_1D * weight if at_input else x_1D
    h_1H = torch.mm(x_1D, w_in) if ffn.b_in is None else torch.addmm(ffn.b_in.select(0, expert), x_1D, w_in)
    a_1F = ffn.hidden(h_1H)
    if y_1O is None and b_out is not None:
        return torch.addmm(b_out.select(0, expert), a_1F, w_out, beta=factor, alpha=factor)
    if y_1O is None:
        y_1O = torch.mm(a_1F, w_out)
        return y_1O if factor == 1.0 else y_1O.mul_(factor)
    if b_out is not None:
        y_1O.add_(b_out.select(0, expert), alpha=factor)
    return y_1O.addmm_(a_1F, w_out, alpha=factor)
