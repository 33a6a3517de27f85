# SPDX-License-Identifier: Apache-2.0
"""MixER: meta-learners behind a gate that reads the context of an environment and never its state.

Shape letters: S environments, N trajectories per environment, T samples, D state size, E experts, c context width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moeapps.moe import FittedRouter, MoELayer, Router, Routing
from moeapps.moe.counts import at_least_one
from moeapps.moe.routing import AnyRouting
from tasks.dynamics.data.batch import Trajectories
from tasks.dynamics.losses import scaled_errors
from tasks.dynamics.nets.experts import ExpertsFactory, MetaExperts
from tasks.dynamics.nets.gates import GateFactory
from tasks.dynamics.nets.modulation import SelfModulation, taylor
from tasks.dynamics.nets.solvers import Field, Method, solve


class MixER(nn.Module):
    r"""Contexts, gate and experts; a subclass says how experts make trajectories.

    With :math:`k = argmax_k\,([\xi^s, 1] W)_k`, environment s evolves under expert k, which reads its piece of
    :math:`\xi^s`. The gate is asked once per solve.

    Args:
        facts: from the data module; read are ``state_dim``, D, and ``num_environments``, the environments that are
            trained on, each with a context that starts at 0.
        experts: ``(state_dim, num_experts, context_dim) -> bank``.
        gate: ``(context_dim, num_experts) -> router``.
        num_experts: E.
        context_dim: c, whole width of a context.
        route_by: what a gate that reads no context gets as the group: the hidden family (oracle) or the environment.

    Raises:
        ValueError: more experts than environments behind a fitted gate, or a context the experts cannot divide.

    Source: MixER (Nzoyem et al., arXiv 2502.05335; docs/papers/mixer.md, equation 1).
    """

    kind: ClassVar[str]

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        experts: ExpertsFactory,
        gate: GateFactory,
        num_experts: int = 4,
        context_dim: int = 16,
        route_by: Literal["family", "environment"] = "family",
    ) -> None:
        super().__init__()
        state_dim: int = facts["state_dim"]
        num_environments: int = facts["num_environments"]
        router = gate(context_dim, num_experts)
        if num_experts > num_environments and isinstance(router, FittedRouter):
            raise ValueError(
                f"num_experts={num_experts} exceeds the {num_environments} training environments, so that some expert "
                f"could never be used; use at most {num_environments}, or train on more environments"
            )
        self.state_dim, self.num_experts, self.context_dim = state_dim, num_experts, context_dim
        self.route_by = route_by
        self.contexts = nn.Parameter(torch.zeros(num_environments, context_dim))
        self.layer = MoELayer(router, experts(state_dim, num_experts, context_dim))

    # Routing ------------------------------------------------------------------------------------------------------

    def group(self, data: Trajectories) -> Tensor:
        """The group ids that oracle gates route by, int64 [S]; -1 where unknown."""
        return data.family if self.route_by == "family" else data.env

    def route(self, context_Sc: Tensor, group_S: Tensor) -> AnyRouting:
        """Ask the gate once per environment."""
        routing: AnyRouting = self.layer.route(context_Sc, group=group_S)
        return routing

    def route_to(self, expert_S: Tensor, context_Sc: Tensor) -> AnyRouting:
        """Send every environment to a given expert, with the weight the gate would give it; mixtures stay mixtures."""
        router = self.layer.router
        routing: AnyRouting = router(context_Sc, group=expert_S)
        if not isinstance(routing, Routing) or routing.probs_NE is None:
            return routing
        weight_S = routing.probs_NE.gather(1, expert_S[:, None]).squeeze(1)
        ones = isinstance(router, Router) and getattr(router.choose, "weighing", "") == "ones"
        return replace(routing, expert_M=expert_S, weight_M=torch.ones_like(weight_S) if ones else weight_S)

    def best_experts(self, context_Sc: Tensor, group_S: Tensor) -> Tensor:
        """The expert with the largest weight of each environment, int64 [S]; nothing is recorded."""
        routing: AnyRouting = self.layer.router(context_Sc, group=group_S)
        return routing.assignment().argmax(1)

    @torch.no_grad()
    def expert_starts(self, group_S: Tensor) -> tuple[Tensor, Tensor]:
        """Mean training context of every expert that has an environment: experts int64 [B], contexts [B, c].

        Args:
            group_S: groups of the trained environments, in the order of their numbers.
        """
        chosen_S = self.best_experts(self.contexts, group_S)
        busy = chosen_S.unique()
        return busy, torch.stack([self.contexts[chosen_S == k].mean(0) for k in busy])

    # Trajectories -------------------------------------------------------------------------------------------------

    def shoot(
        self, data: Trajectories, context_Sc: Tensor, routing: AnyRouting, anchor_Sc: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predict every sample from the observed one before it (multiple shooting).

        Args:
            data: what is observed.
            context_Sc: contexts of its environments.
            routing: of its environments.
            anchor_Sc: contexts about which fields are expanded, if any.

        Returns:
            Prediction and target [S, N, T - 1, D], and where both ends are observed, bool [S, N, T - 1] or None.
        """
        mask = None if data.mask is None else data.mask[:, :, 1:] & data.mask[:, :, :-1]
        return self._one_ahead(data, context_Sc, routing, anchor_Sc), data.x[:, :, 1:], mask

    def rollout(
        self, data: Trajectories, context_Sc: Tensor, routing: AnyRouting, anchor_Sc: Tensor | None = None
    ) -> Tensor:
        """Predict whole trajectories from their first ``data.num_given`` samples.

        Args:
            data: what is given, and the time grid.
            context_Sc: contexts of its environments.
            routing: of its environments.
            anchor_Sc: contexts about which fields are expanded, if any.

        Returns:
            [S, N, T, D]; the given samples are returned as they are.
        """
        raise NotImplementedError

    def errors(self, data: Trajectories, *args: Any, rollout: bool) -> Tensor:
        """The `scaled_errors` of a batch, [S]: of whole roll-outs, or one sample ahead; ``args`` as for `shoot`."""
        if rollout:
            return scaled_errors(self.rollout(data, *args), data.x, data.mask, data.scale)
        return scaled_errors(*self.shoot(data, *args), data.scale)

    def _one_ahead(
        self, data: Trajectories, context_Sc: Tensor, routing: AnyRouting, anchor_Sc: Tensor | None
    ) -> Tensor:
        raise NotImplementedError


