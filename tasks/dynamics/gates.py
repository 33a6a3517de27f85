# SPDX-License-Identifier: Apache-2.0
"""Gates over contexts: the fitted one of MixER, its naive rivals and the oracle. Each is ``factory(context_dim)``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeapps.moe import (
    ConstantScore,
    Dense,
    FittedRouter,
    LinearScore,
    LowestLoss,
    PublishedKMeans,
    RobustKMeans,
    Router,
    RouterBase,
    TableScore,
    TopK,
)

GateFactory = Callable[[int, int], RouterBase]
"""``factory(context_dim, num_experts)``."""


def published(*, noise: float = 1e-4, max_rounds: int = 20, tol: float = 1e-4) -> GateFactory:
    """MixER's gate as published: K-means that starts near 0 or warm and gives up easily, greedy match, least squares.

    Args:
        noise: standard deviation added to the contexts before the fit.
        max_rounds: K-means rounds.
        tol: absolute tolerance on the centroids.
    """

    def build(context_dim: int, num_experts: int) -> FittedRouter:
        return FittedRouter(context_dim, num_experts, PublishedKMeans(max_rounds, tol), noise=noise)

    return build


def robust(
    *,
    noise: float = 1e-4,
    restarts: int = 8,
    max_rounds: int = 20,
    hysteresis: float = 0.1,
    freeze_after: int | None = 100,
    warmup: int = 0,
) -> GateFactory:
    """Our variant: K-means++ restarts beside the warm start, optimal match, hysteresis, freeze; never gives up.

    An expert reads a piece of the context of its own, so only the chosen expert's piece is trained and contexts cluster
    by expert, whatever the families are. ``warmup`` breaks that circle.

    Args:
        noise: standard deviation added to the contexts before the fit.
        restarts: K-means++ starts per fit.
        max_rounds: K-means rounds.
        hysteresis: share by which a restart must beat the old partition.
        freeze_after: equal partitions in a row after which it stays; None never freezes.
        warmup: number of the first fit that is made; before it, environments go to experts drawn at random.
    """

    def build(context_dim: int, num_experts: int) -> FittedRouter:
        partition = RobustKMeans(restarts, max_rounds, hysteresis, freeze_after)
        return FittedRouter(context_dim, num_experts, partition, noise=noise, warmup=warmup)

    return build


def hard_em(*, noise: float = 1e-4) -> GateFactory:
    """Rival: every environment to the expert with the lowest loss, then least squares; experts may idle.

    Args:
        noise: standard deviation added to the contexts before the fit.
    """

    def build(context_dim: int, num_experts: int) -> FittedRouter:
        return FittedRouter(context_dim, num_experts, LowestLoss(), noise=noise)

    return build


def frozen() -> GateFactory:
    """Rival: a random linear gate that nothing trains; what the published code's gradient gate amounts to."""

    def build(context_dim: int, num_experts: int) -> Router:
        score = LinearScore(context_dim, num_experts, bias=True).requires_grad_(False)
        return Router(score, TopK(1, weighing="ones"))

    return build


def switch() -> GateFactory:
    """Rival: top-1, the field scaled by the gate's probability, so that the gate learns by gradient."""

    def build(context_dim: int, num_experts: int) -> Router:
        return Router(LinearScore(context_dim, num_experts, bias=True), TopK(1))

    return build


def soft() -> GateFactory:
    """Rival: the softmax-weighted sum of all fields, at K times the cost."""

    def build(context_dim: int, num_experts: int) -> Router:
        return Router(LinearScore(context_dim, num_experts, bias=True), Dense())

    return build


def single() -> GateFactory:
    """One expert for all: an ordinary meta-learner.

    Raises:
        ValueError: more than one expert.
    """

    def build(context_dim: int, num_experts: int) -> Router:
        if num_experts != 1:
            raise ValueError(
                f"the gate 'single' serves one expert, but num_experts={num_experts}; use 1 or another gate"
            )
        return Router(ConstantScore(1), TopK(1, weighing="ones"))

    return build


def by_group() -> GateFactory:
    """Control: the expert with the number of the group that the network names (family or environment), modulo K."""

    def build(context_dim: int, num_experts: int) -> Router:
        return Router(TableScore(torch.eye(num_experts)), TopK(1, weighing="ones"))

    return build
