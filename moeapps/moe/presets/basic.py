# SPDX-License-Identifier: Apache-2.0
"""Presets every system can use: routers by name, the dense twin, and a free composition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from moeapps.moe.activation import ActivationName
from moeapps.moe.backends import Backend
from moeapps.moe.counts import at_least_one
from moeapps.moe.experts import Experts, GLUExperts, MLPExperts
from moeapps.moe.layer import LayerFactory, MoELayer, RouterFactory
from moeapps.moe.routers import (
    Capacity,
    ConstantScore,
    CosineScore,
    Dense,
    Jitter,
    LinearScore,
    RandomScore,
    Router,
    TableScore,
    TopK,
    TopP,
)
from moeapps.moe.routers.choose import Weighing
from moeapps.moe.routers.chooser import NullMass


def top_k_router(
    *,
    num_experts: int = 4,
    top_k: int = 2,
    weighing: Weighing = "softmax",
    renormalise: bool | None = None,
    scale: float = 1.0,
    balance_bias: bool = False,
    num_null: int = 0,
    null_mass: NullMass = "lost",
    cosine: bool = False,
    jitter: float = 0.0,
    capacity_factor: float | None = None,
) -> RouterFactory:
    """A linear (or cosine) router that gives each row its k best experts.

    Args:
        num_experts: E.
        top_k: k.
        weighing: see :class:`TopK`.
        renormalise: see :class:`TopK`.
        scale: factor on the weights.
        balance_bias: keep a selection bias for balancing without a loss.
        num_null: null experts beside the E.
        null_mass: see :class:`TopK`.
        cosine: score by angle with a learned temperature instead of linearly.
        jitter: half width of the multiplicative noise on what the router reads.
        capacity_factor: ceiling per expert; None drops nothing.

    Example:
        >>> top_k_router(num_experts=3)(8).num_experts
        3
    """
    at_least_one(num_experts=num_experts, top_k=top_k)

    def build(dim: int) -> Router:
        score = CosineScore(dim, num_experts + num_null) if cosine else LinearScore(dim, num_experts + num_null)
        choose = TopK(
            top_k,
            weighing=weighing,
            renormalise=renormalise,
            scale=scale,
            balance_bias=balance_bias,
            num_null=num_null,
            null_mass=null_mass,
        )
        capacity = None if capacity_factor is None else Capacity(capacity_factor)
        return Router(score, choose, noise=Jitter(jitter) if jitter else None, capacity=capacity)

    return build


def top_p_router(
    *,
    num_experts: int = 4,
    top_p: float = 0.7,
    num_null: int = 0,
    max_k: int | None = None,
    renormalise: bool = False,
    null_mass: NullMass = "lost",
    jitter: float = 0.0,
    budget: float | None = None,
) -> RouterFactory:
    """A linear router that gives each row as many experts as it takes to reach a probability.

    Args:
        num_experts: E.
        top_p: probability to reach.
        num_null: null experts beside the E.
        max_k: never more than this many.
        renormalise: see :class:`TopP`.
        null_mass: see :class:`TopK`.
        jitter: half width of the multiplicative noise on what the router reads.
        budget: mean number of real experts per row to hold by moving the probability; see :class:`TopP`.

    Example:
        >>> top_p_router(num_experts=3)(8).num_experts
        3
    """
    at_least_one(num_experts=num_experts, max_k=max_k)

    def build(dim: int) -> Router:
        choose = TopP(
            top_p, num_null=num_null, max_k=max_k, renormalise=renormalise, null_mass=null_mass, budget=budget
        )
        return Router(LinearScore(dim, num_experts + num_null), choose, noise=Jitter(jitter) if jitter else None)

    return build


def random_router(*, num_experts: int = 4, top_k: int = 2, seed: int = 0) -> RouterFactory:
    """Control: each row goes to k experts drawn anew at each call, weighed 1/k each.

    Args:
        num_experts: E.
        top_k: k.
        seed: of the draws in evaluation.

    Example:
        >>> random_router(num_experts=3, top_k=1)(8)(torch.zeros(2, 8)).weight_M.tolist()
        [1.0, 1.0]
    """
    at_least_one(num_experts=num_experts, top_k=top_k)

    def build(dim: int) -> Router:
        return Router(RandomScore(num_experts, seed), TopK(top_k, weighing="ones", scale=1 / top_k))

    return build


def table_router(*, num_experts: int = 4, top_k: int = 1, num_ids: int | None = None) -> RouterFactory:
    """Control: each group id has fixed experts (id, id + 1, ... modulo E), weighed 1/k each: domain-id routing.

    Args:
        num_experts: E.
        top_k: k.
        num_ids: length of the table, beyond which ids wrap around; None means E.

    Example:
        >>> table_router(num_experts=3)(8)(torch.zeros(2, 8), group=torch.tensor([2, 4])).expert_M.tolist()
        [2, 1]
    """
    at_least_one(num_experts=num_experts, top_k=top_k, num_ids=num_ids)
    length = num_experts if num_ids is None else num_ids

    def build(dim: int) -> Router:
        ids, ranks = torch.arange(length).unsqueeze(-1), torch.arange(top_k)
        table = torch.zeros(length, num_experts).scatter(-1, (ids + ranks) % num_experts, 1.0)
        return Router(TableScore(table), TopK(top_k, weighing="ones", scale=1 / top_k))

    return build


def compose(
    *,
    router: RouterFactory,
    experts: Callable[[int], Experts],
    num_shared: int = 0,
    backend: Backend = "auto",
) -> LayerFactory:
    """Any router with any bank.

    Args:
        router: width -> router.
        experts: width -> bank, shared experts last.
        num_shared: always-on experts.
        backend: how sparse routings are computed.

    Example:
        >>> compose(router=top_k_router(), experts=lambda dim: MLPExperts(4, dim, 16))(8)(torch.zeros(2, 8)).shape
        torch.Size([2, 8])
    """
    return lambda dim: MoELayer(router(dim), experts(dim), num_shared=num_shared, backend=backend)


def dense(*, expansion: float = 2.0, activation: ActivationName = "relu", gated: bool = True) -> LayerFactory:
    """One expert of a given width that is always on; ``dense_twin`` reads the width off a mixture.

    Args:
        expansion: hidden width over model width; 2 has the active FLOPs of ``point_moe()`` with nothing said.
        activation: of the expert.
        gated: a gated linear unit without bias, or a two-layer perceptron with bias.

    Example:
        >>> dense(expansion=2.0)(8).experts.hidden_dim
        16
    """

    def build(dim: int) -> MoELayer:
        hidden = int(expansion * dim)
        kind = GLUExperts if gated else MLPExperts
        return MoELayer(Router(ConstantScore(1), Dense("ones")), kind(1, dim, hidden, activation=activation))

    return build


def linear() -> LayerFactory:
    """No experts at all: one linear layer, the backbone as it was before.

    Example:
        >>> linear()(8)
        Linear(in_features=8, out_features=8, bias=True)
    """
    return lambda dim: nn.Linear(dim, dim)
