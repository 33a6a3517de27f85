# SPDX-License-Identifier: Apache-2.0
"""Routers of ProMoE's rivals as factories, width in, router out; any of them goes under the conditional split.

What the core has is composed here; new are the capacity predictor of DiffMoE, and the routers guided by classes and by
clusters of the paper's ablation. Equations: promoe card, sections 2.5 and 8.

Shape legend: N tokens, D width, E experts, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moeapps.moe import (
    ExpertChoice,
    LinearScore,
    MLPScore,
    PrototypeScore,
    Router,
    RouterFactory,
    Routing,
    Score,
    Threshold,
    TopK,
)
from moeapps.moe.routers.choose import Weighing
from moeapps.moe.routers.choose_batch import BatchWeighing
from moeapps.moe.routers.chooser import Pool, pairs_to_routing
from moeapps.moe.routers.router import RouterBase, device_of, full_precision, without_autocast
from moeapps.moe.routers.score import Features

NORMAL_STD = 0.006
"""Standard deviation of the router weights of EC-DiT and DiffMoE at the start (promoe card 8)."""


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

    def build(dim: int) -> Router:
        per: Literal["group", "batch"] = "group" if pool == "image" else "batch"
        return Router(LinearScore(dim, num_experts, init_std=NORMAL_STD), ExpertChoice(capacity, per=per))

    return build


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

    def build(dim: int) -> Router:
        choose = Threshold(capacity, scope="pairs", weighing=weighing, decay=decay)
        return Router(MLPScore(dim, dim, num_experts), choose)

    return build


def dsmoe(*, num_experts: int = 16, top_k: int = 2, scale: float = 2.0) -> RouterFactory:
    """DSMoE: sigmoid scores, top-k, renormalised over the chosen and scaled.

    Args:
        num_experts: E.
        top_k: experts per token, at least 2.
        scale: factor on the weights (released code: 2.0 to 2.5).
    """

    def build(dim: int) -> Router:
        choose = TopK(top_k, weighing="sigmoid", renormalise=True, scale=scale, balance_bias=True)
        return Router(LinearScore(dim, num_experts), choose)

    return build


def prototypes(*, num_experts: int = 12, top_k: int = 1, weighing: Weighing = "identity") -> RouterFactory:
    """ProMoE's own: cosine to prototypes, top-k per token.

    Args:
        num_experts: E.
        top_k: experts per token.
        weighing: identity (paper), softmax or sigmoid of the cosines.
    """
    return lambda dim: Router(PrototypeScore(dim, num_experts), TopK(top_k, weighing=weighing, renormalise=False))


# --- DiffMoE ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CapacityRouting(Routing):
    """A routing with what a capacity predictor says of each pair.

    Args:
        capacity_NE: its logits [N, E]; None for an empty one.
        counted_N: bool [N], the tokens that were routed; None means all.
    """

    capacity_NE: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    counted_N: Tensor | None = None


class DiffMoERouter(RouterBase):
    r"""Each expert takes its best tokens of the whole batch; a second network learns which, for evaluation.

    Training: expert e takes its :math:`\lfloor N C / E \rfloor` best tokens by softmax score; the predictor's logits
    :math:`c` (of detached tokens) are trained on the selection by `CapacityLoss`, and a threshold follows the k-th
    largest :math:`\sigma(c)`. Evaluation: ``token`` takes the pairs with :math:`\sigma(c)_{ne} > \theta_e`;
    ``batch`` (published) takes the :math:`n_e = \#\{n: \sigma(c)_{ne} > \theta_e\}` best tokens of the batch, so that
    an image depends on its mates.

    Args:
        dim: width D.
        num_experts: E.
        capacity: C, mean number of experts per token in training.
        evaluation: as above.
        decay: of the threshold (DiffMoE: 0.95).

    Source: DiffMoE (promoe card 8): weights N(0, 0.006^2), thresholds start at 0.
    """

    threshold: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        capacity: float = 1.0,
        evaluation: Literal["token", "batch"] = "token",
        decay: float = 0.95,
    ) -> None:
        super().__init__()
        if evaluation not in ("token", "batch") or not capacity > 0 or not 0 <= decay < 1:
            raise ValueError(
                f"evaluation={evaluation!r}, capacity={capacity}, decay={decay}: use token or batch, a capacity above "
                "0 and a decay in [0, 1)"
            )
        self.num_experts, self.capacity, self.evaluation, self.decay = num_experts, capacity, evaluation, decay
        self.pool: Pool = "row" if evaluation == "token" else "batch"
        self.score = LinearScore(dim, num_experts, init_std=NORMAL_STD)
        self.predictor = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, num_experts))
        self.register_buffer("threshold", torch.zeros(num_experts))

    def mean_k(self) -> float | None:
        """The capacity, which training holds."""
        return min(self.capacity, float(self.num_experts))

    def forward(
        self,
        features: Features,
        *,
        state: Tensor | None = None,
        token_mask: Tensor | None = None,
        group: Tensor | None = None,
    ) -> CapacityRouting:
        """The routing of these tokens, with the predictor's logits."""
        assert isinstance(features, Tensor)
        with without_autocast(device_of(features)):
            read = full_precision(features)
            assert isinstance(read, Tensor)
            logits_NE = self.score.forward(read)
            capacity_NE: Tensor = self.predictor(read.detach())
        weight_NE = logits_NE.softmax(-1)
        rank_NE = weight_NE.detach()
        sure_NE = capacity_NE.detach().sigmoid()
        if token_mask is not None:
            rank_NE = rank_NE.masked_fill(~token_mask.unsqueeze(-1), float("-inf"))
            sure_NE = sure_NE.masked_fill(~token_mask.unsqueeze(-1), 0.0)
        taken_NE = self._taken(rank_NE, sure_NE)
        plain = pairs_to_routing(taken_NE, weight_NE, logits_NE, weight_NE)
        shared = {f.name: getattr(plain, f.name) for f in fields(plain)} | {"features_ND": features}
        return CapacityRouting(**shared, capacity_NE=capacity_NE, counted_N=token_mask)

    def _taken(self, rank_NE: Tensor, sure_NE: Tensor) -> Tensor:
        over_NE = sure_NE > self.threshold
        if not self.training and self.evaluation == "token":
            return over_NE & rank_NE.isfinite()
        num_rows = len(rank_NE)
        if self.training:
            k = min(num_rows, max(1, int(num_rows * self.capacity / self.num_experts)))
            count_E = torch.full_like(self.threshold, k, dtype=torch.int64)
            if num_rows and torch._C._current_graph_task_id() == -1:  # not when activations are computed again
                kth_E = sure_NE.sort(dim=0, descending=True).values[k - 1].to(self.threshold.dtype)
                self.threshold.lerp_(kth_E, 1 - self.decay)
        else:
            count_E = over_NE.sum(0)
        order_NE = rank_NE.sort(dim=0, descending=True, stable=True).indices
        place_NE = torch.zeros_like(order_NE).scatter(
            0, order_NE, torch.arange(num_rows, device=order_NE.device).unsqueeze(-1).expand_as(order_NE)
        )
        return (place_NE < count_E) & rank_NE.isfinite()


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
    """Something that needs the data's table from class to super-class; the task hands it over.

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
        features [N, D] and group int64 [N], one id per image -> logits [N, E].

    Source: ProMoE's ablation "classification routing" (promoe card 2.5).
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.linear = LinearScore(dim, num_experts, bias=True)

    def forward(self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """Logits [N, E], equal for the tokens of an image."""
        if group is None:
            raise ValueError("PooledScore reads the mean token of an image; pass group=ids to the layer")
        assert isinstance(features, Tensor)
        ids, image_N = torch.unique(group, return_inverse=True)
        sum_GD = features.new_zeros(len(ids), features.shape[1]).index_add(0, image_N, features)
        mean_GD = sum_GD / torch.bincount(image_N, minlength=len(ids)).clamp_min(1).unsqueeze(-1).to(features.dtype)
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

    Centroids start as random tokens of the first batch. After every training pass each becomes the mean of its tokens;
    one without tokens stays. No gradient.

    Args:
        dim: width D.
        num_experts: E, centroids.
        conditional_only: let only tokens of images with a class (group >= 0) move centroids; for use under the split.

    Source: ProMoE's ablation "k-means routing" (promoe card 2.5).
    """

    centroids: Tensor
    started: Tensor

    def __init__(self, dim: int, num_experts: int, *, conditional_only: bool = False) -> None:
        super().__init__(num_experts)
        self.conditional_only = conditional_only
        self.register_buffer("centroids", torch.zeros(num_experts, dim))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def forward(self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        """Logits [N, E], at most 0; moves the centroids in training."""
        assert isinstance(features, Tensor)
        x_ND = features.detach()
        own_ND = x_ND[group >= 0] if self.conditional_only and group is not None else x_ND
        moves = self.training and len(own_ND) > 0 and torch._C._current_graph_task_id() == -1
        if moves and not self.started:
            chosen = torch.randint(len(own_ND), (self.num_outputs,), device=x_ND.device)
            if len(own_ND) >= self.num_outputs:
                chosen = torch.randperm(len(own_ND), device=x_ND.device)[: self.num_outputs]
            self.centroids.copy_(own_ND[chosen])
            self.started.fill_(True)
        logits_NE = -torch.cdist(x_ND, self.centroids.to(x_ND.dtype)).square()
        if moves:
            nearest_NE = nn.functional.one_hot(self._nearest(own_ND), self.num_outputs).to(x_ND.dtype)
            count_E1 = nearest_NE.sum(0).unsqueeze(-1)
            mean_ED = (nearest_NE.T @ own_ND) / count_E1.clamp_min(1)
            self.centroids.copy_(mean_ED.where(count_E1 > 0, self.centroids.to(x_ND.dtype)))
        return logits_NE

    def _nearest(self, x_ND: Tensor) -> Tensor:
        return torch.cdist(x_ND, self.centroids.to(x_ND.dtype)).argmin(-1)


def k_means(*, num_experts: int = 6, conditional_only: bool = True) -> RouterFactory:
    """Nearest of E moving centroids, weight 1.

    Args:
        num_experts: E.
        conditional_only: see `KMeansScore`; true under the conditional split.
    """
    return lambda dim: Router(
        KMeansScore(dim, num_experts, conditional_only=conditional_only), TopK(1, weighing="ones")
    )
