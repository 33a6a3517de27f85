# SPDX-License-Identifier: Apache-2.0
"""Differentiable path of any order: sort, one call per expert, weigh, add up; every step is an ordinary operation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from moeapps.moe.plan import Plan, combine, weigh

if TYPE_CHECKING:
    from moeapps.moe.experts import Experts
    from moeapps.moe.feed_forward import FeedForward


def loop(
    experts: Experts | FeedForward, x_ND: Tensor, plan: Plan, *, side: tuple[Tensor, ...] = (), at_input: bool = False
) -> Tensor:
    """Compute the weighted sum of the chosen experts with ordinary operations.

    Works for every bank that offers ``grouped``, in every dtype, under double backward, forward mode and
    ``torch.func``; for ``vmap`` over routings see ``apply``.

    Args:
        experts: The bank.
        x_ND: Rows (N, ...).
        plan: Sorted assignments.
        side: Further inputs with N rows each.
        at_input: Multiply the weight into the row before the expert instead of into its output.

    Returns:
        (targets, O).
    """
    x_MD = x_ND.index_select(0, plan.row_M)
    if at_input:
        x_MD = weigh(x_MD, plan.weight_M)
    y_MO = experts.grouped(x_MD, plan.counts, *(s.index_select(0, plan.row_M) for s in side))
    return combine(y_MO if at_input else weigh(y_MO, plan.weight_M), plan)
