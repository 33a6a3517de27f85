# SPDX-License-Identifier: Apache-2.0
"""From a history to the user's vector for a candidate: DIN's activation unit, or a plain sum.

Shape legend: B lists, H past items, N candidates, d width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeapps.moe.routers.pairs import (
    AttentionNorm,
    PairUnit,
    Part,
    Pooling,
    WidthActivation,
    attention_weights,
    check_attention,
)


class ActivationUnit(nn.Module):
    r"""The user for a candidate, :math:`v_u = \sum_j m_j w_j h_j`, with :math:`w_j = AU([h_j, h_j \odot h_t, h_t])`.

    Args:
        dim: d.
        hidden: hidden widths of AU.
        parts: what AU reads; DIN as published also has ``difference``.
        norm: ``none`` keeps the intensity (DIN); ``softmax`` makes the weights sum to 1.
        pooling: ``sqrtn`` divides by the root of the number of past items; ``sum`` (paper) and ``mean``.
        activation: width -> activation, e.g. `tasks.recommendation.nets.dice.Dice`; None means ReLU.

    Shape:
        history [B, H, d], mask bool [B, H], target [B, N, d] -> [B, N, d]; 0 for an empty history.

    Raises:
        ValueError: unknown parts, norm or pooling.

    Source: DIN; AW-MoE's input network (docs/papers/aw_moe.md, equation 2).

    Example:
        >>> unit = ActivationUnit(8)
        >>> unit(torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool), torch.randn(3, 2, 8)).shape
        torch.Size([3, 2, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: tuple[int, ...] = (48, 16),
        parts: tuple[Part, ...] = ("own", "product", "key"),
        norm: AttentionNorm = "none",
        pooling: Pooling = "sqrtn",
        activation: WidthActivation | None = None,
    ) -> None:
        super().__init__()
        check_attention(norm, pooling)
        self.norm, self.pooling = norm, pooling
        self.unit = PairUnit(dim, 1, hidden=hidden, parts=parts, activation=activation)

    def forward(self, history_BHd: Tensor, mask_BH: Tensor, target_BNd: Tensor) -> Tensor:
        """Return v_u."""
        score_BHN = self.unit.pairs(history_BHd, target_BNd, mask_BH.unsqueeze(-1)).squeeze(-1)
        weight_BHN = attention_weights(score_BHN, mask_BH, norm=self.norm, pooling=self.pooling)
        return weight_BHN.transpose(1, 2) @ history_BHd


class PlainSum(nn.Module):
    """The user without a look at the candidate: the sum of the past items (the DNN baseline).

    Args:
        dim: d; unused, since nothing is learned.
        pooling: as in `ActivationUnit`.

    Example:
        >>> PlainSum(8)(torch.ones(3, 4, 8), torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 2, 8))[0, 0, 0]
        tensor(2.)
    """

    def __init__(self, dim: int, *, pooling: Pooling = "sqrtn") -> None:
        super().__init__()
        check_attention("none", pooling)
        self.pooling = pooling

    def forward(self, history_BHd: Tensor, mask_BH: Tensor, target_BNd: Tensor) -> Tensor:
        """Return v_u, the same for all candidates."""
        ones_BH1 = torch.ones_like(history_BHd[..., :1])
        weight_BH1 = attention_weights(ones_BH1, mask_BH, pooling=self.pooling)
        return (weight_BH1.transpose(1, 2) @ history_BHd).expand(-1, target_BNd.shape[1], -1)


InterestFactory = Callable[[int], nn.Module]
