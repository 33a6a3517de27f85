# SPDX-License-Identifier: Apache-2.0
"""Proximal alternating minimisation: which step moves what, and which environments it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Phase = Literal["context", "model"]


@dataclass
class Alternation:
    """Proximal alternating minimisation: some steps on the contexts, then some on the weights, and so on.

    Args:
        context_steps: steps on the contexts per round (published: 12).
        model_steps: steps on weights and gate per round (published: 12).
        prox: beta of both proximal terms, beta/2 times the mean squared distance to the start of the round (10).
        contributors: environments per step: one drawn and its nearest by context (published: as many as a family has);
            None takes all of the batch.
        context_l1: weight of the mean absolute context in the loss.
        rollout_share: last share of the steps that train on whole roll-outs; before, on single steps from every
            observed sample (multiple shooting). 1 is the published way.
        max_grad_norm: gradients of a step are scaled down to this norm; None never.
        max_skipped: steps in a row whose loss or gradient is not finite before training stops.
    """

    context_steps: int = 6
    model_steps: int = 6
    prox: float = 10.0
    contributors: int | None = None
    context_l1: float = 0.0
    rollout_share: float = 0.1
    max_grad_norm: float | None = 10.0
    max_skipped: int = 50

    def __post_init__(self) -> None:
        if self.context_steps < 1 or self.model_steps < 1 or self.max_skipped < 1:
            raise ValueError(
                f"context_steps={self.context_steps}, model_steps={self.model_steps}, max_skipped={self.max_skipped}: "
                "each must be 1 or more"
            )
        if self.prox < 0 or self.context_l1 < 0 or not 0 <= self.rollout_share <= 1:
            raise ValueError(
                f"prox={self.prox} and context_l1={self.context_l1} must be 0 or more, rollout_share="
                f"{self.rollout_share} lie in [0, 1]"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be above 0, or None for no limit")
        if self.contributors is not None and self.contributors < 1:
            raise ValueError(
                f"contributors={self.contributors}: a step needs at least one environment, or None for all"
            )

    def phase(self, step: int) -> Phase:
        """What step ``step`` (from 0) changes."""
        return "context" if step % (self.context_steps + self.model_steps) < self.context_steps else "model"

    def begins(self, step: int) -> bool:
        """Whether a round begins with step ``step``."""
        return step % (self.context_steps + self.model_steps) == 0

    @torch.no_grad()
    def chosen(self, context_Sc: Tensor) -> Tensor | None:
        """Rows of one environment and its nearest by mean absolute context distance, int64, rising; None for all."""
        if self.contributors is None or self.contributors >= len(context_Sc):
            return None
        first = int(torch.randint(len(context_Sc), ()))
        distance_S = (context_Sc - context_Sc[first]).abs().mean(1)
        distance_S[first] = -1.0  # all distances are 0 at the start; a random order keeps families from coming in turn
        order_S = torch.randperm(len(distance_S), device=distance_S.device)
        nearest = order_S[distance_S[order_S].argsort(stable=True)[: self.contributors]]
        return nearest.sort().values