class FieldMixER(MixER):
    """Experts are vector fields, dx/dt = f_k(x, context).

    Args:
        facts: see :class:`MixER`.
        method: solver, see ``tasks.dynamics.nets.solvers.solve``.
        substeps: steps of the solver between two samples.
        modulation: contextual self-modulation in training; None trains the field as it is.
        options: further arguments of :class:`MixER`.
    """

    kind: ClassVar[str] = "field"

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        method: Method = "rk4",
        substeps: int = 1,
        modulation: SelfModulation | None = None,
        **options: Any,
    ) -> None:
        at_least_one(substeps=substeps)
        super().__init__(facts, **options)
        self.method: Method = method
        self.substeps = substeps
        self.modulation = modulation

    def field(self, context_Sc: Tensor, routing: AnyRouting, num_rows: int, anchor_Sc: Tensor | None = None) -> Field:
        """Return ``dx/dt = f(t [S], x [S, num_rows, D])``; the experts do not read the time.

        Args:
            context_Sc: contexts.
            routing: of the environments.
            num_rows: states per environment.
            anchor_Sc: contexts about which the field is expanded, if any.
        """
        modulated = anchor_Sc is not None and self.modulation is not None
        bank = self.layer.experts
        if not modulated and isinstance(bank, MetaExperts) and isinstance(routing, Routing) and self._one_each(routing):
            networks = bank.bind(context_Sc, routing.expert_M, routing.weight_M)
            return lambda t, x: networks(x)
        rows = routing.repeat_rows(num_rows)  # type: ignore[union-attr]

        def spread(context: Tensor) -> Tensor:
            return context[:, None].expand(-1, num_rows, -1)

        if anchor_Sc is None or self.modulation is None:
            side = (spread(context_Sc),)
            return lambda t, x: self.layer(x, routing=rows, side=side)
        order, anchor, context = self.modulation.order, anchor_Sc, context_Sc

        def expanded(t: Tensor, x: Tensor) -> Tensor:
            return taylor(lambda c: self.layer(x, routing=rows, side=(spread(c),)), context, anchor, order)

        return expanded

    def _one_each(self, routing: Routing) -> bool:
        """Whether every environment has exactly one expert, none dropped."""
        return routing.top_k == 1 and bool((routing.expert_M < self.num_experts).all())

    def _one_ahead(
        self, data: Trajectories, context_Sc: Tensor, routing: AnyRouting, anchor_Sc: Tensor | None
    ) -> Tensor:
        S, N, T, D = data.x.shape
        start = data.x[:, :, :-1].reshape(S, N * (T - 1), D)
        field = self.field(context_Sc, routing, start.shape[1], anchor_Sc)
        path = solve(field, start, 0.0, data.dt, 2, method=self.method, substeps=self.substeps)
        return path[:, :, 1].view(S, N, T - 1, D)

    def rollout(
        self, data: Trajectories, context_Sc: Tensor, routing: AnyRouting, anchor_Sc: Tensor | None = None
    ) -> Tensor:
        """Solve from the last given sample; see :meth:`MixER.rollout`."""
        N, T, given = data.x.shape[1], data.x.shape[2], data.num_given
        field = self.field(context_Sc, routing, N, anchor_Sc)
        start = data.x[:, :, given - 1]
        path = solve(field, start, 0.0, data.dt, T - given + 1, method=self.method, substeps=self.substeps)
        return torch.cat([data.x[:, :, : given - 1], path], dim=2)


