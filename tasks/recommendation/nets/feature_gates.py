# SPDX-License-Identifier: Apache-2.0
"""Low-rank gates on the input of a group of experts.

Shape legend: N rows, S states (inputs of a level), d width of a state, V views, L low-rank gates of a view, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moeapps.moe.counts import at_least_one
from moeapps.moe.derivatives import needs_operations
from moeapps.moe.fast.threads import is_observed
from moeapps.moe.view_linear import view_linear
from tasks.recommendation.nets.feature_views import feature_views


class FeatureGates(nn.Module):
    r"""Low-rank gates that give every group of experts its own view of the input, the identity at the start.

    .. math::
        view_v = x \odot \sum_{l=1}^{L} softmax(G_v x)_l \; 2 \sigma((x B_{vl}) A_{vl}),
        \quad B_{vl} \in R^{d \times r}, \; A_{vl} \in R^{r \times d}, \; A = 0 \text{ at first}

    Since the shares sum to 1 and :math:`2 \sigma(u) = 1 + \tanh(u / 2)`, a view is computed as
    :math:`x + x \odot \sum_l share_l \tanh(u_l / 2)`: exactly x where A is 0. See `feature_views` for how.
    Differentiable any number of times.

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

    def __init__(self, width: int, views: Sequence[int], *, num_gates: int = 2, rank: int = 8) -> None:
        super().__init__()
        at_least_one(width=width, views=len(views), num_gates=num_gates, rank=rank)
        self.width, self.views, self.num_gates, self.rank = width, tuple(views), num_gates, rank
        num_views = len(views)
        self.down = nn.Parameter(torch.empty(num_views, width, num_gates * rank))
        self.up = nn.Parameter(torch.empty(num_views, num_gates, rank, width))
        self.mix = nn.Parameter(torch.empty(num_views, width, num_gates))
        self.mix_bias = nn.Parameter(torch.empty(num_views, num_gates))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """First matrices and mixing gates by their fan-in; the second matrices 0, so that every view is its state."""
        bound = 1 / math.sqrt(self.width)
        for parameter in (self.down, self.mix, self.mix_bias):
            nn.init.uniform_(parameter, -bound, bound)
        nn.init.zeros_(self.up)

    def forward(self, x_SNd: Tensor) -> Tensor:
        """Views [V, N, d] of states [S, N, d]."""
        parameters = (self.down, self.up, self.mix, self.mix_bias)
        # Whoever counts, compiles, transforms or casts operations must see them.
        if needs_operations() or is_observed() or torch.is_autocast_enabled(x_SNd.device.type):
            return views_by_operations(x_SNd, *parameters, self.views)
        return feature_views(x_SNd, *parameters, self.views, views_by_operations)

    def extra_repr(self) -> str:
        """Sizes, for the printed module."""
        return f"width={self.width}, views={self.views}, num_gates={self.num_gates}, rank={self.rank}"


def views_by_operations(
    x_SNd: Tensor, down: Tensor, up: Tensor, mix: Tensor, mix_bias: Tensor, views: Sequence[int]
) -> Tensor:
    """The equation of `FeatureGates` in ordinary operations: states [S, N, d] and its parameters to views [V, N, d]."""
    num_low = mix.shape[2]
    both_NVk = view_linear(x_SNd, torch.cat([down, mix], 2), views)
    low_NVk, mix_NVL = both_NVk.split([down.shape[2], num_low], dim=2)
    own = torch.eye(num_low, dtype=up.dtype, device=up.device).view(num_low, 1, num_low, 1)
    up_Vkd = (up.unsqueeze(3) * own).flatten(1, 2).flatten(2)  # the L second matrices as one block-diagonal one
    up_NVLd = view_linear(low_NVk.transpose(0, 1), up_Vkd, range(len(views))).unflatten(2, (num_low, -1))
    share_NVL = (mix_NVL + mix_bias).softmax(2)
    x_NVd = x_SNd.transpose(0, 1).index_select(1, torch.tensor(views, device=x_SNd.device))
    gate_NVd = ((up_NVLd / 2).tanh() * share_NVL.unsqueeze(-1)).sum(2)
    view_NVd: Tensor = x_NVd + x_NVd * gate_NVd
    return view_NVd.transpose(0, 1)
