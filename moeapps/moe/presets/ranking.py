# SPDX-License-Identifier: Apache-2.0
"""The MoE steps of HoME and AW-MoE: dense gates over experts that all run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from moeapps.moe.activation import ActivationName
from moeapps.moe.experts import Experts, MLPExperts
from moeapps.moe.layer import LayerFactory, MoELayer
from moeapps.moe.normalised import NormalisedExperts
from moeapps.moe.routers import AttentionScore, Dense, LinearScore, MultiGate, Router, RouterBase, SumRouters


def home_level(
    *,
    sees: Sequence[Sequence[bool]],
    owns: Sequence[Sequence[bool]] | None = None,
    out_dim: int,
    gate_dims: Sequence[int] | None = None,
    hidden_dim: int | None = None,
    normalise: bool = True,
    activation: ActivationName = "silu",
) -> LayerFactory:
    r"""One level of HoME: G gates over one bank, plus self-gates over the experts each group owns.

    :math:`z_g = \sum_{e \in sees(g)} softmax(G_g v_g)_e h_e + \sum_{e \in owns(g)} Self_g(v_g)_e h_e`, with a sigmoid
    self-gate for a group of one expert, a softmax otherwise. Call ``layer(views [E, N, d], gate features,
    per_expert=True)``.

    Args:
        sees: [G, E], which experts gate g may mix (the hierarchy mask).
        owns: [G, E], which experts gate g owns; None leaves self-gates out.
        out_dim: width of an expert's output.
        gate_dims: width of what each gate reads; None means the width of the layer.
        hidden_dim: hidden width of an expert; None is a single layer (normalised experts only).
        normalise: batch normalisation per expert before the activation; False is the plain expert of the ablation.
        activation: of the experts.

    Raises:
        ValueError: if a gate sees nothing, sizes do not fit, or plain experts come without ``hidden_dim``.

    Source: HoME (docs/papers/home.md).

    Example:
        >>> sees, owns = [[True, True, False], [True, False, True]], [[False, True, False], [False, False, True]]
        >>> level = home_level(sees=sees, owns=owns, out_dim=4)(8)
        >>> level(torch.randn(3, 5, 8), torch.randn(2, 5, 8), per_expert=True).shape
        torch.Size([2, 5, 4])
    """
    seen = torch.as_tensor(sees).bool()
    num_gates, num_experts = seen.shape
    if not normalise and hidden_dim is None:
        raise ValueError("plain experts are two-layer perceptrons: give hidden_dim, or use normalise=True.")

    def gates(dim: int, allowed: torch.Tensor, weighing: list[Literal["softmax", "sigmoid"]]) -> MultiGate:
        dims = [dim] * num_gates if gate_dims is None else list(gate_dims)
        return MultiGate(
            [LinearScore(d, num_experts, bias=True) for d in dims], allowed=allowed, weighing=list(weighing)
        )

    def build(dim: int) -> MoELayer:
        router: RouterBase = gates(dim, seen, ["softmax"] * num_gates)
        if owns is not None:
            own = torch.as_tensor(owns).bool()
            alone: list[Literal["softmax", "sigmoid"]] = ["sigmoid" if int(n) == 1 else "softmax" for n in own.sum(-1)]
            router = SumRouters([router, gates(dim, own, alone)])
        bank: Experts = NormalisedExperts(num_experts, dim, out_dim, hidden_dim=hidden_dim, activation=activation)
        if not normalise:
            bank = MLPExperts(num_experts, dim, hidden_dim or dim, out_dim=out_dim, activation=activation)
        return MoELayer(router, bank)

    return build


def aw_moe(
    *,
    num_experts: int = 4,
    behaviour_dim: int,
    hidden_dim: int = 32,
    out_dim: int = 1,
    gate_norm: Literal["none", "softmax", "sigmoid"] = "none",
    activation: ActivationName = "relu",
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

    Raises:
        ValueError: for an unknown ``gate_norm``.

    Source: AW-MoE (docs/papers/aw_moe.md, equations 1 and 2; recalled).

    Example:
        >>> layer = aw_moe(behaviour_dim=6)(8)
        >>> layer(torch.zeros(2, 8), (torch.zeros(2, 5, 6), torch.zeros(2, 6), torch.ones(2, 5))).shape
        torch.Size([2, 1])
    """
    if gate_norm not in ("none", "softmax", "sigmoid"):
        raise ValueError(f"gate_norm={gate_norm!r}, but it must be 'none', 'softmax' or 'sigmoid'.")
    weighing: Literal["softmax", "sigmoid", "identity"] = "identity" if gate_norm == "none" else gate_norm

    def build(dim: int) -> MoELayer:
        router = Router(AttentionScore(behaviour_dim, num_experts), Dense(weighing))
        return MoELayer(router, MLPExperts(num_experts, dim, hidden_dim, out_dim=out_dim, activation=activation))

    return build
