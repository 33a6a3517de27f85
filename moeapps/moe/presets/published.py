# SPDX-License-Identifier: Apache-2.0
"""MoE layers published outside the seven systems: Switch, Mixtral, DeepSeek-V3, soft MoE, expert choice.

They need nothing but torch: ``layer = mixtral(num_experts=8)(dim)`` is a module for any training loop.
"""

from __future__ import annotations

from typing import Literal

from moeapps.moe.activation import ActivationName
from moeapps.moe.backends import Backend
from moeapps.moe.counts import at_least_one
from moeapps.moe.experts import GLUExperts, MLPExperts
from moeapps.moe.layer import LayerFactory, MoELayer
from moeapps.moe.presets.basic import top_k_router
from moeapps.moe.routers import (
    Capacity,
    CosineScore,
    ExpertChoice,
    GroupLimitedTopK,
    Jitter,
    LinearScore,
    Router,
    Slots,
    TopK,
)
from moeapps.moe.routers.choose_batch import ChoiceWeighing


def switch(
    *,
    num_experts: int = 8,
    expansion: float = 4.0,
    activation: ActivationName = "relu",
    capacity_factor: float | None = 1.25,
    eval_capacity_factor: float | None = 2.0,
    jitter: float = 0.01,
    backend: Backend = "auto",
) -> LayerFactory:
    r"""Switch Transformer: each row goes to its one best expert, :math:`y = p_e E_e(x)`; what overflows gives 0.

    Args:
        num_experts: E.
        expansion: hidden width over model width.
        activation: of the experts, which have no bias.
        capacity_factor: ceiling per expert in training; None drops nothing.
        eval_capacity_factor: the same in evaluation; None means as in training.
        jitter: half width of the multiplicative noise on what the router reads in training.
        backend: how sparse routings are computed.

    Source: Fedus et al. 2021 (docs/papers/core.md, equations 2, 9 and 11); train it with ``SwitchBalance(0.01)``.

    Example:
        >>> switch(num_experts=4)(8).experts.w_in.shape
        torch.Size([4, 8, 32])
    """
    at_least_one(num_experts=num_experts)

    def build(dim: int) -> MoELayer:
        room = None if capacity_factor is None else Capacity(capacity_factor, eval_factor=eval_capacity_factor)
        router = Router(
            LinearScore(dim, num_experts),
            TopK(1, renormalise=False),
            noise=Jitter(jitter) if jitter else None,
            capacity=room,
        )
        bank = MLPExperts(num_experts, dim, round(expansion * dim), activation=activation, bias=False)
        return MoELayer(router, bank, backend=backend)

    return build


def mixtral(
    *,
    num_experts: int = 8,
    top_k: int = 2,
    expansion: float = 3.5,
    activation: ActivationName = "silu",
    backend: Backend = "auto",
) -> LayerFactory:
    r"""Mixtral: SwiGLU experts under a softmax over the k best logits; nothing is dropped.

    Args:
        num_experts: E.
        top_k: experts per row.
        expansion: hidden width over model width; 14336 / 4096 in Mixtral 8x7B.
        activation: of the gate.
        backend: how sparse routings are computed.

    Source: Jiang et al. 2024 (docs/papers/core.md, equation 2). :func:`moeapps.moe.convert.from_mixtral` reads weights.

    Example:
        >>> mixtral()(16).experts.w_out.shape
        torch.Size([8, 56, 16])
    """
    at_least_one(num_experts=num_experts, top_k=top_k)

    def build(dim: int) -> MoELayer:
        bank = GLUExperts(num_experts, dim, round(expansion * dim), activation=activation)
        return MoELayer(top_k_router(num_experts=num_experts, top_k=top_k)(dim), bank, backend=backend)

    return build


