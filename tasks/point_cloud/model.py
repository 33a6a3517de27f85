# SPDX-License-Identifier: Apache-2.0
"""Point-MoE: a Point Transformer V3 whose attention heads are merged by a mixture of experts.

Source: Chen et al. 2026, Point-MoE (ICLR; arXiv 2505.23926); Wu et al. 2024, Point Transformer V3, figure 6. Facts of
the layout from UVA-Computer-Vision-Lab/point_moe ``pointcept/models/point_moe`` and Pointcept/Pointcept
``pointcept/models/point_transformer_v3``. Differs from that code on purpose: predictions do not depend on batch mates,
and the order of the curves is drawn at random in training only.

Shape legend: N voxels of a level, C channels in, D width of a stage, B scans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch_geometric.data import Batch

from moeapps.moe import LayerFactory
from tasks.point_cloud.nets.attention import PatchAttention, PositionalConv, apply_layer
from tasks.point_cloud.nets.geometry import Level, finest_level
from tasks.point_cloud.nets.mlp import GeluMlp
from tasks.point_cloud.nets.norm import BatchNorm
from tasks.point_cloud.nets.serialization import MAX_DEPTH, ORDERS, Order
from tasks.point_cloud.nets.sparse_conv import SubmanifoldConv3d

Placement = Literal["projection", "mlp"]
CurveDepth = Literal["constant", "batch"]

# --- parts ------------------------------------------------------------------------------------------------------------


class Stem(nn.Module):
    """Submanifold convolution 5x5x5 without bias, batch norm, GELU."""

    def __init__(self, in_dim: int, dim: int, norm_momentum: float) -> None:
        super().__init__()
        self.conv = SubmanifoldConv3d(in_dim, dim, 5, bias=False)
        self.norm = BatchNorm(dim, eps=1e-3, momentum=norm_momentum)

    def forward(self, x_NC: Tensor, level: Level) -> Tensor:
        """Lift the input features to the first width."""
        return F.gelu(self.norm(self.conv(x_NC, level.neighbours(5))))


class Block(nn.Module):
    """x + xCPE(x), then x + O(A(LN x)), then x + MLP(LN x); residual branches are dropped row by row in training."""

    def __init__(
        self,
        dim: int,
        *,
        moe: LayerFactory,
        placement: Placement,
        head_dim: int,
        patch_size: int,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        merge = moe if placement == "projection" else lambda dim: nn.Linear(dim, dim)
        self.cpe = PositionalConv(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = PatchAttention(dim, head_dim=head_dim, patch_size=patch_size, projection=merge)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = moe(dim) if placement == "mlp" else GeluMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x_ND: Tensor, level: Level, order: Order) -> Tensor:
        """One block along one curve: [N, D] -> [N, D]."""
        x_ND = x_ND + self.cpe(x_ND, level)
        x_ND = x_ND + self.drop_path(self.attn(self.norm1(x_ND), level, order))
        mixed: Tensor = self.drop_path(apply_layer(self.mlp, self.norm2(x_ND), level))
        return x_ND + mixed


class Pooling(nn.Module):
    """Halve the resolution: Linear, maximum over the voxels of each parent, batch norm, GELU."""

    def __init__(self, in_dim: int, dim: int, norm_momentum: float) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)
        self.norm = BatchNorm(dim, eps=1e-3, momentum=norm_momentum)

    def forward(self, x_ND: Tensor, level: Level) -> Tensor:
        """Rows of ``level`` -> rows of its parent level."""
        return F.gelu(self.norm(pool_max(self.proj(x_ND), level)))


def pool_max(x_ND: Tensor, level: Level) -> Tensor:
    """Maximum over the voxels of each parent. Rows are in z-order, so the children of a parent are neighbours."""
    return torch.segment_reduce(x_ND, "max", lengths=level.count_parent, axis=0)


class Unpooling(nn.Module):
    """Double the resolution: GELU(BN(Linear(skip))) + GELU(BN(Linear(coarse)))[parent]."""

    def __init__(self, coarse_dim: int, skip_dim: int, dim: int, norm_momentum: float) -> None:
        super().__init__()
        self.proj = nn.Linear(coarse_dim, dim)
        self.norm = BatchNorm(dim, eps=1e-3, momentum=norm_momentum)
        self.proj_skip = nn.Linear(skip_dim, dim)
        self.norm_skip = BatchNorm(dim, eps=1e-3, momentum=norm_momentum)

    def forward(self, coarse: Tensor, skip: Tensor, level: Level) -> Tensor:
        """Rows of the parent level and of ``level`` -> rows of ``level``."""
        assert level.parent_N is not None
        coarse = F.gelu(self.norm(self.proj(coarse)))
        return F.gelu(self.norm_skip(self.proj_skip(skip))) + coarse.index_select(0, level.parent_N)


class Stage(nn.Module):
    """Blocks of one resolution; block i follows curve i of the list, again from the start when the list is over."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_ND: Tensor, level: Level, orders: Sequence[Order]) -> Tensor:
        """Run the blocks: [N, D] -> [N, D]."""
        for i, block in enumerate(self.blocks):
            x_ND = block(x_ND, level, orders[i % len(orders)])
        return x_ND


