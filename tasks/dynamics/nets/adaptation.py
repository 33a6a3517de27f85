# SPDX-License-Identifier: Apache-2.0
"""Contexts for environments that were never trained on; weights, gate and training contexts stay as they are.

Environments do not see each other: losses are summed, not averaged, and Adam is elementwise, so adapting all at once
(bulk) gives the contexts of adapting them one by one (sequential).

Shape letters: E environments, K experts, B candidate experts, d context width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moeapps.moe import DenseRouting
from moeapps.moe.routing import AnyRouting
from tasks.dynamics.data.batch import Trajectories
from tasks.dynamics.model import MixER, scaled_errors


@dataclass(frozen=True)
class Adapted:
    """What adaptation found.

    Attributes:
        context: [E, d].
        expert: int64 [E], the expert that serves each environment.
        support_loss: [E], error one sample ahead on the support, over the mean squared increment.
        gate_agrees: bool [E], whether the gate sends the new context to that expert.
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

    def adapt(self, net: MixER, support: Trajectories, groups_E: Tensor) -> Adapted:
        """What a subclass does with all environments at once."""
        raise NotImplementedError

    def __call__(self, net: MixER, support: Trajectories, groups_E: Tensor) -> Adapted:
        """Find contexts for the environments of ``support``.

        Args:
            net: the trained network; nothing in it changes.
            support: observed trajectories of the new environments.
            groups_E: groups of the trained environments (for oracle gates), in the order of their numbers.
        """
        if not self.sequential:
            return self.adapt(net, support, groups_E)
        parts = [self.adapt(net, support.environments(torch.tensor([e])), groups_E) for e in range(len(support.x))]
        return Adapted(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("context", "expert", "support_loss", "gate_agrees")
            )
        )

    def errors(self, net: MixER, data: Trajectories, context_Ed: Tensor, routing: AnyRouting) -> Tensor:
        """The loss of each environment, [E]."""
        if self.loss == "rollout":
            return scaled_errors(net.rollout(data, context_Ed, routing), data.x, data.mask, data.scale)
        return scaled_errors(*net.shoot(data, context_Ed, routing), data.scale)

    def descend(
        self, net: MixER, data: Trajectories, start_Ed: Tensor, route: Callable[[Tensor], AnyRouting], steps: int
    ) -> Tensor:
        """Contexts after Adam steps from ``start_Ed``; a context whose gradient is not finite stays for that step."""
        with torch.enable_grad():
            context_Ed = start_Ed.detach().clone().requires_grad_()
            optimizer = torch.optim.Adam([context_Ed], lr=self.lr)
            for _ in range(steps):
                loss = self.errors(net, data, context_Ed, route(context_Ed)).sum()
                (gradient,) = torch.autograd.grad(loss, [context_Ed], allow_unused=True)
                if gradient is None:
                    break  # experts that read no context
                context_Ed.grad = gradient.where(gradient.isfinite().all(1, keepdim=True), 0)
                optimizer.step()
        return context_Ed.detach()


class FromZeros(Adaptation):
    """The published way: contexts start at 0 and the gate decides at every step, so all begin with one expert.

    Args:
        steps: Adam steps on the contexts.
        lr: their step size.
        loss: see :class:`Adaptation`.
        sequential: see :class:`Adaptation`.
    """

    def adapt(self, net: MixER, support: Trajectories, groups_E: Tensor) -> Adapted:
        """Descend from 0 under the gate."""
        group_E = net.group(support)

        def route(context_Ed: Tensor) -> AnyRouting:
            routing: AnyRouting = net.layer.router(context_Ed, group=group_E)
            return routing

        start_Ed = torch.zeros(len(support.x), net.context_dim, device=support.x.device)
        context_Ed = self.descend(net, support, start_Ed, route, self.steps)
        with torch.no_grad():
            loss_E = scaled_errors(*net.shoot(support, context_Ed, route(context_Ed)), support.scale)
            expert_E = net.best_experts(context_Ed, group_E)
        return Adapted(context_Ed, expert_E, loss_E, torch.ones_like(expert_E, dtype=torch.bool))


class TryExperts(Adaptation):
    """Ours: try every expert from the mean context of its environments, keep the best, then ask the gate.

    All candidates take ``warmup`` steps; the one with the lowest support loss takes the rest. If the gate then names
    another expert, the one with the lower support loss serves. A dense mixture has candidates that differ only in
    where they start.

    Args:
        steps: Adam steps on the contexts in all.
        lr: their step size.
        loss: see :class:`Adaptation`.
        sequential: see :class:`Adaptation`.
        warmup: share of the steps that every candidate takes, in [0, 1].

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        steps: int = 200,
        lr: float = 0.02,
        loss: Literal["shooting", "rollout"] = "shooting",
        sequential: bool = False,
        warmup: float = 0.25,
    ) -> None:
        super().__init__(steps, lr, loss, sequential)
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup={warmup} is a share of the steps and must lie in [0, 1]")
        self.warmup = round(warmup * steps)

    def adapt(self, net: MixER, support: Trajectories, groups_E: Tensor) -> Adapted:
        """Try, keep, confirm."""
        E = len(support.x)
        busy_B, starts_Bd = net.expert_starts(groups_E)
        B = len(busy_B)
        every = support.environments(torch.arange(E, device=busy_B.device).repeat(B))  # candidate by candidate
        expert = busy_B.repeat_interleave(E)
        context = self.descend(
            net, every, starts_Bd.repeat_interleave(E, 0), lambda c: net.route_to(expert, c), self.warmup
        )
        best_E = _finite(self._loss(net, every, context, expert)).view(B, E).argmin(0)
        kept_E = busy_B[best_E]
        start_Ed = context.view(B, E, -1)[best_E, torch.arange(E, device=best_E.device)]
        rest = self.steps - self.warmup
        context_Ed = self.descend(net, support, start_Ed, lambda c: net.route_to(kept_E, c), rest)
        return self._confirm(net, support, context_Ed, kept_E)

    def _confirm(self, net: MixER, support: Trajectories, context_Ed: Tensor, kept_E: Tensor) -> Adapted:
        """Let the gate name an expert; where it names another, the lower support loss decides."""
        with torch.no_grad():
            named_E = net.best_experts(context_Ed, net.group(support))
            if isinstance(net.layer.router(context_Ed, group=net.group(support)), DenseRouting):
                kept_E = named_E
            kept_loss_E = self._loss(net, support, context_Ed, kept_E)
            named_loss_E = self._loss(net, support, context_Ed, named_E)
        better_E = _finite(named_loss_E) < _finite(kept_loss_E)
        expert_E = torch.where(better_E, named_E, kept_E)
        return Adapted(context_Ed, expert_E, torch.where(better_E, named_loss_E, kept_loss_E), expert_E == named_E)

    @torch.no_grad()
    def _loss(self, net: MixER, data: Trajectories, context: Tensor, expert: Tensor) -> Tensor:
        return scaled_errors(*net.shoot(data, context, net.route_to(expert, context)), data.scale)


def _finite(loss: Tensor) -> Tensor:
    return loss.nan_to_num(nan=torch.inf)
