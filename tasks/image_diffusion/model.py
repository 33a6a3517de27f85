# SPDX-License-Identifier: Apache-2.0
"""The diffusion transformer of ProMoE: DiT with adaLN-Zero whose odd blocks hold a mixture of experts.

Source: ProMoE, "Routing Matters in MoE: Scaling Diffusion Transformers with Explicit Routing Guidance" (arXiv
2510.24711); facts of the layout from ali-vilab/ProMoE ``models/models_ProMoE_TC.py``. Differs: the null label is
``num_classes`` (theirs is 1000 whatever the data), any number of channels and classes, no GPU is asked for.

Shape legend: B images, C channels, H image edge, P patch edge, L = (H / P)^2 tokens, D width, K classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from moeapps.moe import Experts, LayerFactory
from tasks.image_diffusion.nets.blocks import (
    Block,
    LabelEmbedder,
    LastLayer,
    PositionOrder,
    TimeEmbedder,
    position_table,
)


class DiT(nn.Module):
    """From noisy images, times and labels to what the process needs: velocity or noise.

    Args:
        facts: from the data module; read are ``image_size``, H, edge of the images or latents in pixels (a multiple of
            ``patch_size``), their ``channels``, C, and ``num_classes``, K; label K means "no class".
        patch_size: P, edge of a patch (paper: 2 on latents).
        dim: width D, a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        moe: width -> layer that takes the place of the FFN in every ``moe_every``-th block; None leaves all dense.
        moe_every: 2 puts it into blocks 1, 3, 5, ... (paper); 1 into all.
        mlp_ratio: hidden width of a dense FFN over D.
        learn_sigma: give 2C channels, the second half for a learned variance (published networks do so under rectified
            flow as well, where it is unused).
        qk_norm: layer norm of queries and keys (off in the paper's results; for very long trainings).
        label_dropout: share of the labels dropped in training (paper: 0.1); needed for guidance.
        positions: which axis the first half of a position's channels is; published weights need ``columns_first``.

    Shape:
        x [B, C, H, H], time [B] in [0, 1000], label int64 [B] in 0..K -> [B, C or 2C, H, H].

    Raises:
        ValueError: for sizes that do not divide each other, or another order of positions.
    """

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        moe: LayerFactory | None = None,
        moe_every: int = 2,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        qk_norm: bool = False,
        label_dropout: float = 0.1,
        positions: PositionOrder = "columns_first",
    ) -> None:
        super().__init__()
        image_size: int = facts["image_size"]
        channels: int = facts["channels"]
        num_classes: int = facts["num_classes"]
        _check(image_size, patch_size, dim, num_heads, depth, moe_every)
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.num_classes, self.dim, self.learn_sigma = num_classes, dim, learn_sigma
        self.out_channels = 2 * channels if learn_sigma else channels
        self.patches = PatchEmbed(image_size, patch_size, channels, dim)
        self.time = TimeEmbedder(dim)
        self.label = LabelEmbedder(num_classes, dim, label_dropout)
        table_LD = position_table(image_size // patch_size, dim, positions)
        self.register_buffer("position_LD", table_LD, persistent=False)
        is_moe = [moe is not None and i % moe_every == moe_every - 1 for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio=mlp_ratio, moe=moe if mixed else None, qk_norm=qk_norm) for mixed in is_moe
        )
        self.last = LastLayer(dim, patch_size**2 * self.out_channels)
        self.reset_parameters()

    position_LD: Tensor

    @property
    def num_tokens(self) -> int:
        """L, tokens of one image."""
        return (self.image_size // self.patch_size) ** 2

    def forward(self, x_BCHW: Tensor, time_B: Tensor, label_B: Tensor) -> Tensor:
        """Predict: [B, C, H, H] -> [B, C or 2C, H, H]."""
        x_BLD = self.patches(x_BCHW) + self.position_LD
        label_BD, label_B = self.label(label_B)
        c_BD = self.time(time_B) + label_BD
        group_BL = self.groups(label_B).unsqueeze(-1).expand(-1, self.num_tokens)
        for block in self.blocks:
            x_BLD = block(x_BLD, c_BD, group_BL)
        return self.unpatchify(self.last(x_BLD, c_BD))

    def groups(self, label_B: Tensor) -> Tensor:
        """One id per image for the routers, int64 [B]: b K + label, or -(b + 1) without a class.

        Ids tell images apart (routing per image), ids modulo K tell the class, and negative ones are unconditional.
        """
        place_B = torch.arange(len(label_B), device=label_B.device)
        return (place_B * self.num_classes + label_B).where(label_B < self.num_classes, -(place_B + 1))

    def unpatchify(self, y_BLP: Tensor) -> Tensor:
        """Rows of P P C numbers back to images: [B, L, P P C] -> [B, C, H, H]."""
        edge, size = self.image_size // self.patch_size, self.patch_size
        y = y_BLP.view(-1, edge, edge, size, size, self.out_channels)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, self.image_size, self.image_size)

    def reset_parameters(self) -> None:
        """Xavier weights and zero biases; label and time N(0, 0.02); all modulations and the last layer zero.

        So every block starts as the identity and the network's output is exactly 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                _zero(module.bias)
            elif isinstance(module, Experts):
                _xavier_experts(module)
        projection = self.patches.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        _zero(projection.bias)
        nn.init.normal_(self.label.table.weight, std=0.02)
        for layer in (self.time.first, self.time.second):
            nn.init.normal_(layer.weight, std=0.02)
        for module in (*self.blocks, self.last):
            _zero(module.modulation[1].weight, module.modulation[1].bias)
        _zero(self.last.linear.weight, self.last.linear.bias)


def _zero(*parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            nn.init.zeros_(parameter)


def _xavier_experts(bank: Experts) -> None:
    """Every expert of a stacked bank as a Linear of its own: bounds by the fans of one expert; zero biases."""
    stack = bank.feed_forward()
    if stack is None:
        return
    for weight in (stack.w_in, stack.w_out):
        fan_in, fan_out = weight.shape[1], weight.shape[2] // (2 if stack.gated and weight is stack.w_in else 1)
        bound = math.sqrt(6.0 / (fan_in + fan_out))
        nn.init.uniform_(weight, -bound, bound)
    _zero(stack.b_in, stack.b_out)


def _check(image_size: int, patch_size: int, dim: int, num_heads: int, depth: int, moe_every: int) -> None:
    if patch_size < 1 or image_size % patch_size:
        raise ValueError(
            f"image_size={image_size} is not a multiple of patch_size={patch_size}; choose a patch that divides it"
        )
    if num_heads < 1 or dim % 4 or dim % num_heads:
        raise ValueError(f"dim={dim} must be a multiple of 4 (position table) and of num_heads={num_heads}")
    if depth < 1 or moe_every < 1:
        raise ValueError(f"depth={depth}, moe_every={moe_every}; both must be 1 or more")


# --- the paper's sizes ------------------------------------------------------------------------------------------------

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads of the published sizes (paper, table 2)."""

LATENTS = {"image_size": 32, "channels": 4, "num_classes": 1000}
"""Facts of what the paper trains on: latents of ImageNet at 256 pixels."""


def dit_paper(size: str, moe: LayerFactory | None = None) -> DiT:
    """A network of the paper on `LATENTS`: ``S``, ``B``, ``L`` or ``XL``; dense, or with the layer in its odd blocks.

    With ``moeapps.moe.presets.promoe`` (12 routed experts, one shared, one unconditional): 75M, 300M, 1.063B and 1.568B
    parameters.

    Raises:
        ValueError: for another size.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}; the paper has {', '.join(SIZES)}")
    depth, dim, heads = SIZES[size]
    return DiT(LATENTS, patch_size=2, dim=dim, depth=depth, num_heads=heads, moe=moe)