# --- the network ------------------------------------------------------------------------------------------------------


class PointMoE(nn.Module):
    """U-Net of Point Transformer V3 blocks whose merging of the heads is made by ``moe``; by default small, for CPUs.

    Args:
        facts: from the data module; read is ``in_dim``, the channels of the input features.
        moe: makes the layer after the attention heads from its width, afresh for each block: a mixture
            (``moeapps.moe.presets.point_moe``), a dense twin (``dense``) or a plain linear map (``linear``, which is
            Point Transformer V3).
        enc_depths: blocks of each encoder stage; the resolution halves between stages.
        enc_dims: widths of the encoder stages.
        dec_depths: blocks of each decoder stage, finest first; one fewer than encoder stages.
        dec_dims: widths of the decoder stages, finest first; the first is the width of the output.
        placement: where ``moe`` stands: ``projection``, the merging of the attention heads (the paper), or ``mlp``, in
            place of the block's MLP (the usual place, an ablation of the paper).
        head_dim: width of an attention head (paper: 16 everywhere).
        patch_size: voxels that attend to one another (paper: 1024).
        mlp_ratio: hidden width of the block's MLP over its width (paper: 4).
        drop_path: rate at which the residual branches of the deepest block are dropped per voxel in training; rises
            linearly from 0 with depth (paper: 0.3).
        norm_momentum: momentum of the batch norms (paper: 0.01; short trainings need more).
        orders: curves to follow. In training they are permuted at random for every stage.
        average_orders: in evaluation, average the features over all rotations of ``orders`` (as many forward passes as
            orders) instead of following them as given.
        curve_depth: levels of the curves. ``constant``: 16, so that the answer for a scan does not depend on its batch
            mates. ``batch``: as many as the widest scan of the batch needs (the public code).

    Shape:
        A batch of scans with ``x`` [N, in_dim], ``grid`` int64 [N, 3], ``batch`` int64 [N] and optionally ``domain``
        int64 [B] -> features [N, out_dim], rows as in the batch.

    Raises:
        ValueError: The stage lists disagree in length, a width is not a multiple of ``head_dim``, ``orders`` is empty,
            or ``placement`` or ``curve_depth`` is unknown.
    """

    block: ClassVar[type[Block]] = Block
    """What the stages are made of; a rival backbone names another."""

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        moe: LayerFactory,
        enc_depths: Sequence[int] = (1, 1, 2),
        enc_dims: Sequence[int] = (32, 64, 96),
        dec_depths: Sequence[int] = (1, 1),
        dec_dims: Sequence[int] = (32, 64),
        placement: Placement = "projection",
        head_dim: int = 16,
        patch_size: int = 128,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        norm_momentum: float = 0.1,
        orders: Sequence[Order] = ORDERS,
        average_orders: bool = False,
        curve_depth: CurveDepth = "constant",
    ) -> None:
        super().__init__()
        if not len(enc_depths) == len(enc_dims) == len(dec_depths) + 1 == len(dec_dims) + 1:
            raise ValueError(
                f"enc_depths, enc_dims, dec_depths, dec_dims have {len(enc_depths)}, {len(enc_dims)}, "
                f"{len(dec_depths)}, {len(dec_dims)} entries: give n, n, n - 1, n - 1"
            )
        if not orders or not set(orders) <= set(ORDERS):
            raise ValueError(f"orders={list(orders)}: give at least one of {', '.join(ORDERS)}")

        if placement not in ("projection", "mlp"):
            raise ValueError(f"placement={placement!r}: choose projection or mlp")
        if curve_depth not in ("constant", "batch"):
            raise ValueError(f"curve_depth={curve_depth!r}: choose constant or batch")
        block = partial(
            self.block, moe=moe, placement=placement, head_dim=head_dim, patch_size=patch_size, mlp_ratio=mlp_ratio
        )

        def stage(dim: int, rates: list[float]) -> Stage:
            return Stage([block(dim, drop_path=rate) for rate in rates])

        enc_rates, dec_rates = _rates(enc_depths, drop_path), _rates(dec_depths, drop_path)
        self.in_dim: int = facts["in_dim"]
        self.out_dim = dec_dims[0] if dec_dims else enc_dims[0]
        self.orders = tuple(orders)
        self.average_orders = average_orders
        self.curve_depth = curve_depth
        self.stem = Stem(self.in_dim, enc_dims[0], norm_momentum)
        self.encoder = nn.ModuleList(stage(dim, rates) for dim, rates in zip(enc_dims, enc_rates, strict=True))
        self.pools = nn.ModuleList(Pooling(fine, coarse, norm_momentum) for fine, coarse in pairwise(enc_dims))
        below = [*dec_dims[1:], enc_dims[-1]]
        self.unpools = nn.ModuleList(
            Unpooling(coarse, skip, dim, norm_momentum)
            for coarse, skip, dim in zip(below, enc_dims[:-1], dec_dims, strict=True)
        )
        # The decoder runs from coarse to fine; rates fall along the way, as they rose in the encoder.
        self.decoder = nn.ModuleList(stage(dim, rates[::-1]) for dim, rates in zip(dec_dims, dec_rates, strict=True))

    def forward(self, batch: Batch) -> Tensor:
        """Features of each voxel: [N, out_dim], rows as in the batch."""
        levels, row_N = self._levels(batch)
        # Lightning converts what a batch holds to 64-true and bf16-true, but not PyG's batches.
        x_NC = torch.empty_like(batch.x).index_copy_(0, row_N, batch.x).to(next(self.parameters()).dtype)
        passes = [self._unet(x_NC, levels, orders) for orders in self._order_lists()]
        y_ND = passes[0] if len(passes) == 1 else torch.stack(passes).mean(dim=0)
        return y_ND.index_select(0, row_N)

    @torch.no_grad()
    def rows(self, batch: Batch) -> list[Tensor]:
        """For each resolution, finest first, the row in which the layers of that resolution hold each voxel.

        Routing recorded at ``encoder.i`` or ``decoder.i`` has the rows of entry i: ``value[rows[i]]`` is per voxel of
        the batch.
        """
        levels, row_N = self._levels(batch)
        rows = [row_N]
        for level in levels[:-1]:
            assert level.parent_N is not None
            rows.append(level.parent_N[rows[-1]])
        return rows

    def _levels(self, batch: Batch) -> tuple[list[Level], Tensor]:
        group = None if getattr(batch, "domain", None) is None else batch.domain[batch.batch]
        depth = MAX_DEPTH
        if self.curve_depth == "batch":  # not below one level per halving, which each drop one
            depth = max(int(batch.grid.max()).bit_length(), len(self.pools), 1)
        level, row_N = finest_level(batch.grid, batch.batch, batch.num_graphs, self.orders, group, depth)
        levels = [level]
        for _ in self.pools:
            levels.append(levels[-1].coarser())
        return levels, row_N

    def _unet(self, x_NC: Tensor, levels: list[Level], orders: list[Sequence[Order]]) -> Tensor:
        """Stem, encoder down, decoder up. ``orders``: the list of curves of each encoder stage."""
        x: Tensor = self.stem(x_NC, levels[0])
        skips: list[Tensor] = []
        for i, stage in enumerate(self.encoder):
            if i:
                skips.append(x)
                x = self.pools[i - 1](x, levels[i - 1])
            x = stage(x, levels[i], orders[i])
        for i in reversed(range(len(self.decoder))):
            x = self.unpools[i](x, skips[i], levels[i])
            x = self.decoder[i](x, levels[i], orders[i])
        return x

    def _order_lists(self) -> Iterator[list[Sequence[Order]]]:
        """For each pass, the list of curves of each stage: shuffled in training, as given (or all) in evaluation."""
        num_stages = len(self.encoder)
        if self.training:
            yield [[self.orders[i] for i in torch.randperm(len(self.orders)).tolist()] for _ in range(num_stages)]
        else:
            for turn in range(len(self.orders) if self.average_orders else 1):
                yield [self.orders[turn:] + self.orders[:turn]] * num_stages


def _rates(depths: Sequence[int], drop_path: float) -> list[list[float]]:
    """Drop-path rate of each block, stage by stage, rising linearly from 0 to ``drop_path``."""
    flat = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [flat[start : start + depth] for start, depth in zip(starts, depths, strict=True)]


# --- the paper's size -------------------------------------------------------------------------------------------------


def point_moe_paper(facts: dict[str, Any], moe: LayerFactory) -> PointMoE:
    """The paper's backbone. Which of its networks it is, S or L, is decided by ``moe``.

    S: ``point_moe(num_experts=4, top_k=2, expansion=1)`` 58,726,464 parameters; L: ``point_moe(num_experts=8, top_k=2,
    expansion=2)`` 99,809,088; ``linear()`` 46,166,272. Counted without the text head.
    """
    return PointMoE(
        facts,
        moe=moe,
        enc_depths=(2, 2, 2, 6, 2),
        enc_dims=(32, 64, 128, 256, 512),
        dec_depths=(2, 2, 2, 2),
        dec_dims=(64, 64, 128, 256),
        patch_size=1024,
        drop_path=0.3,
        norm_momentum=0.01,
    )
