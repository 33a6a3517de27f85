# SPDX-License-Identifier: Apache-2.0
"""Gates over contexts, fitted and not trained: as published and ours; ``factory(context_dim, num_experts)``."""

from __future__ import annotations

from collections.abc import Callable

from moeapps.moe import FittedRouter, RouterBase
from tasks.dynamics.nets.partition import PublishedKMeans, RobustKMeans

GateFactory = Callable[[int, int], RouterBase]
"""``factory(context_dim, num_experts)``."""


def published(*, noise: float = 1e-4, max_rounds: int = 20, tol: float = 1e-4) -> GateFactory:
    """MixER's gate as published: K-means from near 0 or warm, often abandoned; greedy match; least squares.

    Args:
        noise: standard deviation added to the contexts before the fit.
        max_rounds: K-means rounds.
        tol: absolute tolerance on the centroids.
    """
    return lambda context_dim, num_experts: FittedRouter(
        context_dim, num_experts, PublishedKMeans(max_rounds, tol), noise=noise
    )


def robust(
    *,
    noise: float = 1e-4,
    restarts: int = 8,
    max_rounds: int = 20,
    hysteresis: float = 0.1,
    freeze_after: int | None = 100,
    warmup: int = 0,
) -> GateFactory:
    """Our variant: K-means++ restarts beside the warm start, optimal match, hysteresis, freeze; no fit is abandoned.

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
