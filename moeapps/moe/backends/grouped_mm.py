# SPDX-License-Identifier: Apache-2.0
"""All experts in two calls of ``torch.nn.functional.grouped_mm``: least overhead for few rows per expert.

Facts of torch 2.14 this file relies on: float64 is not offered; every stride must be a multiple of 16 bytes; ``offs``
is int32; biases are not supported; rows past the last offset are uninitialised memory, in the output and in the input's
gradient, so a plan without sentinels is required (its own are gone before any gather).
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from moeapps.moe.backends.loop import combine, weigh

if TYPE_CHECKING:
    from moeapps.moe.feed_forward import FeedForward
    from moeapps.moe.plan import Plan

_ALIGNMENT = 16  # bytes


def grouped_mm_refusal(ffn: FeedForward, x_ND: Tensor) -> str | None:
    """Say why ``grouped_mm`` cannot run this case, or None when it can.

    Args:
        ffn: Stacked weights of the bank.
        x_ND: Rows (N, D).
    """
    if x_ND.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm takes float32, bfloat16 or float16, not {x_ND.dtype}"
    if x_ND.is_cuda and x_ND.dtype != torch.bfloat16:
        return f"grouped_mm takes bfloat16 on CUDA, not {x_ND.dtype}"
    widths = (*ffn.w_in.shape[1:], *ffn.w_out.shape[1:])
    multiple = _ALIGNMENT // x_ND.element_size()
    if any(width % multiple for width in widths):
        return f"its widths must be multiples of {multiple} for {x_ND.dtype}, but they are {sorted(set(widths))}"
    return None


def grouped_mm(ffn: FeedForward, x_ND: Tensor, plan: Plan, *, at_input: bool = False) -> Tensor:
    """Compute the weighted sum of the chosen experts with grouped matrix products.

    Args:
        ffn: Stacked weights.
        x_ND: Rows (N, D), float32, bfloat16 or float16.
        plan: Sorted assignments.
        at_input: Multiply the weight into the row before the expert instead of into its output.

    Returns:
        (targets, O).
    """
    offs_E = torch.tensor(list(accumulate(plan.counts)), dtype=torch.int32, device=x_ND.device)
    x_MD = x_ND.index_select(0, plan.row_M)
    if at_input:
        x_MD = weigh(x_MD, plan.weight_M)
    expert_M = plan.expert_M() if ffn.b_in is not None or ffn.b_out is not None else None
    h_MH = grouped_linear(x_MD, ffn.w_in, ffn.b_in, offs_E, expert_M)
    y_MO = grouped_linear(ffn.hidden(h_MH), ffn.w_out, ffn.b_out, offs_E, expert_M)
    return combine(y_MO if at_input else weigh(y_MO, plan.weight_M), plan)


def grouped_linear(
    x_MI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, offs_E: Tensor, expert_M: Tensor | None
) -> Tensor:
    """``x W[e] + b[e]`` for rows sorted by expert, which ends at ``offs_E[e]``; later rows are undefined."""
    y_MO: Tensor = functional.grouped_mm(x_MI, weight_EIO, offs=offs_E)
    if bias_EO is None or expert_M is None:
        return y_MO
    return y_MO + bias_EO.index_select(0, expert_M)
