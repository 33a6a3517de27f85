# SPDX-License-Identifier: Apache-2.0
"""Naive rivals of MixER's gate, one expert for all, and the oracle. Each is ``factory(context_dim, num_experts)``."""

from __future__ import annotations

import torch

from moeapps.moe import ConstantScore, Dense, FittedRouter, LinearScore, LowestLoss, Router, TableScore, TopK
from tasks.dynamics.nets.gates import GateFactory


def hard_em(*, noise: float = 1e-4) -> GateFactory:
    """Rival: every environment goes to the expert with the lowest loss, then least squares; experts may be unused.

    Args:
        noise: standard deviation added to the contexts before the fit.
    """
    return lambda context_dim, num_experts: FittedRouter(context_dim, num_experts, LowestLoss(), noise=noise)


def frozen() -> GateFactory:
    """Rival: a random linear gate that is never trained; the gradient gate of the published code amounts to this."""

    def build(context_dim: int, num_experts: int) -> Router:
        score = LinearScore(context_dim, num_experts, bias=True).requires_grad_(False)
        return Router(score, TopK(1, weighing="ones"))

    return build


def switch() -> GateFactory:
    """Rival: the top-1 expert, with its field scaled by the gate's probability, so that the gate learns by gradient."""
    return lambda context_dim, num_experts: Router(LinearScore(context_dim, num_experts, bias=True), TopK(1))


def soft() -> GateFactory:
    """Rival: the softmax-weighted sum of all fields, at E times the cost."""
    return lambda context_dim, num_experts: Router(LinearScore(context_dim, num_experts, bias=True), Dense())


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
    """Control: a row with group g (family or environment) goes to expert g modulo E."""
    return lambda context_dim, num_experts: Router(TableScore(torch.eye(num_experts)), TopK(1, weighing="ones"))
