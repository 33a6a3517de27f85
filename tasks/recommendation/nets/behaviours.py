# SPDX-License-Identifier: Apache-2.0
"""From the columns of lists to vectors: past items and candidates by one network, the request, the user's profile.

Shape legend: B lists, H past items, N candidates, F fields, d width, e width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tasks.recommendation.data.lists import Lists
from tasks.recommendation.nets.embeddings import EmbeddingBackend, PlainTable, TableFactory


@dataclass(frozen=True)
class Encoded:
    """Lists as vectors.

    Attributes:
        history_BHd: past items.
        mask_BH: bool, which are real.
        target_BNd: candidates.
        query_Bd: the request; None where the data has no field of it.
        rest_Bo: query and profile as the experts read them, [B, o]; o may be 0.
    """

    history_BHd: Tensor
    mask_BH: Tensor
    target_BNd: Tensor
    query_Bd: Tensor | None
    rest_Bo: Tensor


class ListEncoder(nn.Module):
    """Embeddings of all fields, then one network for past items and candidates alike, and one for the request.

    Args:
        facts: ``item_fields``, ``query_fields``, ``profile_fields`` and ``history`` of the data module's facts.
        dim: d, width of items and requests.
        embedding_dim: e, width of the embedding of a field.
        hidden: hidden width of the two networks.
        positions: add a learned vector per place in the history (1 is the latest); the paper's form knows no order.
        table: (sizes, e) -> table of the fields; None means a `PlainTable`.
        check_ids: compare ids with their tables, one reduction per field and batch; off saves a wait on a GPU.

    Attributes:
        rest_dim: o, width of query and profile together.

    Raises:
        ValueError: ``facts`` lacks an entry or names no item field; an id beyond its table.
    """

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        dim: int = 16,
        embedding_dim: int = 8,
        hidden: int = 32,
        positions: bool = False,
        table: TableFactory | None = None,
        check_ids: bool = True,
    ) -> None:
        super().__init__()
        missing = {"item_fields", "query_fields", "profile_fields", "history"} - set(facts)
        if missing or not facts["item_fields"]:
            raise ValueError(
                f"facts lacks {sorted(missing) or 'a field of the items'}; give the facts of ListData, whose source "
                "names at least one field of an item"
            )
        make = table or PlainTable
        self.items, self.queries, self.profiles = (
            dict(facts[name]) for name in ("item_fields", "query_fields", "profile_fields")
        )
        self.dim, self.check_ids = dim, check_ids
        self.item_table = make(list(self.items.values()), embedding_dim)
        self.item_net = _net(embedding_dim * len(self.items), hidden, dim)
        self.query_table = make(list(self.queries.values()), embedding_dim) if self.queries else None
        self.query_net = _net(embedding_dim * len(self.queries), hidden, dim) if self.queries else None
        self.profile_table = make(list(self.profiles.values()), embedding_dim) if self.profiles else None
        self.rest_dim = dim * bool(self.queries) + embedding_dim * len(self.profiles)
        self.positions = nn.Parameter(0.05 * torch.randn(int(facts["history"]), dim)) if positions else None

    def forward(self, batch: Lists) -> Encoded:
        """Return the vectors of a batch."""
        places = batch.history.shape[1]
        items = torch.cat([batch.history, batch.candidates], 1)
        items_BId = self.item_net(self._embedded(items, self.item_table, self.items))
        history_BHd, target_BNd = items_BId[:, :places], items_BId[:, places:]
        if self.positions is not None:
            history_BHd = history_BHd + self.positions[:places]
        query_Bd, rest = None, []
        if self.query_table is not None and self.query_net is not None:
            query_Bd = self.query_net(self._embedded(batch.query, self.query_table, self.queries))
            rest.append(query_Bd)
        if self.profile_table is not None:
            rest.append(self._embedded(batch.profile, self.profile_table, self.profiles))
        rest_Bo = torch.cat(rest, 1) if rest else target_BNd[:, 0, :0]
        return Encoded(history_BHd, batch.history_mask, target_BNd, query_Bd, rest_Bo)

    def _embedded(self, ids: Tensor, table: EmbeddingBackend, fields: dict[str, int]) -> Tensor:
        """Embeddings side by side, [..., F * e], of ids [..., F]."""
        columns = []
        for k, name in enumerate(fields):
            if self.check_ids and not torch.compiler.is_exporting():  # a graph holds no errors
                table.check(k, ids[..., k], name)
            columns.append(table.rows(k, ids[..., k]))
        found = table.lookup(torch.stack(columns, -1))
        return found.flatten(-2)


def _net(dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, out_dim))
