# SPDX-License-Identifier: Apache-2.0
"""The MoE steps of Point-MoE, UniMoE-Audio, ProMoE, MixER and Meta-DMoE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from moeapps.moe.activation import ActivationName
from moeapps.moe.backends import Backend
from moeapps.moe.combine import Stack, Sum
from moeapps.moe.counts import at_least_one
from moeapps.moe.experts import GLUExperts, MLPExperts
from moeapps.moe.joined import JoinedExperts
from moeapps.moe.layer import LayerFactory, MoELayer, RouterFactory
from moeapps.moe.module_experts import ModuleExperts
from moeapps.moe.presets.basic import top_k_router
from moeapps.moe.routers import (
    Capped,
    ConditionalSplit,
    ConstantScore,
    Dense,
    ExpertChoice,
    GatedShared,
    Jitter,
    LinearScore,
    PrototypeScore,
    Router,
    RowChooser,
    SparseMixer,
    TableScore,
    TopK,
    TopP,
)
from moeapps.moe.routers.choose_batch import ChoiceWeighing
from moeapps.moe.routers.chooser import NullMass


def point_moe(
    *,
    num_experts: int = 4,
    top_k: int = 2,
    expansion: float = 1.0,
    activation: ActivationName = "relu",
    router: RouterFactory | None = None,
    num_shared: int = 0,
    backend: Backend = "auto",
) -> LayerFactory:
    r"""Point-MoE: :math:`y = \sum_{top k} \frac{p_e}{\sum p} W_{down}(f(x W_{gate}) \odot x W_{up})`, no balance loss.

    Args:
        num_experts: E; the paper's small model has 4, the large one 8.
        top_k: experts per point.
        expansion: hidden width over model width; 1 (small) or 2 (large).
        activation: of the gate.
        router: another router over the same experts; None is the linear top-k one.
        num_shared: always-on experts beside the E.
        backend: how sparse routings are computed.

    Source: Point-MoE (docs/papers/point_moe.md, equations 1 and 2).

    Example:
        >>> point_moe(num_experts=4)(8).experts.w_in.shape
        torch.Size([4, 8, 16])
    """
    at_least_one(num_experts=num_experts, top_k=top_k)
    make_router = top_k_router(num_experts=num_experts, top_k=top_k) if router is None else router

    def build(dim: int) -> MoELayer:
        bank = GLUExperts(num_experts + num_shared, dim, int(expansion * dim), activation=activation)
        return MoELayer(make_router(dim), bank, num_shared=num_shared, backend=backend)

    return build


def unimoe_audio(
    *,
    num_experts: int = 8,
    num_null: int = 1,
    num_shared: int = 2,
    top_p: float = 0.7,
    top_k: int | None = None,
    budget: float | None = None,
    null_mass: NullMass = "lost",
    capacity_factor: float | None = None,
    expansion: float = 1.0,
    shared_expansion: float = 0.5,
    shared_weighting: Literal["gated", "add"] = "gated",
    weighing: Literal["proportional", "sparse_mixer"] = "proportional",
    draws: bool = True,
    jitter: float = 0.01,
    router: RouterFactory | None = None,
    backend: Backend = "auto",
) -> LayerFactory:
    r"""UniMoE-Audio: top-p over routed and null experts, renormalised over the chosen, plus shared experts.

    The weights follow the paper's equation (proportional over the chosen set, null experts included, whose share is
    lost); the released code draws experts by SparseMixer and so ends close to uniform weights.

    Args:
        num_experts: routed experts.
        num_null: null experts.
        num_shared: shared experts.
        top_p: probability to reach.
        top_k: a fixed number of experts instead, nulls included (ablation); None uses ``top_p``.
        budget: mean number of real experts per row to hold, by moving the probability from ``top_p`` on (ours); None
            leaves it, so that the number falls as the router grows sure.
        null_mass: the weight of a chosen null expert is ``lost`` (paper) or ``redistributed`` over the real experts
            chosen (AdaMoE, with ``top_k``).
        capacity_factor: ceiling on the rows of every column, nulls included (released code: 6, switched off there); see
            :class:`Capped`. None drops nothing.
        expansion: hidden width of a routed expert over model width (the paper: 2752 / 2048).
        shared_expansion: the same for a shared expert (the paper: half of the routed width).
        shared_weighting: ``gated`` weighs shared experts by one softmax with the chosen; ``add`` adds them with weight
            1.
        weighing: ``proportional`` (paper) or ``sparse_mixer`` (released code); see :class:`SparseMixer`.
        draws: whether SparseMixer draws in training (the released configuration leaves its draws out).
        jitter: half width of the noise on the router's input in training.
        router: another router over the same experts (its shared experts are then added).
        backend: how sparse routings are computed.

    Raises:
        ValueError: for an unknown ``shared_weighting`` or ``weighing``, or a ``budget`` or ``null_mass`` that the other
            options leave no room for.

    Source: UniMoE-Audio (docs/papers/unimoe_audio.md, equations 1 to 5, and 18).

    Example:
        >>> unimoe_audio()(16).router.num_experts
        8
    """
    at_least_one(num_experts=num_experts, top_k=top_k)
    if shared_weighting not in ("gated", "add"):
        raise ValueError(f"shared_weighting={shared_weighting!r}, but it must be 'gated' or 'add'.")
    if weighing not in ("proportional", "sparse_mixer"):
        raise ValueError(f"weighing={weighing!r}, but it must be 'proportional' or 'sparse_mixer'.")
    _check_audio(budget, top_k, null_mass, num_null, weighing)
    gated = shared_weighting == "gated" and num_shared > 0

    def chooser() -> RowChooser:
        if weighing == "sparse_mixer":
            return SparseMixer(top_k, p=top_p if top_k is None else None, num_null=num_null, draws=draws)
        if top_k is not None:
            return TopK(top_k, num_null=num_null, null_mass=null_mass)
        return TopP(top_p, num_null=num_null, renormalise=True, null_mass=null_mass, budget=budget)

    def default_router(dim: int) -> Router:
        choose = chooser() if capacity_factor is None else Capped(chooser(), capacity_factor)
        score = LinearScore(dim, num_experts + num_null + (num_shared if gated else 0))
        noise = Jitter(jitter) if jitter else None
        return Router(score, GatedShared(choose, num_shared) if gated else choose, noise=noise)

    def build(dim: int) -> MoELayer:
        banks = [GLUExperts(num_experts, dim, int(expansion * dim), activation="silu")]
        if num_shared:
            banks.append(GLUExperts(num_shared, dim, int(shared_expansion * dim), activation="silu"))
        experts = JoinedExperts(banks) if num_shared else banks[0]
        make_router = default_router if router is None else router
        return MoELayer(make_router(dim), experts, num_shared=num_shared, combiner=Sum(shared="apart"), backend=backend)

    return build


def _check_audio(budget: float | None, top_k: int | None, null_mass: str, num_null: int, weighing: str) -> None:
    """Refuse options that the others leave no room for."""
    if budget is not None and (top_k is not None or weighing != "proportional"):
        raise ValueError(
            f"budget={budget} moves the probability that proportional weights reach, but top_k={top_k} and "
            f"weighing={weighing!r}; leave out top_k and use 'proportional', or leave out the budget."
        )
    if null_mass != "lost" and (num_null == 0 or weighing != "proportional"):
        raise ValueError(
            f"null_mass={null_mass!r} with num_null={num_null} and weighing={weighing!r}: only proportional weights of "
            "null experts can be redistributed; use num_null >= 1 and 'proportional', or null_mass='lost'."
        )


def promoe(
    *,
    num_experts: int = 12,
    top_k: int = 1,
    expansion: float = 2.0,
    by_expert: bool = False,
    weighing: Literal["identity", "softmax", "sigmoid"] = "identity",
    conditional_split: bool = True,
    num_shared: int = 1,
    unconditional_group: int | None = None,
    router: RouterFactory | None = None,
    backend: Backend = "auto",
) -> LayerFactory:
    r"""ProMoE: unconditional rows to their own expert, cosine prototypes for the others, one shared expert.

    Call with ``group=ids``: the sample of each row, negative without a condition. Bank: E routed, 1 unconditional (with
    the split), then the shared ones.

    Args:
        num_experts: routed experts E.
        top_k: experts per conditional row.
        expansion: hidden width over model width.
        by_expert: the EC variant: each expert takes its best rows of each sample.
        weighing: what the gates are: the cosine itself, or (ablations) its sigmoid or its softmax, over the experts for
            rows that choose and over the rows of a sample for experts that choose.
        conditional_split: whether unconditional rows have an expert of their own; otherwise they are routed like any.
        num_shared: always-on experts.
        unconditional_group: the group id of rows without a condition; None means all negative ids.
        router: another router of the conditional rows over the E experts.
        backend: how sparse routings are computed.

    Source: ProMoE (docs/papers/promoe.md, equations 1 to 3 and 5).

    Example:
        >>> layer = promoe(num_experts=3)(8)
        >>> layer(torch.zeros(2, 8), group=torch.tensor([0, -1])).shape
        torch.Size([2, 8])
    """
    at_least_one(num_experts=num_experts, top_k=top_k)

    def default_router(dim: int) -> Router:
        by_row = TopK(top_k, weighing=weighing, renormalise=False)
        among_rows: ChoiceWeighing = "row_softmax" if weighing == "softmax" else weighing
        choose = ExpertChoice(float(top_k), per="group", weighing=among_rows) if by_expert else by_row
        return Router(PrototypeScore(dim, num_experts), choose)

    def build(dim: int) -> MoELayer:
        inner = (default_router if router is None else router)(dim)
        if inner.num_experts != num_experts:
            raise ValueError(
                f"the router has {inner.num_experts} experts, but num_experts={num_experts}; make them equal"
            )
        fixed = None if unconditional_group is None else (unconditional_group,)
        whole = ConditionalSplit(inner, fixed) if conditional_split else inner
        bank = MLPExperts(whole.num_experts + num_shared, dim, int(expansion * dim), activation="gelu_tanh")
        return MoELayer(whole, bank, num_shared=num_shared, combiner=Sum(shared="apart"), backend=backend)

    return build


def meta_dmoe(
    *, specialists: Sequence[nn.Module], out_dim: int, row_dims: int = 3, leave_out: bool = False
) -> LayerFactory:
    """Meta-DMoE: all frozen specialists run on every input; an aggregator reads the stack ``(y [N, E, o], mask)``.

    Args:
        specialists: trained feature extractors, input -> (N, out_dim); they are frozen and put in evaluation mode.
        out_dim: width of their features.
        row_dims: dimensions of one input, 3 for images.
        leave_out: rows of group s do not see expert s (group E sees all): a domain must not ask its own specialist.

    Source: Meta-DMoE (docs/papers/meta_dmoe.md, equations 1 and 2).

    Example:
        >>> nets = [nn.Sequential(nn.Flatten(), nn.Linear(12, 4)) for _ in range(3)]
        >>> y, mask = meta_dmoe(specialists=nets, out_dim=4)(3)(torch.zeros(5, 3, 2, 2))
        >>> y.shape, mask.shape
        (torch.Size([5, 3, 4]), torch.Size([5, 3]))
    """

    def build(dim: int) -> MoELayer:
        num = len(specialists)
        bank = ModuleExperts(list(specialists), in_dim=dim, out_dim=out_dim, row_dims=row_dims).requires_grad_(False)
        if not leave_out:
            return MoELayer(Router(ConstantScore(num), Dense("ones")), bank.eval(), combiner=Stack())
        allowed = torch.cat([~torch.eye(num, dtype=torch.bool), torch.ones(1, num, dtype=torch.bool)])
        router = Router(TableScore(torch.zeros(1, num)), Dense("ones", allowed))
        return MoELayer(router, bank.eval(), combiner=Stack())

    return build
