# SPDX-License-Identifier: Apache-2.0
"""The aggregator: a transformer over the experts' features of one image, as one token each.

Shape legend: N images, E experts (tokens), D features.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from typing_extensions import override


class AggregatorBlock(nn.Module):
    """A pre-norm transformer block: attention among the present tokens of a row, then two linear layers.

    Args:
        dim: D.
        heads: attention heads.
        expansion: hidden width over D.
        dropout: of the attention's weights and after each linear layer.
    """

    def __init__(self, dim: int, heads: int, expansion: float, dropout: float) -> None:
        super().__init__()
        hidden = int(expansion * dim)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )

    @override
    def forward(self, z_NED: Tensor, absent_NE: Tensor, *, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        h_NED = self.attention_norm(z_NED)
        mixed_NED, weight_NEE = self.attention(h_NED, h_NED, h_NED, key_padding_mask=absent_NE, need_weights=weights)
        z_NED = z_NED + mixed_NED
        return z_NED + self.mlp(self.mlp_norm(z_NED)), weight_NEE


class Aggregator(nn.Module):
    r"""Features of the experts to one feature: :math:`a = \frac{1}{|P|} \sum_{e \in P} \mathrm{blocks}(z)_e`.

    P are the present experts. There is no position, no class token and no last norm: the order of the experts does not
    matter, and any number of them will do.

    Args:
        dim: D.
        depth: blocks (paper: 1); 0 is the plain mean.
        heads: attention heads (paper: 16).
        expansion: hidden width of a block over D (paper: 2).
        dropout: (paper: 0.1).

    Shape:
        [N, E, D], bool [N, E] -> [N, D].

    Raises:
        ValueError: heads that do not divide D; in a call, a row without a present expert.

    Source: Meta-DMoE (docs/papers/meta_dmoe.md, equation 2).

    Example:
        >>> import torch
        >>> Aggregator(8, heads=2)(torch.randn(5, 3, 8), torch.ones(5, 3, dtype=torch.bool)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self, dim: int, *, depth: int = 1, heads: int = 4, expansion: float = 2.0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads or depth < 0:
            raise ValueError(f"heads={heads}, depth={depth}; heads must divide the {dim} features, depth be 0 or more")
        self.blocks = nn.ModuleList([AggregatorBlock(dim, heads, expansion, dropout) for _ in range(depth)])

    @override
    def forward(self, z_NED: Tensor, present_NE: Tensor) -> Tensor:
        return _mean(self._mixed(z_NED, present_NE)[0], present_NE)

    def attention(self, z_NED: Tensor, present_NE: Tensor) -> Tensor:
        """Return how much each expert's token is looked at, [N, E]; rows sum to 1.

        Attention of the last block, averaged over heads and over the present tokens that look; without a block every
        present expert has the same.
        """
        weight_NEE = self._mixed(z_NED, present_NE, weights=True)[1]
        if weight_NEE is None:
            return present_NE / present_NE.sum(1, keepdim=True)
        return _mean(weight_NEE, present_NE)

    def _mixed(self, z_NED: Tensor, present_NE: Tensor, *, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Run the blocks; absent tokens are read as 0, whatever they hold."""
        if not bool(present_NE.any(1).all()):
            raise ValueError("a row has no present expert; give two experts or more where an image's own is left out")
        z_NED, weight_NEE = z_NED.where(present_NE.unsqueeze(-1), 0), None
        for block in self.blocks:
            z_NED, weight_NEE = cast(AggregatorBlock, block)(z_NED, ~present_NE, weights=weights)
        return z_NED, weight_NEE


def _mean(z_NED: Tensor, present_NE: Tensor) -> Tensor:
    """Mean over present tokens."""
    here_NE1 = present_NE.unsqueeze(-1)
    return z_NED.where(here_NE1, 0).sum(1) / here_NE1.sum(1)
