# SPDX-License-Identifier: Apache-2.0
"""Contexts for environments that were never trained on; weights, gate and training contexts stay as they are.

Environments do not see each other: losses are summed, not averaged, and Adam is elementwise, so adapting all at once
(bulk) gives the contexts of adapting them one by one (sequential).

Shape letters: S environments, E experts, B candidate experts, c context width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from moeapps.moe import DenseRouting
from moeapps.moe.routing import AnyRouting
from tasks.dynamics.data.batch import Trajectories
from tasks.dynamics.model import MixER


@dataclass(frozen=True)
class Adapted:
    """What adaptation found.

    Attributes:
        context: [S, c].
        expert: int64 [S], the expert that serves each environment.
        support_loss: [S], error one sample ahead on the support, over the mean squared increment.
        gate_agrees: bool [S], whether the gate sends the new context to that expert.
    """

    context: Tensor
    expert: Tensor
    support_loss: Tensor
    gate_agrees: Tensor


class Adaptation:
    """Base: gradient steps on fresh contexts of the support trajectories, all environments at once or one by one.

    Args:
        steps: Adam steps on the contexts.
        lr: their step size.
        loss: ``shooting``, one sample ahead of every sample; ``rollout``, whole trajectories (published).
        sequential: adapt one environment after the other; the contexts are the same.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        steps: int = 200,
        lr: float = 0.02,
        loss: Literal["shooting", "rollout"] = "shooting",
        sequential: bool = False,
    ) -> None:
        if steps < 0 or not lr > 0 or loss not in ("shooting", "rollout"):
            raise ValueError(f"steps={steps}, lr={lr}, loss={loss!r}: use 0 or more, above 0, shooting or rollout")
        self.steps, self.lr, self.loss, self.sequential = steps, lr, loss, sequential

    def adapt(self, net: MixER, support: Trajectories, groups_S: Tensor) -> Adapted:
        """Adapt all environments at once; a subclass defines how."""
        raise NotImplementedError

    def __call__(self, net: MixER, support: Trajectories, groups_S: Tensor) -> Adapted:
        """Find contexts for the environments of ``support``.

        Args:
            net: the trained network; nothing in it changes.
            support: observed trajectories of the new environments.
            groups_S: groups of the trained environments (for oracle gates), in the order of their numbers.
        """
        if not self.sequential:
            return self.adapt(net, support, groups_S)
        parts = [self.adapt(net, support.environments(torch.tensor([e])), groups_S) for e in range(len(support.x))]
        return Adapted(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Adapted)))

    def descend(
        self, net: MixER, data: Trajectories, start_Sc: Tensor, route: Callable[[Tensor], AnyRouting], steps: int
    ) -> Tensor:
        """Contexts after Adam steps from ``start_Sc``; a context whose gradient is not finite stays for that step."""
        with torch.enable_grad():
            context_Sc = start_Sc.detach().clone().requires_grad_()
            optimizer = torch.optim.Adam([context_Sc], lr=self.lr)
            for _ in range(steps):
                loss = net.errors(data, context_Sc, route(context_Sc), rollout=self.loss == "rollout").sum()
                (gradient,) = torch.autograd.grad(loss, [context_Sc], allow_unused=True)
                if gradient is None:
                    break  # experts that read no context
                context_Sc.grad = gradient.where(gradient.isfinite().all(1, keepdim=True), 0)
                optimizer.step()
        return context_Sc.detach()


class FromZeros(Adaptation):
    """The published way: contexts start at 0 and the gate chooses in every step, so all start with the same expert."""

    def adapt(self, net: MixER, support: Trajectories, groups_S: Tensor) -> Adapted:
        """Descend from 0 under the gate."""
        group_S = net.group(support)

        def route(context_Sc: Tensor) -> AnyRouting:
            routing: AnyRouting = net.layer.router(context_Sc, group=group_S)
            return routing

        start_Sc = torch.zeros(len(support.x), net.context_dim, device=support.x.device)
        context_Sc = self.descend(net, support, start_Sc, route, self.steps)
        with torch.no_grad():
            loss_S = net.errors(support, context_Sc, route(context_Sc), rollout=False)
            expert_S = net.best_experts(context_Sc, group_S)
        return Adapted(context_Sc, expert_S, loss_S, torch.ones_like(expert_S, dtype=torch.bool))


class TryExperts(Adaptation):
    """Ours: try every expert from the mean context of its environments, keep the best, then ask the gate.

    All candidates take ``warmup`` steps; the one with the lowest support loss takes the rest. If the gate then names
    another expert, the one with the lower support loss serves. A dense mixture has candidates that differ only in
    where they start.

    Args:
        warmup: share of the steps that every candidate takes, in [0, 1].
        options: see :class:`Adaptation`.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(self, *, warmup: float = 0.25, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup={warmup} is a share of the steps and must lie in [0, 1]")
        self.warmup = round(warmup * self.steps)

    def adapt(self, net: MixER, support: Trajectories, groups_S: Tensor) -> Adapted:
        """Try, keep, confirm."""
        S = len(support.x)
        busy_B, starts_Bc = net.expert_starts(groups_S)
        B = len(busy_B)
        every = support.environments(torch.arange(S, device=busy_B.device).repeat(B))  # candidate by candidate
        expert = busy_B.repeat_interleave(S)
        context = self.descend(
            net, every, starts_Bc.repeat_interleave(S, 0), lambda c: net.route_to(expert, c), self.warmup
        )
        best_S = _finite(self._loss(net, every, context, expert)).view(B, S).argmin(0)
        kept_S = busy_B[best_S]
        start_Sc = context.view(B, S, -1)[best_S, torch.arange(S, device=best_S.device)]
        rest = self.steps - self.warmup
        context_Sc = self.descend(net, support, start_Sc, lambda c: net.route_to(kept_S, c), rest)
        return self._confirm(net, support, context_Sc, kept_S)

    def _confirm(self, net: MixER, support: Trajectories, context_Sc: Tensor, kept_S: Tensor) -> Adapted:
        """Ask the gate for an expert; where it disagrees, the expert with the lower support loss is kept."""
        with torch.no_grad():
            named_S = net.best_experts(context_Sc, net.group(support))
            if isinstance(net.layer.router(context_Sc, group=net.group(support)), DenseRouting):
                kept_S = named_S
            kept_loss_S = self._loss(net, support, context_Sc, kept_S)
            named_loss_S = self._loss(net, support, context_Sc, named_S)
        better_S = _finite(named_loss_S) < _finite(kept_loss_S)
        expert_S = torch.where(better_S, named_S, kept_S)
        return Adapted(context_Sc, expert_S, torch.where(better_S, named_loss_S, kept_loss_S), expert_S == named_S)

    @torch.no_grad()
    def _loss(self, net: MixER, data: Trajectories, context: Tensor, expert: Tensor) -> Tensor:
        return net.errors(data, context, net.route_to(expert, context), rollout=False)


def _finite(loss: Tensor) -> Tensor:
    return loss.nan_to_num(nan=torch.inf)
