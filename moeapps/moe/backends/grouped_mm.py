# SPDX-License-Identifier: Apache-2.0
"""All experts in two calls of ``torch.nn.functional.grouped_mm``: least overhead for few rows per expert.

Facts of torch 2.14 this file relies on: float64 is not offered; every stride must be a multiple of 16 bytes; ``offs``
is int32; biases are not supported; rows past the last offset are uninitialised memory, in the output and in the input's
gradient. A plan holds no sentinels: ``grouped_mm`` has no such rows. ``grouped_mm_static``, used in bfloat16 on CUDA,
does without the host (times there are not in core.json) and masks them on both sides.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from moeapps.moe.plan import Plan, combine, key_dtype, weigh

if TYPE_CHECKING:
    from moeapps.moe.feed_forward import FeedForward
    from moeapps.moe.routing import Routing

_ALIGNMENT = 16  # bytes


def grouped_mm_refusal(ffn: FeedForward, x_ND: Tensor) -> str | None:
    """Say why ``grouped_mm`` cannot run this bank on these rows, or None when it can."""
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
    """Compute the weighted sum of the chosen experts by grouped matrix products; all else is as for ``loop``."""
    offs_E = torch.tensor(list(accumulate(plan.counts)), dtype=torch.int32, device=x_ND.device)
    x_MD = x_ND.index_select(0, plan.row_M)
    if at_input:
        x_MD = weigh(x_MD, plan.weight_M)
    expert_M = plan.expert_M() if ffn.b_in is not None or ffn.b_out is not None else None
    h_MH = grouped_linear(x_MD, ffn.w_in, ffn.b_in, offs_E, expert_M)
    y_MO = grouped_linear(ffn.hidden(h_MH), ffn.w_out, ffn.b_out, offs_E, expert_M)
    return combine(y_MO if at_input else weigh(y_MO, plan.weight_M), plan)


def grouped_mm_static(ffn: FeedForward, x_ND: Tensor, routing: Routing, *, at_input: bool = False) -> Tensor:
    """Compute the weighted sum of the chosen experts with grouped products and nothing that the host has to see.

    Outputs are combined by the inverse permutation where every row has K assignments, so that results are the same to
    the bit from run to run; ``index_add`` on CUDA is not. Takes and gives what ``grouped_mm`` does, but for
    the routing.
    """
    num_experts, num, top_k = routing.num_experts, routing.expert_M.shape[0], routing.top_k
    order_M = torch.sort(routing.expert_M.to(key_dtype(num_experts)), stable=True).indices
    offs_E = routing.counts().cumsum(0).to(torch.int32)
    place_M = torch.arange(num, device=x_ND.device)
    real_M1 = (place_M < offs_E[-1]).unsqueeze(1)
    expert_M = routing.expert_M.index_select(0, order_M).clamp(max=num_experts - 1)
    weight_M = routing.weight_M.index_select(0, order_M)
    x_MD = x_ND.index_select(0, routing.row_M.index_select(0, order_M))
    if at_input:
        x_MD = weigh(x_MD, weight_M)
    x_MD = x_MD.where(real_M1, 0)  # last, so that the undefined gradient of such a row reaches neither x nor a weight
    h_MH = grouped_linear(x_MD, ffn.w_in, ffn.b_in, offs_E, expert_M)
    if ffn.b_in is not None:  # the gradient of the bias adds up the rows
        h_MH = h_MH.where(real_M1, 0)
    y_MO = grouped_linear(ffn.hidden(h_MH), ffn.w_out, ffn.b_out, offs_E, expert_M).where(real_M1, 0)
    if not at_input:
        y_MO = weigh(y_MO, weight_M)
    if top_k is not None and routing.target_M is None:
        inverse_M = torch.zeros_like(order_M).scatter(0, order_M, place_M)
        y_TO: Tensor = y_MO.index_select(0, inverse_M).view(routing.num_rows, top_k, y_MO.shape[1]).sum(1)
        return y_TO
    target_M = routing.output_M.index_select(0, order_M)
    return y_MO.new_zeros(routing.num_outputs, y_MO.shape[1]).index_add(0, target_M, y_MO)


def grouped_linear(
    x_MI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, offs_E: Tensor, expert_M: Tensor | None
) -> Tensor:
    """``x W[e] + b[e]`` for rows sorted by expert, which ends at ``offs_E[e]``; later rows are undefined."""
    y_MO: Tensor = functional.grouped_mm(x_MI, weight_EIO, offs=offs_E)
    if bias_EO is None or expert_M is None:
        return y_MO
    return y_MO + bias_EO.index_select(0, expert_M)
