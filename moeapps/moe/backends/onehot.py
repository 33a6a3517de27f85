# SPDX-License-Identifier: Apache-2.0
"""The slow oracle: every expert on every assignment, selections as products with one-hot matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moeapps.moe.experts import Experts
    from moeapps.moe.feed_forward import FeedForward
    from moeapps.moe.plan import Plan


def onehot(
    experts: Experts | FeedForward, x_ND: Tensor, plan: Plan, *, side: tuple[Tensor, ...] = (), at_input: bool = False
) -> Tensor:
    """Compute the weighted sum as a chain of dense products, O(M E) work and memory; for tests alone.

    With one-hot matrices P (M, N) of rows, Q (M, E) of experts and T (M, targets), and ``w`` on the diagonal:
    ``y = T^T diag(w) sum_e Q[:, e] * E_e(P x)``.
    Takes and gives what ``loop`` does; the bank has to offer ``every``.
    """
    pick_MN = _one_hot(plan.row_M, plan.num_rows, x_ND)
    expert_ME = _one_hot(plan.expert_M(), plan.num_experts, x_ND)
    target_MT = _one_hot(plan.target_M, plan.num_targets, x_ND)
    weight_M1 = plan.weight_M.to(x_ND.dtype).unsqueeze(1)
    x_MD = torch.einsum("mn,n...->m...", pick_MN, x_ND)
    if at_input:
        x_MD = x_MD * weight_M1.view(-1, *[1] * (x_MD.dim() - 1))
    y_MEO = experts.every(x_MD, *(torch.einsum("mn,n...->m...", pick_MN, s.to(x_ND.dtype)) for s in side))
    y_MO = torch.einsum("me,me...->m...", expert_ME, y_MEO)
    if not at_input:
        y_MO = y_MO * weight_M1
    return torch.einsum("mt,mo->to", target_MT, y_MO)


def _one_hot(ids_M: Tensor, num: int, like: Tensor) -> Tensor:
    return (ids_M.unsqueeze(1) == torch.arange(num, device=ids_M.device)).to(like.dtype)
