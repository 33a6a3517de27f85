# SPDX-License-Identifier: Apache-2.0
"""Scores that do not read the features: tables of group ids, constants, chance. Oracles and controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.routers.chooser import Pool
from moeapps.moe.routers.score import Features, Score


class TableScore(Score):
    """Logits looked up by group id: domain-id routing, hash routing, any oracle. Reads ``group``, not the features.

    Ids beyond the table wrap around (id modulo its length), so a domain that was never trained on is still served.

    Args:
        table: fixed logits [num_ids, E], kept as a buffer; or a number of ids, for a learned table that starts at 0.
        num_experts: E, needed when ``table`` is a number.

    Shape:
        group int64 [N] -> logits [N, E].

    Raises:
        ValueError: if the table is not two-dimensional, ``num_experts`` is missing, or no group comes.

    Example:
        >>> score = TableScore(torch.eye(3))
        >>> score(torch.zeros(2, 8), group=torch.tensor([1, 3])).argmax(-1).tolist()
        [1, 0]
    """

    table: Tensor

    def __init__(self, table: Tensor | Sequence[Sequence[float]] | int, num_experts: int | None = None) -> None:
        if isinstance(table, int):
            if num_experts is None or table < 1:
                raise ValueError(
                    f"TableScore(table={table}, num_experts={num_experts}): a learned table needs both sizes."
                )
            values = torch.zeros(table, num_experts)
        else:
            values = torch.as_tensor(table).float()
            if values.ndim != 2 or num_experts not in (None, values.shape[-1]):
                raise ValueError(f"table is {tuple(values.shape)}, but it must be [num_ids, {num_experts or 'E'}].")
        super().__init__(values.shape[1])
        if isinstance(table, int):
            self.table = nn.Parameter(values)
        else:
            self.register_buffer("table", values)

    @override
    def forward(self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        if group is None:
            if self.table.shape[0] > 1:
                raise ValueError("TableScore routes by group id, but group=None; pass group=ids to the layer.")
            first = features if isinstance(features, Tensor) else features[0]
            group = torch.zeros(first.shape[0], dtype=torch.int64, device=first.device)
        return self.table.index_select(0, group.remainder(self.table.shape[0]))


class ConstantScore(Score):
    """Logits that are all 0 and have no parameters: uniform gates, or a layer of one expert.

    Args:
        num_experts: columns.

    Shape:
        features [N, ...] -> zeros [N, num_experts].

    Example:
        >>> ConstantScore(2)(torch.randn(1, 8))
        tensor([[0., 0.]])
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)

    @override
    def forward(self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        first = features if isinstance(features, Tensor) else features[0]
        return first.new_zeros(first.shape[0], self.num_outputs)


class RandomScore(Score):
    """Logits drawn anew at each call: the control that tells whether learned routing matters (THOR's claim).

    Training draws from torch's global generator (so seeds, resumption and checkpointing hold); evaluation draws from
    ``seed``, the same for every call of the same size, so that two evaluations agree. What a row gets then depends on
    its place in the batch, so that ``pool`` is ``batch``.

    Args:
        num_experts: columns.
        seed: of the draws in evaluation.
        per: one draw per row, or one for the whole batch (THOR).

    Shape:
        features [N, ...] -> logits [N, num_experts], N(0, 1).

    Source: THOR, Stochastic Mixture of Experts (docs/papers/core.md, equation 10).

    Example:
        >>> score = RandomScore(4, per="batch").eval()
        >>> bool((score(torch.zeros(5, 2)) == score(torch.zeros(5, 2))[0]).all())
        True
    """

    def __init__(self, num_experts: int, seed: int = 0, *, per: Literal["row", "batch"] = "row") -> None:
        super().__init__(num_experts)
        if per not in ("row", "batch"):
            raise ValueError(f"per={per!r}, but it must be 'row' or 'batch'.")
        self.seed, self.per = seed, per
        self.pool: Pool = "batch"

    @override
    def forward(self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        first = features if isinstance(features, Tensor) else features[0]
        shape = (first.shape[0] if self.per == "row" else 1, self.num_outputs)
        if self.training:
            logits = torch.randn(shape, device=first.device, dtype=first.dtype)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            logits = torch.randn(shape, generator=generator, dtype=first.dtype).to(first.device)
        return logits.expand(first.shape[0], -1)
