# SPDX-License-Identifier: Apache-2.0
"""Routers of ProMoE's rivals as factories, width in, router out; any of them goes under the conditional split.

What the core has is composed here, DiffMoE's router is next door; new are the routers guided by classes and by clusters
of the paper's ablation. Equations: docs/papers/promoe.md, equations 11 to 16.

Shape legend: N tokens, D width, E experts, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moeapps.moe import (
    ExpertChoice,
    LinearScore,
    MLPScore,
    PrototypeScore,
    Router,
    RouterFactory,
    Score,
    Threshold,
    TopK,
)
from moeapps.moe.ranks import is_spread, rows_of_all_ranks, sum_over_ranks
from moeapps.moe.routers.choose import Weighing
from moeapps.moe.routers.choose_batch import BatchWeighing
from moeapps.moe.routers.chooser import is_recomputed
from moeapps.moe.routers.router import only_rows
from moeapps.moe.routers.score import Features
from tasks.image_diffusion.rivals.diffmoe import NORMAL_STD, DiffMoERouter

# --- compositions of the core -----------------------------------------------------------------------------------------


def token_choice(*, num_experts: int = 8, top_k: int = 1, weighing: Weighing = "softmax") -> RouterFactory:
    """TC (DiT-MoE): softmax of a linear score, top-k per token, weights as they are.

    Args:
        num_experts: E.
        top_k: experts per token.
        weighing: of the score.
    """
    return lambda dim: Router(LinearScore(dim, num_experts), TopK(top_k, weighing=weighing, renormalise=False))


def expert_choice(
    *, num_experts: int = 8, capacity: float = 1.0, pool: Literal["image", "batch"] = "image"
) -> RouterFactory:
    """EC (EC-DiT): each expert takes its best tokens by softmax score, of every image or of the batch.

    Args:
        num_experts: E.
        capacity: C, mean number of experts per token.
        pool: among which tokens an expert chooses; ``batch`` makes an image depend on its mates.
    """
    per: Literal["group", "batch"] = "group" if pool == "image" else "batch"
    return lambda dim: Router(LinearScore(dim, num_experts, init_std=NORMAL_STD), ExpertChoice(capacity, per=per))


def expert_race(
    *, num_experts: int = 8, capacity: float = 1.0, weighing: BatchWeighing = "identity", decay: float = 0.95
) -> RouterFactory:
    """Expert Race: the K N largest of all N E logits of the batch; in evaluation those above a running threshold.

    The per-layer head that predicts the target from the router's hidden state is left out (its weight is not known).

    Args:
        num_experts: E.
        capacity: K, mean number of experts per token.
        weighing: of the logits (paper: identity).
        decay: of the threshold (not known; 0.95 and 0.99 in re-implementations).
    """
    return lambda dim: Router(
        MLPScore(dim, dim, num_experts), Threshold(capacity, scope="pairs", weighing=weighing, decay=decay)
    )


def dsmoe(*, num_experts: int = 16, top_k: int = 2, scale: float = 2.0) -> RouterFactory:
    """DSMoE: sigmoid scores, top-k, renormalised over the chosen and scaled.

    Args:
        num_experts: E.
        top_k: experts per token, at least 2.
        scale: factor on the weights (released code: 2.0 to 2.5).
    """
    return lambda dim: Router(
        LinearScore(dim, num_experts),
        TopK(top_k, weighing="sigmoid", renormalise=True, scale=scale, balance_bias=True),
    )


def prototypes(*, num_experts: int = 12, top_k: int = 1, weighing: Weighing = "identity") -> RouterFactory:
    """ProMoE's own: cosine to prototypes, top-k per token.

    Args:
        num_experts: E.
        top_k: experts per token.
        weighing: identity (paper), softmax or sigmoid of the cosines.
    """
    return lambda dim: Router(PrototypeScore(dim, num_experts), TopK(top_k, weighing=weighing, renormalise=False))


# --- DiffMoE ----------------------------------------------------------------------------------------------------------


def diffmoe(
    *, num_experts: int = 8, capacity: float = 1.0, evaluation: Literal["token", "batch"] = "token"
) -> RouterFactory:
    """DiffMoE's router, see `DiffMoERouter`; needs `CapacityLoss` among the auxiliary losses.

    Args:
        num_experts: E.
        capacity: C, mean number of experts per token.
        evaluation: ``token`` depends on no other token; ``batch`` is the published one.
    """
    return lambda dim: DiffMoERouter(dim, num_experts, capacity=capacity, evaluation=evaluation)


# --- guided by classes ------------------------------------------------------------------------------------------------


class ClassTable(nn.Module):
    """Base of modules that need the table from class to super-class; the task sets it from the facts.

    Attributes:
        table: int64 [K]; empty until then.
    """

    table: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("table", torch.empty(0, dtype=torch.int64), persistent=False)

    def use_superclasses(self, superclass: Sequence[int]) -> None:
        """Take the super-class of each class."""
        self.table = torch.tensor(list(superclass), dtype=torch.int64, device=self.table.device)


def superclass_of(table_K: Tensor, group_N: Tensor) -> Tensor:
    """Super-class of the class that a group id stands for, which is the id modulo K (`DiT.groups`)."""
    if not len(table_K):
        raise ValueError("no table of super-classes was given; build the task with facts['superclass']")
    return table_K[group_N.remainder(len(table_K))]


class ClassTableScore(ClassTable, Score):
    """Control: each super-class has its own expert, super-class modulo E; no parameter, no look at the token."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)

    def forward(self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """One-hot logits [N, E] of the groups."""
        if group is None:
            raise ValueError("ClassTableScore routes by class, but group=None; pass group=ids to the layer")
        assert isinstance(features, Tensor)
        expert_N = superclass_of(self.table, group) % self.num_outputs
        return nn.functional.one_hot(expert_N, self.num_outputs).to(features.dtype)


def class_domain(*, num_experts: int = 6) -> RouterFactory:
    """Control: the expert is the super-class (by default the domain) of the image's class.

    Args:
        num_experts: E.
    """
    return lambda dim: Router(ClassTableScore(num_experts), TopK(1, weighing="ones"))


class PooledScore(Score):
    """Linear logits of the mean token of each image: all tokens of an image go the same way.

    Args:
        dim: width D.
        num_experts: E.

    Shape:
        features [N, D] and group int64 [N], one id per image -> logits [N, E]. Masked tokens are in no mean.

    Source: ProMoE's ablation "classification routing" (docs/papers/promoe.md, equation 16).
    """

    reads_mask: ClassVar[bool] = True

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.linear = LinearScore(dim, num_experts, bias=True)

    def forward(
        self,
        features: Features,
        *,
        group: Tensor | None = None,
        state: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [N, E], equal for the tokens of an image."""
        if group is None:
            raise ValueError("PooledScore reads the mean token of an image; pass group=ids to the layer")
        assert isinstance(features, Tensor)
        ids, image_N = torch.unique(group, return_inverse=True)
        counted_N = features.new_ones(len(features)) if token_mask is None else token_mask.to(features.dtype)
        sum_GD = features.new_zeros(len(ids), features.shape[1]).index_add(0, image_N, only_rows(features, token_mask))
        mean_GD = sum_GD / counted_N.new_zeros(len(ids)).index_add(0, image_N, counted_N).clamp_min(1).unsqueeze(-1)
        return self.linear.forward(mean_GD).index_select(0, image_N)


def class_supervised(*, num_experts: int = 6) -> RouterFactory:
    """Routing of whole images by a classifier of their mean token; needs `SuperclassLoss`.

    Args:
        num_experts: E, also the number of super-classes (more wrap around).
    """

    def build(dim: int) -> Router:
        router = Router(PooledScore(dim, num_experts), TopK(1, weighing="ones"))
        router.pool = "group"  # rows do not compete, but all of an image decide together
        return router

    return build


# --- guided by clusters -----------------------------------------------------------------------------------------------


class KMeansScore(Score):
    r"""Minus the squared distance to centroids that follow their tokens: one step of k-means per training batch.

    Centroids start as random tokens of the first batch. After every training pass each becomes the mean of its tokens,
    over all processes and without masked ones; one without tokens stays. No gradient.

    Args:
        dim: width D.
        num_experts: E, centroids.
        conditional_only: let only tokens of images with a class (group >= 0) move centroids; for use under the split.

    Source: ProMoE's ablation "k-means routing" (docs/papers/promoe.md, equation 16).
    """

    reads_mask: ClassVar[bool] = True
    centroids: Tensor
    started: Tensor

    def __init__(self, dim: int, num_experts: int, *, conditional_only: bool = False) -> None:
        super().__init__(num_experts)
        self.conditional_only = conditional_only
        self.register_buffer("centroids", torch.zeros(num_experts, dim))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def forward(
        self,
        features: Features,
        *,
        group: Tensor | None = None,
        state: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [N, E], at most 0; moves the centroids in training."""
        assert isinstance(features, Tensor)
        x_ND, own_N = features.detach(), token_mask
        if self.conditional_only and group is not None:
            own_N = group >= 0 if own_N is None else own_N & (group >= 0)
        own_ND = x_ND if own_N is None else x_ND[own_N]
        moves = self.training and not is_recomputed()
        if moves and not self.started:
            self._start(rows_of_all_ranks(own_ND))
        logits_NE = -torch.cdist(x_ND, self.centroids.to(x_ND.dtype)).square()
        if moves:
            nearest_N = torch.cdist(own_ND, self.centroids.to(x_ND.dtype)).argmin(-1)
            nearest_NE = nn.functional.one_hot(nearest_N, self.num_outputs).to(x_ND.dtype)
            count_E1 = sum_over_ranks(nearest_NE.sum(0)).unsqueeze(-1)
            mean_ED = sum_over_ranks(nearest_NE.T @ own_ND) / count_E1.clamp_min(1)
            self.centroids.copy_(mean_ED.where(count_E1 > 0, self.centroids.to(x_ND.dtype)))
        return logits_NE

    def _start(self, own_ND: Tensor) -> None:
        """Random tokens as centroids, those that process 0 draws; without a token wait for the next batch."""
        if not len(own_ND):
            return
        chosen = torch.randint(len(own_ND), (self.num_outputs,), device=own_ND.device)
        if len(own_ND) >= self.num_outputs:
            chosen = torch.randperm(len(own_ND), device=own_ND.device)[: self.num_outputs]
        self.centroids.copy_(own_ND[chosen])
        if is_spread():
            torch.distributed.broadcast(self.centroids, 0)
        self.started.fill_(True)


def k_means(*, num_experts: int = 6, conditional_only: bool = True) -> RouterFactory:
    """Nearest of E moving centroids, weight 1.

    Args:
        num_experts: E.
        conditional_only: see `KMeansScore`; true under the conditional split.
    """
    return lambda dim: Router(
        KMeansScore(dim, num_experts, conditional_only=conditional_only), TopK(1, weighing="ones")
    )
