# SPDX-License-Identifier: Apache-2.0
"""Meta-DMoE: frozen experts of the training domains teach a student, in one step, the features of a new domain.

Shape legend: B or N images, S support images, C channels, H x W pixels, E experts, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe import ModuleExperts, MoELayer
from moeapps.moe.presets import meta_dmoe
from tasks.adaptation.nets.adapt import InnerStep, Weights, batch_statistics
from tasks.adaptation.nets.aggregator import Aggregator
from tasks.adaptation.nets.backbones import Backbone, BackboneFactory, SmallCNN

MaskMode = Literal["drop", "zero", "none"]
Statistics = Literal["running", "batch"]


class Student(nn.Module):
    """A backbone with a linear head, images [B, C, H, W] -> logits [B, K].

    Args:
        backbone: images -> features [B, D].
        num_outputs: K.
    """

    def __init__(self, backbone: Backbone, num_outputs: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.dim, num_outputs)

    @override
    def forward(self, image: Tensor, weights: Weights | None = None) -> Tensor:
        """Return logits; ``weights`` take the place of the backbone's own."""
        feature_BD = self.backbone(_fast(image)) if weights is None else weights.run(self.backbone, image)
        logits: Tensor = self.head(feature_BD)
        return logits


class MetaDMoE(nn.Module):
    """Student, experts and aggregator; every phase of training trains some of its parts.

    Experts are the student's backbone E times, each with a head of its own, which adaptation does not use.

    Args:
        facts: from the data: ``num_classes`` (1 in regression), ``channels``, ``image_size``, ``num_experts``.
        backbone: makes a backbone from the facts; None means `SmallCNN`.
        depth: blocks of the aggregator (paper: 1).
        heads: attention heads of the aggregator (paper: 16).
        expansion: hidden width of the aggregator over D (paper: 2).
        dropout: of the aggregator (paper: 0.1).
        mask_mode: what becomes of the expert of an image's own domain in training: ``drop`` leaves it out (released
            code), ``zero`` puts zeros in its place (the paper's algorithm), ``none`` asks it like any other.
        expert_statistics: what batch normalisation of the frozen experts uses: ``running`` statistics of their own
            domains (paper), or those of the ``batch`` that they are asked about, which comes from one domain (ours).
        step: how the student is adapted; None means `InnerStep` as it is.

    Raises:
        ValueError: one expert alone that is to be masked, or experts of different widths.

    Source: Meta-DMoE (docs/papers/meta_dmoe.md, equations 1 to 4).
    """

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        backbone: BackboneFactory | None = None,
        depth: int = 1,
        heads: int = 4,
        expansion: float = 2.0,
        dropout: float = 0.1,
        mask_mode: MaskMode = "drop",
        expert_statistics: Statistics = "running",
        step: InnerStep | None = None,
    ) -> None:
        super().__init__()
        if mask_mode not in get_args(MaskMode) or expert_statistics not in get_args(Statistics):
            raise ValueError(
                f"mask_mode={mask_mode!r}, expert_statistics={expert_statistics!r}; mask_mode must be drop, zero or "
                "none, expert_statistics running or batch"
            )
        make = SmallCNN if backbone is None else backbone
        self.num_experts, self.mask_mode = int(facts["num_experts"]), mask_mode
        self.expert_statistics = expert_statistics
        if self.num_experts < 2 and mask_mode == "drop":
            raise ValueError("one expert cannot be left out for its own domain: give two or more, or mask_mode=none")
        outputs = int(facts["num_classes"])
        self.student = Student(make(facts), outputs)
        self.layer, self.expert_heads = _bank([make(facts) for _ in range(self.num_experts)], facts, outputs)
        dim = self.student.backbone.dim
        self.aggregator = Aggregator(dim, depth=depth, heads=heads, expansion=expansion, dropout=dropout)
        self.teacher_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, outputs))  # of its warm-up alone
        self.step = (step or InnerStep()).bind(self.student.backbone)

    @property
    def experts(self) -> list[Backbone]:
        """The experts' backbones."""
        return [cast(Backbone, expert) for expert in cast(ModuleExperts, self.layer.experts).experts]

    @override
    def forward(self, image: Tensor, weights: Weights | None = None) -> Tensor:
        """Return the student's logits [B, K]; ``weights`` take the place of its backbone's own."""
        logits: Tensor = self.student(image, weights)
        return logits

    @override
    def train(self, mode: bool = True) -> MetaDMoE:
        """Set the mode of parts that train; frozen ones stay in evaluation mode."""
        super().train(mode)
        for part in (self.student, self.layer, self.expert_heads, self.aggregator, self.teacher_head):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def specialise(self) -> None:
        """Let every expert start from the student: feature spaces then have a common origin (ours; paper: ImageNet)."""
        for expert, head in zip(self.experts, self.expert_heads, strict=True):
            expert.load_state_dict(self.student.backbone.state_dict())
            head.load_state_dict(self.student.head.state_dict())

    # Teachers -----------------------------------------------------------------------------------------------------

    def tokens(self, image: Tensor, own_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the experts' features [N, E, D] and which of them are present, bool [N, E].

        Args:
            image: [N, C, H, W]; of one domain, where experts use the statistics of the batch.
            own_N: int64 [N], the expert of each image's own domain, which is masked, -1 for none; None masks none.
        """
        with self.asking(len(image)):
            z_NED, _ = self.layer(_fast(image))
        return self.masked(z_NED, own_N)

    def asking(self, images: int) -> AbstractContextManager[None]:
        """Inside it experts use the statistics they are meant to; one image alone has none of its own."""
        return batch_statistics(self.layer) if self.expert_statistics == "batch" and images > 1 else nullcontext()

    def masked(self, z_NED: Tensor, own_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mask each image's own expert in features of all of them; -1 in ``own_N`` means that it has none."""
        present_NE = torch.ones(z_NED.shape[:2], dtype=torch.bool, device=z_NED.device)
        if own_N is None or self.mask_mode == "none":
            return z_NED, present_NE
        other_NE = torch.arange(self.num_experts, device=z_NED.device) != own_N.unsqueeze(1)
        return z_NED.where(other_NE.unsqueeze(-1), 0), present_NE if self.mask_mode == "zero" else other_NE

    def target(self, z_NED: Tensor, present_NE: Tensor) -> Tensor:
        """Return what the student's features are to be, [N, D]."""
        target_ND: Tensor = self.aggregator(z_NED, present_NE)
        return target_ND

    # Adaptation ---------------------------------------------------------------------------------------------------

    def adapt(
        self,
        image: Tensor,
        tokens: tuple[Tensor, Tensor] | None = None,
        *,
        start: Weights | None = None,
        train: bool = False,
    ) -> Weights:
        """Return the student's weights adapted to the domain of unlabelled support images; the student stays.

        Args:
            image: [S, C, H, W].
            tokens: features of the experts and who is present, where they are known; None asks the experts.
            start: where the steps start; None means the student's own weights.
            train: keep the graph, see `InnerStep`.
        """
        with torch.set_grad_enabled(train and torch.is_grad_enabled()):
            target_SD = self.target(*(self.tokens(image) if tokens is None else tokens))
        weights: Weights = self.step(self.student.backbone, image, target_SD, start=start, train=train)
        return weights


def _fast(image: Tensor) -> Tensor:
    """The layout in which convolution and pooling take half the time on a CPU; second derivatives gain nothing."""
    return image.contiguous(memory_format=torch.channels_last)


def _bank(backbones: Sequence[Backbone], facts: dict[str, Any], outputs: int) -> tuple[MoELayer, nn.ModuleList]:
    """The layer that runs all experts, frozen, and their heads."""
    widths = sorted({backbone.dim for backbone in backbones})
    if len(widths) > 1:
        raise ValueError(f"experts of widths {widths} cannot be aggregated; give all the same number of features")
    layer = meta_dmoe(specialists=backbones, out_dim=widths[0])(int(facts["channels"]))
    heads = nn.ModuleList([nn.Linear(widths[0], outputs) for _ in backbones])
    return cast(MoELayer, layer), heads.requires_grad_(False)
