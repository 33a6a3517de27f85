# SPDX-License-Identifier: Apache-2.0
"""The MoE step of AW-MoE: a dense gate over experts that all run."""

from __future__ import annotations

from typing import Literal

from moeapps.moe.activation import ActivationName
from moeapps.moe.counts import at_least_one
from moeapps.moe.experts import MLPExperts
from moeapps.moe.layer import LayerFactory, MoELayer
from moeapps.moe.routers import AttentionScore, Dense, Router
from moeapps.moe.routers.pairs import AttentionNorm, Part, Pooling, WidthActivation


def aw_moe(
    *,
    num_experts: int = 4,
    behaviour_dim: int,
    hidden_dim: int = 32,
    out_dim: int = 1,
    gate_norm: Literal["none", "softmax", "sigmoid"] = "none",
    activation: ActivationName = "relu",
    gate_hidden: tuple[int, ...] | None = (32, 16),
    attention_hidden: tuple[int, ...] | None = (48, 16),
    attention_parts: tuple[Part, ...] = ("own", "product", "key"),
    attention_norm: AttentionNorm = "none",
    pooling: Pooling = "sum",
    unit_activation: WidthActivation | None = None,
    prior: float = 0.0,
) -> LayerFactory:
    r"""AW-MoE: all experts run, weighed by an attention over past behaviours: :math:`y = \sum_k g_k E_k(x)`.

    Call ``layer(x, (history [N, H, d], key [N, d], mask [N, H]))``; see :class:`AttentionScore` for the gate.

    Args:
        num_experts: K.
        behaviour_dim: width d of a behaviour and of the key.
        hidden_dim: of the experts.
        out_dim: 1 for experts that score, wider for a joint tower behind the layer.
        gate_norm: how the gate vector is normalised; the base form leaves it free.
        activation: of the experts.
        gate_hidden: hidden widths of the gate unit; None: one learned vector for all behaviours (ablation).
        attention_hidden: hidden widths of the activation unit; None: the same weight for all behaviours (ablation).
        attention_parts: what the activation unit reads of a behaviour and the key.
        attention_norm: ``softmax`` normalises the attention over the history.
        pooling: how the sum over the history is divided: not at all, by the root of its length, by its length.
        unit_activation: width -> activation in the two units; None means ReLU.
        prior: first value of the gate vector of an empty history.

    Raises:
        ValueError: for an unknown ``gate_norm``, norm, pooling or part.

    Source: AW-MoE (docs/papers/aw_moe.md, equations 3 and 4; recalled).

    Example:
        >>> import torch
        >>> layer = aw_moe(behaviour_dim=6)(8)
        >>> layer(torch.zeros(2, 8), (torch.zeros(2, 5, 6), torch.zeros(2, 6), torch.ones(2, 5))).shape
        torch.Size([2, 1])
    """
    at_least_one(num_experts=num_experts, behaviour_dim=behaviour_dim, hidden_dim=hidden_dim, out_dim=out_dim)
    if gate_norm not in ("none", "softmax", "sigmoid"):
        raise ValueError(f"gate_norm={gate_norm!r}, but it must be 'none', 'softmax' or 'sigmoid'.")
    weighing: Literal["softmax", "sigmoid", "identity"] = "identity" if gate_norm == "none" else gate_norm

    def build(dim: int) -> MoELayer:
        score = AttentionScore(
            behaviour_dim,
            num_experts,
            gate_hidden=gate_hidden,
            attention_hidden=attention_hidden,
            attention_parts=attention_parts,
            attention_norm=attention_norm,
            pooling=pooling,
            activation=unit_activation,
            prior=prior,
        )
        router = Router(score, Dense(weighing))
        return MoELayer(router, MLPExperts(num_experts, dim, hidden_dim, out_dim=out_dim, activation=activation))

    return build
