# SPDX-License-Identifier: Apache-2.0
"""Rivals that are more than another preset: routers that read something else, a backbone without attention.

Each is chosen by its class path in ``configs/baselines/point_moe_*.yaml``. Prompt-driven normalisation, the paper's
main rival, has a file of its own, ``prompt.py``.

Shape legend: N voxels, D width, E experts, S domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from moeapps.moe import LinearScore, Router, RouterFactory, Score, TopK
from moeapps.moe.presets import linear
from moeapps.moe.routers.score import Features
from tasks.point_cloud.model import Block, PointMoE
from tasks.point_cloud.module import PointCloudTask
from tasks.point_cloud.nets.attention import apply_layer
from tasks.point_cloud.nets.geometry import Level
from tasks.point_cloud.nets.norm import BatchNorm
from tasks.point_cloud.nets.serialization import Order
from tasks.point_cloud.nets.sparse_conv import SubmanifoldConv3d

# --- routers that read something else ---------------------------------------------------------------------------------


class DomainGuidedScore(Score):
    r"""Linear logits of a row and a learned vector of its domain, :math:`s = W [x, e_{domain}]`.

    A domain beyond ``num_domains`` was never trained on; its rows get the mean of the learned vectors (ours: the paper
    tests this router on seen domains).

    Args:
        dim: width D of the rows.
        num_experts: E.
        num_domains: S, the seen domains, whose ids come first.
        domain_dim: length of a domain's vector (paper's code: 16).

    Shape:
        features [N, D] and group int64 [N] -> logits [N, E].

    Raises:
        ValueError: in a call without ``group``.

    Source: UVA-Computer-Vision-Lab/point_moe, the "domain guided" gate of ``moe_layer.py``.
    """

    def __init__(self, dim: int, num_experts: int, num_domains: int, domain_dim: int = 16) -> None:
        super().__init__(num_experts)
        self.domains = nn.Embedding(num_domains, domain_dim)
        self.linear = LinearScore(dim + domain_dim, num_experts)

    def forward(self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """Logits [N, E] of rows [N, D] of the domains ``group``."""
        if group is None or not isinstance(features, Tensor):
            raise ValueError("a domain-guided router needs one tensor of rows and their domains: pass group=ids")
        table_SV = torch.cat([self.domains.weight, self.domains.weight.mean(dim=0, keepdim=True)])
        vector_NV = table_SV[group.clamp(max=len(table_SV) - 1)]
        return self.linear.forward(torch.cat([features, vector_NV.to(features.dtype)], dim=1))


def domain_guided_router(
    *, num_experts: int = 4, top_k: int = 2, num_domains: int = 6, domain_dim: int = 16
) -> RouterFactory:
    """Point-MoE's router that also reads the domain of each voxel: a rival that needs the data set's name.

    Args:
        num_experts: E.
        top_k: experts per voxel.
        num_domains: seen domains.
        domain_dim: length of a domain's vector.
    """
    return lambda dim: Router(DomainGuidedScore(dim, num_experts, num_domains, domain_dim), TopK(top_k))


class ConvRoutedBlock(Block):
    """A block whose mixture routes on the output of the positional convolution instead of on its own input.

    The choice of experts then follows the shape of the surface around a voxel. STAR's router reads a small convolution
    of its own; here the one that the block has anyway is read, which costs nothing.

    Source: after STAR, Spatial-Topology Aware Routing, which adds a domain vector and an entropy-set number of experts.
    """

    def forward(self, x_ND: Tensor, level: Level, order: Order) -> Tensor:
        """One block along one curve: [N, D] -> [N, D]."""
        local_ND = self.cpe(x_ND, level)
        x_ND = x_ND + local_ND
        x_ND = x_ND + self.drop_path(self.attn(self.norm1(x_ND), level, order, local_ND))
        mixed: Tensor = self.drop_path(apply_layer(self.mlp, self.norm2(x_ND), level, local_ND))
        return x_ND + mixed


class ConvRoutedPointMoE(PointMoE):
    """`PointMoE` made of `ConvRoutedBlock`; arguments and shapes are the same."""

    block: ClassVar[type[Block]] = ConvRoutedBlock


# --- a backbone without attention and experts -------------------------------------------------------------------------


class ConvBlock(Block):
    """Residual block of two submanifold convolutions: x + BN(Conv(GELU(BN(Conv(x))))). Takes `Block`'s place.

    Args:
        dim: width.
        drop_path: rate at which the branch is dropped per voxel in training.
        attention_options: what only `Block` needs; not used.
    """

    def __init__(self, dim: int, *, drop_path: float, **attention_options: Any) -> None:
        nn.Module.__init__(self)
        self.conv1 = SubmanifoldConv3d(dim, dim, 3, bias=False)
        self.bn1 = BatchNorm(dim, eps=1e-3)
        self.conv2 = SubmanifoldConv3d(dim, dim, 3, bias=False)
        self.bn2 = BatchNorm(dim, eps=1e-3)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_ND: Tensor, level: Level, order: Order) -> Tensor:
        """Two convolutions; the curve does not matter: [N, D] -> [N, D]."""
        table = level.neighbours(3)
        y_ND: Tensor = self.drop_path(self.bn2(self.conv2(F.gelu(self.bn1(self.conv1(x_ND, table))), table)))
        return x_ND + y_ND


class ConvUNet(PointMoE):
    """Sanity floor: a residual U-Net of submanifold convolutions, with the stem, pooling and unpooling of `PointMoE`.

    Args:
        facts: as `PointMoE` reads them.
        enc_depths: blocks of each encoder stage.
        enc_dims: widths of the encoder stages.
        dec_depths: blocks of each decoder stage, finest first.
        dec_dims: widths of the decoder stages, finest first.
        drop_path: rate at which the deepest block is dropped per voxel in training.
        norm_momentum: momentum of the batch norms.

    Source: the submanifold U-Net of Graham et al. 2018, section 4, with residual blocks.
    """

    block: ClassVar[type[Block]] = ConvBlock

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        enc_depths: Sequence[int] = (1, 1, 2),
        enc_dims: Sequence[int] = (32, 64, 96),
        dec_depths: Sequence[int] = (1, 1),
        dec_dims: Sequence[int] = (32, 64),
        drop_path: float = 0.1,
        norm_momentum: float = 0.05,
    ) -> None:
        super().__init__(
            facts,
            moe=linear(),
            enc_depths=enc_depths,
            enc_dims=enc_dims,
            dec_depths=dec_depths,
            dec_dims=dec_dims,
            drop_path=drop_path,
            norm_momentum=norm_momentum,
            orders=("z",),
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = norm_momentum


# --- a conflict between domains ---------------------------------------------------------------------------------------


class MisalignedTask(PointCloudTask):
    """Point-cloud segmentation in which every other domain's class names are out of step by one.

    In the domains at odd places of ``facts["domain_names"]`` class c is matched with the name of class c + 1 (the last
    with the first), so the same surface must be called "wall" in one domain and "floor" in another: no function of the
    surface alone can answer both. The released code does this to S3DIS by accident (docs/papers/point_moe.md, known
    faults). Scores are comparable within this task only, and mean nothing on unseen domains.

    Args:
        facts: see `PointCloudTask`.
        options: arguments of `PointCloudTask`.
    """

    def __init__(self, *, facts: dict[str, Any], **options: Any) -> None:
        super().__init__(facts={**facts, "label_sets": misaligned(facts)}, **options)
        self.facts, self.label_sets = facts, facts["label_sets"]  # predictions bear the right names; the head does not


def misaligned(facts: dict[str, Any]) -> dict[str, list[str]]:
    """Label sets of ``facts`` with those of every other domain turned by one place."""
    odd = set(facts["domain_names"][1::2])
    return {
        domain: [*names[1:], *names[:1]] if domain in odd else list(names)
        for domain, names in facts["label_sets"].items()
    }
