# SPDX-License-Identifier: Apache-2.0
"""The networks of this task as modules of plain tensors, for export.

Shape legend: B rows or lists, N candidates, H past items, F fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tasks.recommendation.data.batch import Interactions
from tasks.recommendation.data.lists import Lists

ROWS = 3
"""Rows of the examples that a program is traced with."""


class RowProgram(nn.Module):
    """Probabilities [B, T] from dense [B, F], ids [B, J] and, bag by bag, ids and weights [B, L]."""

    def __init__(self, net: nn.Module, bags: Sequence[str]) -> None:
        super().__init__()
        self.net, self.bags = net, tuple(bags)

    def forward(self, dense: Tensor, ids: Tensor, *bags: Tensor) -> Tensor:
        """Answer."""
        pairs = zip(bags[::2], bags[1::2], strict=True)
        row = torch.arange(dense.shape[0], device=dense.device)
        unknown = torch.zeros(dense.shape[0], 1, device=dense.device)
        batch = Interactions(dense, ids, dict(zip(self.bags, pairs, strict=True)), unknown, unknown.bool(), row, row)
        probability: Tensor = self.net(batch).sigmoid()
        return probability


class ListProgram(nn.Module):
    """Probabilities [B, N] from history [B, H, F], candidates [B, N, F], query [B, Q] and profile [B, U]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, history: Tensor, candidates: Tensor, query: Tensor, profile: Tensor) -> Tensor:
        """Answer; an item whose first field is 0 is padding."""
        past, real = history[:, :, 0] != 0, candidates[:, :, 0] != 0
        row = torch.arange(len(history), device=history.device)
        number = (history[:, :, 0], candidates[:, :, 0])
        label = torch.zeros_like(candidates[:, :, 0], dtype=torch.float32)
        batch = Lists(history, past, number[0], candidates, real, number[1], label, query, profile, row, row, row)
        probability: Tensor = self.net(batch).logits.sigmoid().where(real, 0)
        return probability


def row_inputs(facts: dict[str, Any]) -> dict[str, Tensor]:
    """Example inputs of a `RowProgram`."""
    ids = [torch.arange(ROWS) % size for size in facts["fields"].values()]
    empty = torch.zeros(ROWS, 0, dtype=torch.int64)
    found = {"dense": torch.linspace(-1, 1, ROWS * facts["dense_dim"]).view(ROWS, -1)}
    found["ids"] = torch.stack(ids, 1) if ids else empty
    for name in facts["bags"]:
        found[name] = torch.tensor([[1, 0], [1, 1], [0, 0]])
        found[f"{name}_weight"] = torch.ones(ROWS, 2)
    return found


def list_inputs(facts: dict[str, Any], candidates: int) -> dict[str, Tensor]:
    """Example inputs of a `ListProgram`."""

    def ids(fields: dict[str, int], *lead: int) -> Tensor:
        count = torch.arange(torch.Size(lead).numel()).view(lead)
        parts = [1 + count % (size - 1) for size in fields.values()]
        return torch.stack(parts, -1) if parts else torch.zeros(*lead, 0, dtype=torch.int64)

    return {
        "history": ids(facts["item_fields"], ROWS, facts["history"]),
        "candidates": ids(facts["item_fields"], ROWS, candidates),
        "query": ids(facts["query_fields"], ROWS),
        "profile": ids(facts["profile_fields"], ROWS),
    }