def deepseek_v3(
    *,
    num_experts: int = 256,
    top_k: int = 8,
    num_groups: int = 8,
    keep_groups: int = 4,
    num_shared: int = 1,
    scale: float = 2.5,
    expansion: float = 2048 / 7168,
    activation: ActivationName = "silu",
    backend: Backend = "auto",
) -> LayerFactory:
    r"""DeepSeek-V3: sigmoid scores, a selection bias in place of a loss, experts of the best groups only, shared ones.

    :math:`y = \sum_s E_s(x) + c \sum_{e \in I} \frac{a_e}{\sum_{j \in I} a_j} E_e(x)` with a the sigmoid of the logits
    and I the k largest of a + b. The bias b moves after each optimizer step: ``BiasBalancer`` does it in a plain
    loop, the callback ``BiasBalancing`` under Lightning.

    Args:
        num_experts: routed experts.
        top_k: routed experts per row.
        num_groups: groups that the experts are cut into.
        keep_groups: groups that a row may choose from.
        num_shared: always-on experts of the same width.
        scale: c, the factor on the routed weights.
        expansion: hidden width of one expert over model width.
        activation: of the gate.
        backend: how sparse routings are computed.

    Source: DeepSeek-AI 2024 (docs/papers/core.md, equations 3, 4 and 14).

    Example:
        >>> layer = deepseek_v3(num_experts=8, top_k=2, num_groups=4, keep_groups=2)(14)
        >>> layer.experts.num_experts, layer.experts.hidden_dim, layer.router.choose.bias.shape
        (9, 4, torch.Size([8]))
    """
    at_least_one(num_experts=num_experts, top_k=top_k, num_groups=num_groups, keep_groups=keep_groups)

    def build(dim: int) -> MoELayer:
        choose = GroupLimitedTopK(
            top_k,
            num_groups=num_groups,
            keep_groups=keep_groups,
            weighing="sigmoid",
            renormalise=True,
            scale=scale,
            balance_bias=True,
        )
        bank = GLUExperts(num_experts + num_shared, dim, round(expansion * dim), activation=activation)
        router = Router(LinearScore(dim, num_experts), choose)
        return MoELayer(router, bank, num_shared=num_shared, backend=backend)

    return build


def soft_moe(
    *,
    num_experts: int = 8,
    num_slots: int = 1,
    num_groups: int = 1,
    expansion: float = 4.0,
    activation: ActivationName = "gelu",
) -> LayerFactory:
    """Soft MoE: experts work on mixtures of rows, rows read mixtures of what came out.

    All rows of a call mix. Where a call holds several sequences that must not, give ``num_groups`` and, in the call,
    ``group=ids`` in 0..num_groups - 1.

    Args:
        num_experts: E.
        num_slots: mixtures per expert and group.
        num_groups: sequences of a call that do not mix.
        expansion: hidden width over model width.
        activation: of the experts.

    Source: Puigcerver et al. 2023 (docs/papers/core.md, equation 16).

    Example:
        >>> import torch
        >>> soft_moe(num_experts=4)(8)(torch.zeros(10, 8)).shape
        torch.Size([10, 8])
    """
    at_least_one(num_experts=num_experts, num_slots=num_slots, num_groups=num_groups)

    def build(dim: int) -> MoELayer:
        score = CosineScore(dim, num_experts * num_slots, temperature=1.0)
        bank = MLPExperts(num_experts, dim, round(expansion * dim), activation=activation)
        return MoELayer(Router(score, Slots(num_slots, num_groups=num_groups)), bank)

    return build


def expert_choice(
    *,
    num_experts: int = 8,
    capacity_factor: float = 2.0,
    per: Literal["group", "batch"] = "batch",
    weighing: ChoiceWeighing = "softmax",
    expansion: float = 4.0,
    activation: ActivationName = "relu",
    backend: Backend = "auto",
) -> LayerFactory:
    """Expert choice: each expert takes its best rows, so the load is even by construction and rows may get none.

    A row's experts depend on the other rows of the call: not for causal models.

    Args:
        num_experts: E.
        capacity_factor: mean number of experts per row.
        per: choose among all rows of a call, or among those of each ``group`` apart.
        weighing: see :class:`ExpertChoice`.
        expansion: hidden width over model width.
        activation: of the experts.
        backend: how sparse routings are computed.

    Source: Zhou et al. 2022 (docs/papers/core.md, equation 7).

    Example:
        >>> import torch
        >>> expert_choice(num_experts=4, capacity_factor=1.0)(8).route(torch.randn(12, 8)).counts().tolist()
        [3, 3, 3, 3]
    """
    at_least_one(num_experts=num_experts)

    def build(dim: int) -> MoELayer:
        choose = ExpertChoice(capacity_factor, per=per, weighing=weighing)
        bank = MLPExperts(num_experts, dim, round(expansion * dim), activation=activation)
        return MoELayer(Router(LinearScore(dim, num_experts), choose), bank, backend=backend)

    return build
