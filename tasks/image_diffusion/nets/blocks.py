# SPDX-License-Identifier: Apache-2.0
"""Parts of a diffusion transformer: embeddings of time and label, the modulated block, the last layer.

Source: Peebles & Xie 2023, Scalable Diffusion Models with Transformers (DiT), adaLN-Zero; written fresh, since the
authors' code has a licence without commercial use.

Shape legend: B images, L tokens of an image, D width, C channels, P patch edge.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, get_args

import torch
from timm.layers import Attention, Mlp, build_sincos2d_pos_embed
from torch import Tensor, nn

from moeapps.moe import LayerFactory, MoELayer

EPS = 1e-6
TIME_DIM = 256
MAX_PERIOD = 10_000.0
PositionOrder = Literal["columns_first", "rows_first"]


def modulate(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """Shift and scale as the condition says: x (1 + scale) + shift, in one pass over memory."""
    return torch.addcmul(shift_B1D, x_BLD, 1 + scale_B1D)


def position_table(grid: int, dim: int, order: PositionOrder = "columns_first") -> Tensor:
    """Fixed sine-cosine table [grid * grid, dim]: the first half of the channels is one axis, the second the other.

    Args:
        grid: tokens along an edge; tokens are numbered row by row.
        dim: width D.
        order: which axis the first half is. ``columns_first`` is DiT's, which published weights were trained with.

    Raises:
        ValueError: for another order.
    """
    if order not in get_args(PositionOrder):
        raise ValueError(f"positions={order!r}; use {' or '.join(get_args(PositionOrder))}")
    # timm's rows are: sine of both axes, then cosine of both.
    table: Tensor = build_sincos2d_pos_embed([grid, grid], dim, temperature=MAX_PERIOD)
    if order == "columns_first":
        table = table.view(grid, grid, dim).transpose(0, 1)  # a square grid's columns are the rows of its transpose
    return table.reshape(grid * grid, 2, 2, dim // 4).transpose(1, 2).reshape(grid * grid, dim)


class TimeEmbedder(nn.Module):
    """Sinusoid of 256 numbers (cosines, then sines), Linear, SiLU, Linear.

    Args:
        dim: width D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(TIME_DIM, dim), nn.Linear(dim, dim)

    def forward(self, time_B: Tensor) -> Tensor:
        """Embed times in [0, 1000]: [B] -> [B, D]."""
        half = TIME_DIM // 2
        steps = torch.arange(half, dtype=torch.float32, device=time_B.device)
        angle = time_B.float().unsqueeze(-1) * torch.exp(-math.log(MAX_PERIOD) / half * steps)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.first.weight.dtype)
        y: Tensor = self.second(nn.functional.silu(self.first(wave)))
        return y


class LabelEmbedder(nn.Module):
    """A row per class and one more, number ``num_classes``, for "no class"; in training labels are dropped to it.

    Args:
        num_classes: K; labels are 0 .. K-1, and K is the null label, whatever K is.
        dim: width D.
        dropout: share of the labels that training replaces by the null label, in [0, 1].

    Raises:
        ValueError: for no class at all or a share outside its range.
    """

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        if num_classes < 1 or not 0 <= dropout <= 1:
            raise ValueError(f"num_classes={num_classes}, label_dropout={dropout}: use >= 1 and a share in [0, 1]")
        self.num_classes, self.dropout = num_classes, dropout
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, label_B: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, D] and the labels after dropping, int64 [B]: every layer must see the same ones."""
        if self.training and self.dropout > 0:
            dropped = torch.rand(label_B.shape, device=label_B.device) < self.dropout
            label_B = label_B.masked_fill(dropped, self.num_classes)
        y: Tensor = self.table(label_B)
        return y, label_B


class Block(nn.Module):
    """x + g1 * Attn(mod(LN x)), then x + g2 * FFN(mod(LN x)); shifts, scales and gates come from the condition.

    Args:
        dim: width D.
        num_heads: attention heads.
        mlp_ratio: hidden width of the dense FFN over D.
        moe: what takes the place of the dense FFN; None keeps it.
        qk_norm: layer norm of queries and keys per head.
    """

    def __init__(
        self, dim: int, num_heads: int, *, mlp_ratio: float, moe: LayerFactory | None = None, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.norm1 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.attn = Attention(dim, num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=partial(nn.LayerNorm, eps=EPS))
        self.norm2 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        gelu = partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=gelu) if moe is None else moe(dim)

    def forward(self, x_BLD: Tensor, c_BD: Tensor, group_BL: Tensor) -> Tensor:
        """One block: [B, L, D] -> [B, L, D]; ``group_BL`` tells MoE layers which image and class a token is of."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c_BD).unsqueeze(1).chunk(6, dim=-1)
        x_BLD = torch.addcmul(x_BLD, gate1, self.attn(modulate(self.norm1(x_BLD), shift1, scale1)))
        h_BLD = modulate(self.norm2(x_BLD), shift2, scale2)
        y_BLD = self.mlp(h_BLD, group=group_BL) if isinstance(self.mlp, MoELayer) else self.mlp(h_BLD)
        return torch.addcmul(x_BLD, gate2, y_BLD)


class LastLayer(nn.Module):
    """Modulated layer norm and a linear map to the P x P x C numbers of each patch.

    Args:
        dim: width D.
        patch_dim: P * P * C of the output.
    """

    def __init__(self, dim: int, patch_dim: int) -> None:
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.norm = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.linear = nn.Linear(dim, patch_dim)

    def forward(self, x_BLD: Tensor, c_BD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, P * P * C]."""
        shift, scale = self.modulation(c_BD).unsqueeze(1).chunk(2, dim=-1)
        y: Tensor = self.linear(modulate(self.norm(x_BLD), shift, scale))
        return y
