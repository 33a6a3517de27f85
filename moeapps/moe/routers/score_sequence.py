# SPDX-License-Identifier: Apache-2.0
"""Scores that read more than one vector: a sequence of past behaviours, or the routing of the layers before."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.routers.score import Features, LinearScore, Score, _one


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.ReLU()] if i else []
        layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers)


class AttentionScore(Score):
    r"""Attention-weighted sum of per-behaviour gate vectors, :math:`g = g_0 + \sum_j m_j a_j\, GU([h_j, q])`.

    :math:`a_j = AU([h_j, h_j \odot q, q])` is not normalised over the history, so its intensity is kept. A row without
    history gets the learned prior :math:`g_0`.

    Args:
        dim: width d of a behaviour and of the key.
        num_experts: columns E.
        gate_hidden: hidden widths of the gate unit GU, 2d -> ... -> E.
        attention_hidden: hidden widths of the activation unit AU, 3d -> ... -> 1.

    Shape:
        features ``(history [N, H, d], key [N, d], mask bool [N, H])`` -> logits [N, E].

    Raises:
        ValueError: if the features are not those three tensors.

    Source: AW-MoE, gate network (docs/papers/aw_moe.md, equation 1; recalled, the prior is inferred).

    Example:
        >>> history, key, mask = torch.randn(3, 5, 8), torch.randn(3, 8), torch.ones(3, 5, dtype=torch.bool)
        >>> AttentionScore(8, 4)((history, key, mask)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        gate_hidden: tuple[int, ...] = (32, 16),
        attention_hidden: tuple[int, ...] = (48, 16),
    ) -> None:
        super().__init__(num_experts)
        self.gate_unit = _mlp(2 * dim, *gate_hidden, num_experts)
        self.attention_unit = _mlp(3 * dim, *attention_hidden, 1)
        self.prior = nn.Parameter(torch.zeros(num_experts))

    @override
    def forward(self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        if isinstance(features, Tensor) or len(features) != 3:
            raise ValueError(
                "AttentionScore routes on three tensors: features=(history [N, H, d], key [N, d], mask [N, H])."
            )
        history_NHd, key_Nd, mask_NH = features
        key_NHd = key_Nd.unsqueeze(1).expand_as(history_NHd)
        attention_NH1 = self.attention_unit(torch.cat([history_NHd, history_NHd * key_NHd, key_NHd], -1))
        gates_NHE = self.gate_unit(torch.cat([history_NHd, key_NHd], -1))
        present_NH1 = mask_NH.unsqueeze(-1).bool()
        return self.prior + torch.where(present_NH1, attention_NH1 * gates_NHE, 0).sum(1)


class RecurrentScore(Score):
    r"""Logits from a memory of the routing in earlier layers: :math:`h_l = GRU(W_1 x, h_{l-1})`, :math:`s = W_2 h_l`.

    The state is per row; whoever changes the row order between layers must carry it along. Get it from
    ``routing.state`` and hand it to the next layer; None starts from 0.

    Args:
        dim: width of the features.
        num_experts: columns.
        state_dim: width of the memory.
        cell: one ``nn.GRUCell(state_dim, state_dim)`` shared by all layers, as in the paper; None makes one of its own.

    Shape:
        features [N, dim], state [N, state_dim] -> logits [N, num_experts], new state [N, state_dim].

    Raises:
        ValueError: if the cell has other widths.

    Source: RMoE, layerwise recurrent router (docs/papers/core.md, equation 19).

    Example:
        >>> logits, state = RecurrentScore(8, 4, state_dim=16)(torch.randn(3, 8))
        >>> logits.shape, state.shape
        (torch.Size([3, 4]), torch.Size([3, 16]))
    """

    def __init__(self, dim: int, num_experts: int, *, state_dim: int = 256, cell: nn.GRUCell | None = None) -> None:
        super().__init__(num_experts)
        self.cell = nn.GRUCell(state_dim, state_dim) if cell is None else cell
        if (self.cell.input_size, self.cell.hidden_size) != (state_dim, state_dim):
            raise ValueError(f"the cell is {self.cell}, but it must be GRUCell({state_dim}, {state_dim}).")
        self.into = LinearScore(dim, state_dim)
        self.out = LinearScore(state_dim, num_experts)

    @override
    def forward(
        self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r_NS = self.into(_one(features, "RecurrentScore"))
        h_NS = self.cell(r_NS, torch.zeros_like(r_NS) if state is None else state)
        return self.out(h_NS), h_NS