class SequenceMixER(MixER):
    """Experts are maps from sample to sample (``ShallowPLRNNExperts``); training forces them onto the data.

    Their bank is one over rows [model state, observed state]; the arguments are those of :class:`MixER`.
    """

    kind: ClassVar[str] = "sequence"

    def _one_ahead(
        self, data: Trajectories, context_Sc: Tensor, routing: AnyRouting, anchor_Sc: Tensor | None
    ) -> Tensor:
        return self._run(data, data.x.shape[2] - 1, context_Sc, routing, data.x.shape[2])

    def rollout(
        self, data: Trajectories, context_Sc: Tensor, routing: AnyRouting, anchor_Sc: Tensor | None = None
    ) -> Tensor:
        """Follow the given samples, then run freely; see :meth:`MixER.rollout`."""
        T, given = data.x.shape[2], data.num_given
        path = self._run(data, T - 1, context_Sc, routing, given)
        return torch.cat([data.x[:, :, :given], path[:, :, given - 1 :]], dim=2)

    def _run(self, data: Trajectories, num_steps: int, context_Sc: Tensor, routing: AnyRouting, given: int) -> Tensor:
        """States after each of ``num_steps`` steps [S, N, steps, D]; the first ``given`` samples are observed."""
        N = data.x.shape[1]
        rows = routing.repeat_rows(N)  # type: ignore[union-attr]
        side = (context_Sc[:, None].expand(-1, N, -1),)
        z, states = data.x[:, :, 0], []
        for t in range(num_steps):
            observed = data.x[:, :, t] if t < given else z
            if t < given and data.mask is not None:
                observed = observed.where(data.mask[:, :, t, None], z)
            z = self.layer(torch.cat([z, observed], -1), routing=rows, side=side)
            states.append(z)
        return torch.stack(states, 2)
