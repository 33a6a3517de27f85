# SPDX-License-Identifier: Apache-2.0
"""Attention within runs of a space-filling curve, and the convolution that encodes a voxel's position (xCPE).

Shape legend: N voxels, P runs, K voxels in a run, D width, H heads, A = D / H head width.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from moeapps.moe import LayerFactory, MoELayer
from tasks.point_cloud.nets.geometry import Level
from tasks.point_cloud.nets.serialization import Order
from tasks.point_cloud.nets.sparse_conv import SubmanifoldConv3d


class PositionalConv(nn.Module):
    """xCPE: LayerNorm(Linear(SubMConv3(x))), added to x by the block.

    Source: Wu et al. 2024, Point Transformer V3, section 4.2 (there with a skip connection around it).

    Shape:
        x [N, D] and its `Level` -> [N, D].
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = SubmanifoldConv3d(dim, dim, 3)
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_ND: Tensor, level: Level) -> Tensor:
        """Mix each voxel with its occupied neighbours."""
        y_ND: Tensor = self.norm(self.linear(self.conv(x_ND, level.neighbours(3))))
        return y_ND


class PatchAttention(nn.Module):
    """Full softmax attention inside each run of K voxels along a curve, heads merged by ``projection(dim)``.

    q, k, v = X W_qkv + b;  A = softmax(q kᵀ / sqrt(head_dim)) v per run and head;  y = O(A). In Point Transformer V3 O
    is linear; in Point-MoE it is the mixture of experts.

    Args:
        dim: width D, a multiple of ``head_dim``.
        head_dim: width of a head; 16 at every stage of the paper's networks.
        patch_size: K, voxels in a run.
        projection: makes O from the width.

    Shape:
        x [N, D], its `Level` and the name of a curve -> [N, D].

    Raises:
        ValueError: ``dim`` is not a multiple of ``head_dim``, or ``patch_size`` < 1.
    """

    def __init__(self, dim: int, *, head_dim: int, patch_size: int, projection: LayerFactory) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"width {dim} is not a multiple of head_dim={head_dim}: change one of them")
        if patch_size < 1:
            raise ValueError(f"patch_size={patch_size}: a run holds at least one voxel")
        self.head_dim = head_dim
        self.patch_size = patch_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = projection(dim)

    def forward(self, x_ND: Tensor, level: Level, order: Order, features: Tensor | None = None) -> Tensor:
        """Attend along one curve; a mixture that merges the heads routes on ``features`` [N, D], or on its input."""
        patches = level.patches(order, self.patch_size)
        (num_runs, size), dim = patches.index_PK.shape, x_ND.shape[1]
        # Gathered before the linear: one row in K is borrowed, but rows of D move instead of rows of 3 D.
        runs = self.qkv(x_ND.index_select(0, patches.index_PK.flatten()))  # (P K, 3 D)
        q, k, v = runs.view(num_runs, size, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)  # 3 x (P, H, K, A)
        mask = None if patches.mask_PK is None else patches.mask_PK[:, None, None, :]  # (P, 1, 1, K)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (P, H, K, A)
        y = y.transpose(1, 2).reshape(num_runs * size, dim).index_select(0, patches.slot_N)  # (N, D)
        return apply_layer(self.proj, y, level, features)


def apply_layer(layer: nn.Module, x_ND: Tensor, level: Level, features: Tensor | None = None) -> Tensor:
    """Call a layer made by a `LayerFactory`; a mixture also gets the domain of each row and the features to route on.

    Only table and domain-guided routers (controls) and metrics look at the domain; a plain layer takes ``x`` alone.
    """
    if isinstance(layer, MoELayer):
        y_ND: Tensor = layer(x_ND, features, group=level.group_N)
        return y_ND
    return cast(Tensor, layer(x_ND))
