# SPDX-License-Identifier: Apache-2.0
"""Causal attention with rotary positions and grouped key-value heads.

Shape legend: B clips, R rows, A all rows so far, H heads, G key-value heads, d width of a head, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.audio.nets.cache import LayerCache

Rotary = tuple[Tensor, Tensor]


def rotary(first: int, num_rows: int, head_dim: int, theta: float, like: Tensor) -> Rotary:
    """Cosines and sines [R, d/2] of the angles of rows first, first + 1, ...: place times theta^(-2i/d).

    Source: Su et al. 2021, RoFormer; halves are rotated against each other, as in LLaMA and Qwen.
    """
    half, exact = head_dim // 2, torch.promote_types(like.dtype, torch.float32)
    place_R = torch.arange(first, first + num_rows, dtype=exact, device=like.device)
    rate_d = theta ** (-torch.arange(half, dtype=exact, device=like.device) / half)
    angle_Rd = place_R.unsqueeze(-1) * rate_d
    return angle_Rd.cos().to(like.dtype), angle_Rd.sin().to(like.dtype)


def rotated(x_BHRd: Tensor, angles: Rotary) -> Tensor:
    """Turn each pair (i, i + d/2) of a head by its angle."""
    cos_Rd, sin_Rd = angles
    a, b = x_BHRd.chunk(2, dim=-1)
    return torch.cat([a * cos_Rd - b * sin_Rd, b * cos_Rd + a * sin_Rd], dim=-1)


class Attention(nn.Module):
    """Scaled dot-product attention of H heads over G heads of keys and values.

    Args:
        dim: D, a multiple of ``2 num_heads`` (rotary pairs).
        num_heads: H.
        num_kv_heads: G, a divisor of H; None means H.

    Raises:
        ValueError: sizes that do not divide each other.

    Source: Ainslie et al. 2023, GQA; docs/papers/unimoe_audio.md, equation 9.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int | None = None) -> None:
        super().__init__()
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or dim % (2 * num_heads):
            raise ValueError(f"dim={dim} must be a multiple of twice num_heads={num_heads}: places turn pairs")
        if groups < 1 or num_heads % groups:
            raise ValueError(f"num_kv_heads={groups} must divide num_heads={num_heads}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, groups, dim // num_heads
        self.qkv = nn.Linear(dim, (num_heads + 2 * groups) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BRD: Tensor, angles: Rotary, mask_BRA: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Attend: [B, R, D] -> [B, R, D].

        Args:
            x_BRD: rows.
            angles: of their places, from `rotary`.
            mask_BRA: bool, which of all rows so far a row may see; each sees one at least.
            cache: rows before these; these are added to it.
        """
        heads = self.qkv(x_BRD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = rotated(q, angles), rotated(k, angles)
        if cache is not None:
            k, v = cache.extend(k, v)
        share = self.num_heads // self.num_kv_heads
        if share > 1:
            k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
        y_BHRd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BRA.unsqueeze(1))
        y: Tensor = self.out(y_BHRd.transpose(1, 2).flatten(-2))
        return y
