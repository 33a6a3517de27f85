# SPDX-License-Identifier: Apache-2.0
"""Low-rank gates on the input of a group of experts.

Shape legend: N rows, S states (inputs of a level), d width of a state, V views, L low-rank gates of a view, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeapps.moe.derivatives import needs_operations
from moeapps.moe.view_linear import view_linear


class FeatureGates(nn.Module):
    r"""Low-rank gates that give every group of experts its own view of the input, the identity at the start.

    .. math::
        view_v = x \odot \sum_{l=1}^{L} softmax(G_v x)_l \; 2 \sigma((x B_{vl}) A_{vl}),
        \quad B_{vl} \in R^{d \times r}, \; A_{vl} \in R^{r \times d}, \; A = 0 \text{ at first}

    All first matrices are one product per state, all second ones products into one buffer; the elementwise part has a
    backward pass of its own that recomputes nothing and stores one sigmoid. Differentiable any number of times.

    Args:
        width: d.
        views: for each view the state it is made of.
        num_gates: L, low-rank gates per view.
        rank: r. (The paper ties r to the width and L; recalled, so both are free here.)

    Shape:
        states [S, N, d] -> views [V, N, d].

    Raises:
        ValueError: if a size is below 1.

    Source: HoME (docs/papers/home.md, equation 5); the zero start is inferred.

    Example:
        >>> gates, states = FeatureGates(6, (0, 0, 1), num_gates=2, rank=3), torch.randn(2, 5, 6)
        >>> torch.equal(gates(states)[1], states[0])
        True
    """

    own: Tensor

    def __init__(self, width: int, views: Sequence[int], *, num_gates: int = 2, rank: int = 8) -> None:
        super().__init__()
        for name, value in (("width", width), ("views", len(views)), ("num_gates", num_gates), ("rank", rank)):
            if value < 1:
                raise ValueError(f"{name}={value}, but it must be at least 1.")
        self.width, self.views, self.num_gates, self.rank = width, tuple(views), num_gates, rank
        num_views = len(views)
        self.down = nn.Parameter(torch.empty(num_views, width, num_gates * rank))
        self.up = nn.Parameter(torch.empty(num_views, num_gates, rank, width))
        self.mix = nn.Parameter(torch.empty(num_views, width, num_gates))
        self.mix_bias = nn.Parameter(torch.empty(num_views, num_gates))
        self.register_buffer("own", torch.eye(num_gates).view(num_gates, 1, num_gates, 1), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """First matrices and mixing gates by their fan-in; the second matrices 0, so that every view is its state."""
        bound = 1 / math.sqrt(self.width)
        for parameter in (self.down, self.mix, self.mix_bias):
            nn.init.uniform_(parameter, -bound, bound)
        nn.init.zeros_(self.up)

    def forward(self, x_SNd: Tensor) -> Tensor:
        """Views [V, N, d] of states [S, N, d]."""
        num_low = self.num_gates
        both_NVk = view_linear(x_SNd, torch.cat([self.down, self.mix], 2), self.views)
        low_NVk, mix_NVL = both_NVk.split([num_low * self.rank, num_low], dim=2)
        # The L second matrices of a view as one block-diagonal matrix: more products, yet faster than L narrow ones.
        up_Vkd = (self.up.unsqueeze(3) * self.own).flatten(1, 2).flatten(2)
        up_NVLd = view_linear(low_NVk.transpose(0, 1), up_Vkd, range(len(self.views))).unflatten(2, (num_low, -1))
        x_NVd = _of_views(x_SNd, self.views).transpose(0, 1)
        mix_NVL = mix_NVL + self.mix_bias
        if needs_operations():
            gate_NVd: Tensor = (2 * up_NVLd.sigmoid() * mix_NVL.softmax(2).unsqueeze(-1)).sum(2)
            return (x_NVd * gate_NVd).transpose(0, 1)
        view_NVd: Tensor = _Gated.apply(x_NVd, up_NVLd, mix_NVL)[0]
        return view_NVd.transpose(0, 1)

    def extra_repr(self) -> str:
        """Sizes, for the printed module."""
        return f"width={self.width}, views={self.views}, num_gates={self.num_gates}, rank={self.rank}"


def _of_views(x_SNd: Tensor, views: tuple[int, ...]) -> Tensor:
    """The state of each view, [V, N, d]; not copied where all views are of one state."""
    if len(set(views)) == 1:
        return x_SNd[views[0]].expand(len(views), -1, -1)
    index = torch.tensor(views, device=x_SNd.device)
    return x_SNd.transpose(0, 1).index_select(1, index).transpose(0, 1)


class _Gated(torch.autograd.Function):
    r"""``x * sum_l softmax(m)_l 2 sigmoid(u_l)`` of x [N, V, d], u [N, V, L, d], m [N, V, L]; and the sigmoids.

    The sigmoids are given out because backward reads them and not u: under ``create_graph=True`` they then hang in the
    graph like any tensor, and what is asked of the gradients comes back here as the gradient of the sigmoids.
    """

    @staticmethod
    def forward(ctx: Any, x_NVd: Tensor, u_NVLd: Tensor, mix_NVL: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        share_NVL = _shares(mix_NVL)
        s_NVLd = torch.sigmoid(u_NVLd)
        part_NVLd = s_NVLd * (2 * share_NVL).unsqueeze(-1)
        gate_NVd = _sum_low(part_NVLd)
        ctx.save_for_backward(x_NVd, s_NVLd, mix_NVL, part_NVLd, share_NVL, gate_NVd)
        return x_NVd * gate_NVd, s_NVLd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_NVd, s_NVLd, mix_NVL, part_NVLd, share_NVL, gate_NVd = ctx.saved_tensors
        grad_NVd, ds_NVLd = grads
        if torch.is_grad_enabled():  # again from what hangs in the graph
            share_NVL = mix_NVL.softmax(2)
            part_NVLd = s_NVLd * (2 * share_NVL).unsqueeze(-1)
            gate_NVd = part_NVLd.sum(2)
        found: tuple[Tensor | None, ...] = (None, None, None)
        if grad_NVd is not None:
            du_NVLd = (grad_NVd * x_NVd).unsqueeze(2) * part_NVLd
            # What a softmax passes back needs p dp alone, and that is the sum of what was just computed.
            pdp_NVL = du_NVLd.sum(-1)
            dmix_NVL = pdp_NVL - share_NVL * pdp_NVL.sum(2, keepdim=True)
            into = torch.addcmul if torch.is_grad_enabled() else torch.Tensor.addcmul_
            found = grad_NVd * gate_NVd, into(du_NVLd, du_NVLd, s_NVLd, value=-1), dmix_NVL  # s' = s - s^2
        if ds_NVLd is not None:
            du_NVLd = ds_NVLd * (s_NVLd - s_NVLd.square())
            found = found[0], du_NVLd if found[1] is None else found[1] + du_NVLd, found[2]
        return found


def _shares(mix_NVL: Tensor) -> Tensor:
    """Softmax over the last dimension, summing to exactly 1, so that a fresh gate is exactly the identity."""
    share_NVL = mix_NVL.transpose(1, 2).softmax(1).transpose(1, 2)  # over the last dimension itself is far slower
    if share_NVL.shape[2] > 1:
        share_NVL[:, :, -1] = 1 - _sum_low(share_NVL[:, :, :-1, None]).squeeze(-1)
    return share_NVL


def _sum_low(part_NVLd: Tensor) -> Tensor:
    """Sum over the few low-rank gates, by additions: a reduction over so short a dimension is slow."""
    if part_NVLd.shape[2] == 1:
        return part_NVLd[:, :, 0].clone()
    total_NVd = part_NVLd[:, :, 0] + part_NVLd[:, :, 1]
    for low in range(2, part_NVLd.shape[2]):
        total_NVd += part_NVLd[:, :, low]
    return total_NVd
