# SPDX-License-Identifier: Apache-2.0
"""A router without a gradient: a linear gate that is fitted to a partition of the rows by least squares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.routers.choose import TopK
from moeapps.moe.routers.router import Router
from moeapps.moe.routers.score import Features, LinearScore
from moeapps.moe.routing import Routing


class Partition(nn.Module):
    """Base: features [N, D] and losses [N, E] -> the expert of each row, int64 [N], or None to keep the gate.

    Attributes:
        labels: int64 [N], the experts that the last successful call gave; empty before it.
        calls: how often it was called, int64.
        abandoned: how many of these calls gave up, int64.

    Example:
        >>> from moeapps.moe import LowestLoss
        >>> isinstance(LowestLoss(), Partition)
        True
    """

    labels: Tensor
    calls: Tensor
    abandoned: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("abandoned", torch.zeros((), dtype=torch.int64))

    @property
    def needs_losses(self) -> bool:
        """Whether the next call reads the losses (they cost a solve with every expert)."""
        return True

    def partition(self, features_ND: Tensor, losses_NE: Tensor | None) -> Tensor | None:
        """What a subclass decides; see the class."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, features_ND: Tensor, losses_NE: Tensor | None = None) -> Tensor | None:
        """The expert of each row, or None.

        Args:
            features_ND: what is routed on.
            losses_NE: loss of row n under expert e alone; not finite counts as very large. May be None where
                ``needs_losses`` is False.

        Raises:
            ValueError: fewer rows than experts.
        """
        if losses_NE is not None:
            if features_ND.shape[0] < losses_NE.shape[1]:
                raise ValueError(
                    f"{features_ND.shape[0]} rows cannot be divided among {losses_NE.shape[1]} experts without an "
                    "idle one; use fewer experts or more rows."
                )
            losses_NE = losses_NE.nan_to_num(nan=1e30, posinf=1e30).clamp(max=1e30)
        self.calls += 1
        labels_N = self.partition(features_ND, losses_NE)
        if labels_N is None:
            self.abandoned += 1
        else:
            self.labels = labels_N
        return labels_N

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take over the number of rows: it is known only after the first call."""
        for name, buffer in self._buffers.items():
            stored = state_dict.get(prefix + name)
            if buffer is not None and stored is not None and stored.shape != buffer.shape:
                self._buffers[name] = torch.empty_like(stored, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class LowestLoss(Partition):
    """Hard expectation-maximisation: each row goes to the expert under which its loss is lowest; experts may idle.

    Example:
        >>> LowestLoss()(torch.zeros(2, 1), torch.tensor([[0.0, 1.0], [2.0, 1.0]])).tolist()
        [0, 1]
    """

    @override
    def partition(self, features_ND: Tensor, losses_NE: Tensor | None) -> Tensor | None:
        assert losses_NE is not None
        return losses_NE.argmin(1)


class FittedRouter(Router):
    r"""Top-1 of :math:`[x, 1] W` with weight 1, where :math:`W` is the least-squares fit to a partition of the rows.

    Call :meth:`fit` every few steps (the callback ``RouterFit`` does). Without it the router is a frozen random gate.

    Features that are trained through the experts they are sent to tend to cluster by expert, so that a first partition
    made by chance confirms itself. With ``warmup`` every expert sees every row before the first partition is made.

    Args:
        dim: width of the features.
        num_experts: E.
        partition: says which row belongs to which expert.
        noise: standard deviation added to the features before the fit.
        warmup: number of the first fit that is made; before it, rows in training mode go to experts drawn at random.

    Shape:
        features [N, dim] -> a routing with one expert of weight 1 per row; ties go to the lowest index.

    Raises:
        ValueError: noise or warmup below 0, or losses that do not fit the features and experts (in ``fit``).

    Source: MixER (docs/papers/mixer.md, equations 1 and 11); ``warmup`` is ours.

    Example:
        >>> from moeapps.moe import FittedRouter, LowestLoss
        >>> router = FittedRouter(2, 2, LowestLoss(), noise=0.0)
        >>> router.fit(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        True
        >>> router(torch.eye(2)).expert_M.tolist()
        [0, 1]
    """

    score: LinearScore
    calls: Tensor

    def __init__(
        self, dim: int, num_experts: int, partition: Partition, *, noise: float = 1e-4, warmup: int = 0
    ) -> None:
        if not noise >= 0 or warmup < 0:
            raise ValueError(f"noise={noise} and warmup={warmup}, but both must be 0 or more.")
        score = LinearScore(dim, num_experts, bias=True).requires_grad_(False)
        super().__init__(score, TopK(1, weighing="ones"))
        self.partition = partition
        self.noise_std, self.warmup = noise, warmup
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    @property
    def needs_losses(self) -> bool:
        """Whether the next fit reads the losses."""
        return int(self.calls) + 1 >= self.warmup and self.partition.needs_losses

    @override
    def forward(self, features: Features, **given: Tensor | None) -> Routing:
        routing = super().forward(features, **given)
        assert isinstance(routing, Routing)
        if not (self.warmup and self.training) or int(self.calls) >= self.warmup:  # no warm-up, no look at the device
            return routing
        drawn_M = torch.randint(self.num_experts, routing.expert_M.shape, device=routing.expert_M.device)
        return replace(routing, expert_M=drawn_M.where(routing.expert_M < self.num_experts, self.num_experts))

    @torch.no_grad()
    def fit(self, features: Tensor, losses: Tensor | None = None) -> bool:
        """Partition the rows and fit the gate to it; tell whether that was done (or abandoned, or is too early).

        Args:
            features: [N, dim].
            losses: [N, E], loss of row n under expert e alone; None where ``needs_losses`` is False.
        """
        wanted = (features.shape[0], self.num_experts)
        if losses is not None and tuple(losses.shape) != wanted:
            raise ValueError(f"losses are {tuple(losses.shape)}, but they must be {wanted}: rows by experts.")
        self.calls += 1
        if int(self.calls) < self.warmup:
            return False
        labels_N = self.partition(features.detach(), losses)
        if labels_N is None:
            return False
        targets_NE = F.one_hot(labels_N, self.num_experts)
        self.score.fit(features.detach(), targets_NE, noise=self.noise_std)
        return True
