# SPDX-License-Identifier: Apache-2.0
"""From columns to one vector per row: embeddings of ids, weighted means of bags, scaled numbers.

All fields share one table, each with rows of its own: one lookup for all single-valued fields. How ids find their rows
is behind a seam (`EmbeddingBackend`): a plain row per id, or a fixed number of rows that hashes share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.recommendation.data.batch import Interactions

_GOLDEN = 0x9E3779B97F4A7C15


class EmbeddingBackend(nn.Module):
    """One table for several fields. A subclass says how many rows there are and which row an id has.

    Args:
        sizes: cardinality of each field, id 0 included.
        dim: width of an embedding.
        num_rows: rows of the table.
        sparse: gradients hold the touched rows only; `moeapps.training.sparse` then steps those alone.
        std: standard deviation of the first values. Id 0 (unknown) begins at 0.

    Raises:
        ValueError: a size below 2, or dim or std not above 0.
    """

    def __init__(self, sizes: list[int], dim: int, num_rows: int, *, sparse: bool = False, std: float = 0.05) -> None:
        super().__init__()
        if dim < 1 or std <= 0 or any(size < 2 for size in sizes):
            raise ValueError(f"sizes={sizes}, dim={dim}, std={std}: sizes must be 2 or more, dim and std above 0")
        self.sizes, self.dim = list(sizes), dim
        self.table = nn.Embedding(num_rows, dim, sparse=sparse)
        nn.init.normal_(self.table.weight, std=std)
        with torch.no_grad():
            self.table.weight[self.unknown_rows()] = 0.0

    def rows(self, field: int, ids: Tensor) -> Tensor:
        """Return the table rows of ids (int64, any shape) of one field."""
        raise TypeError(f"{type(self).__name__} must define rows(field, ids)")

    def unknown_rows(self) -> Tensor:
        """Return the table rows of id 0 of all fields, int64."""
        return torch.stack([self.rows(field, torch.tensor(0)) for field in range(len(self.sizes))])

    def lookup(self, rows: Tensor) -> Tensor:
        """Return embeddings [..., dim] of table rows [...]."""
        return self.table(rows)  # type: ignore[no-any-return]

    def mean(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Return sum(weight * embedding) per bag, [B, dim]; rows int64 [B, L], weight [B, L]."""
        summed = F.embedding_bag(
            rows, self.table.weight, mode="sum", per_sample_weights=weight, sparse=self.table.sparse
        )
        return summed[0] if isinstance(summed, tuple) else summed

    def check(self, field: int, ids: Tensor, name: str) -> None:
        """Raise ValueError where an id is outside [0, size) of its field."""
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.sizes[field]):
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise ValueError(
                f"field {name!r} holds id {wrong}, its table has rows for 0 to {self.sizes[field] - 1}; raise the "
                "field's cardinality, hash the ids, or use HashTable"
            )


class PlainTable(EmbeddingBackend):
    """A row for every id.

    Args:
        sizes: cardinality of each field, id 0 included.
        dim: width of an embedding.
        sparse: gradients hold the touched rows only: for tables of 100,000 rows and more.
        std: standard deviation of the first values.
    """

    def __init__(self, sizes: list[int], dim: int, *, sparse: bool = False, std: float = 0.05) -> None:
        self.offsets = [sum(sizes[:k]) for k in range(len(sizes))]
        super().__init__(sizes, dim, max(1, sum(sizes)), sparse=sparse, std=std)

    def rows(self, field: int, ids: Tensor) -> Tensor:
        """Shift ids to the rows of their field."""
        return ids + self.offsets[field]


class HashTable(EmbeddingBackend):
    """A fixed number of rows that all ids of all fields share by a seeded hash; any id is accepted.

    Args:
        sizes: cardinality of each field; only the number of fields matters.
        dim: width of an embedding.
        num_rows: rows of the table, 2 or more; row 0 is for unknown ids.
        seed: another seed gives other collisions.
        sparse: gradients hold the touched rows only.
        std: standard deviation of the first values.

    Raises:
        ValueError: fewer than 2 rows.
    """

    def __init__(
        self,
        sizes: list[int],
        dim: int,
        *,
        num_rows: int = 1_000_000,
        seed: int = 0,
        sparse: bool = False,
        std: float = 0.05,
    ) -> None:
        if num_rows < 2:
            raise ValueError(f"num_rows={num_rows} is not allowed; use 2 or more")
        self.num_rows, self.seed = num_rows, seed
        super().__init__(sizes, dim, num_rows, sparse=sparse, std=std)

    def rows(self, field: int, ids: Tensor) -> Tensor:
        """Hash (field, id) to 1 .. num_rows - 1; id 0 has row 0."""
        x = ids + _signed((self.seed * 1_000_003 + field + 1) * _GOLDEN)
        x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
        x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
        hashed = _shift(x ^ _shift(x, 31), 1)
        return torch.where(ids == 0, 0, 1 + hashed % (self.num_rows - 1))

    def check(self, field: int, ids: Tensor, name: str) -> None:
        """Refuse negative ids alone."""
        if ids.numel() and int(ids.min()) < 0:
            raise ValueError(f"field {name!r} holds id {int(ids.min())}; ids are 0 (unknown) or more")


def _signed(number: int) -> int:
    """The low 64 bits of a number, as the signed number that int64 arithmetic takes them for."""
    low = number % (1 << 64)
    return low - (1 << 64) if low >= 1 << 63 else low


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


TableFactory = Callable[[list[int], int], EmbeddingBackend]


class FeatureEncoder(nn.Module):
    """All features of a row as one vector: [dense | fields | bags].

    A bag's part is the mean over its entries of weight times embedding; an empty bag gives 0.

    Args:
        facts: ``dense_dim``, ``fields`` and ``bags`` of the data module's facts.
        dim: width of each field's and bag's embedding.
        table: (sizes, dim) -> table of all fields; None means a `PlainTable` with dense gradients.
        shared: bag -> field (or bag) whose rows it reads, e.g. a history of items those of the item.
        normalise: scale dense features by their running mean and variance (batch normalisation without weights).
        check_ids: compare ids with their tables, one reduction per field and batch; off saves a wait on a GPU.

    Shape:
        forward(batch) -> float [B, ``out_dim``], out_dim = dense_dim + dim * (fields + bags).

    Raises:
        ValueError: ``facts`` lacks an entry, there is no feature at all, or ``shared`` names what is not there or
            joins fields of different cardinality.
    """

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        dim: int = 8,
        table: TableFactory | None = None,
        shared: dict[str, str] | None = None,
        normalise: bool = True,
        check_ids: bool = True,
    ) -> None:
        super().__init__()
        missing = {"dense_dim", "fields", "bags"} - set(facts)
        if missing:
            raise ValueError(f"facts lacks {sorted(missing)}; give the facts of RecommendationData")
        self.fields, self.bags = dict(facts["fields"]), dict(facts["bags"])
        self.dense_dim, self.dim, self.check_ids = int(facts["dense_dim"]), dim, check_ids
        self.out_dim = self.dense_dim + dim * (len(self.fields) + len(self.bags))
        if self.out_dim == 0:
            raise ValueError("the data has no feature: no dense column, no id field and no bag; give it at least one")
        self.place = self._places(shared or {})
        sizes = self._sizes()
        self.table = (table or PlainTable)(sizes, dim) if sizes else None
        self.scale = nn.BatchNorm1d(self.dense_dim, affine=False) if normalise and self.dense_dim else None

    def _places(self, shared: dict[str, str]) -> dict[str, int]:
        """Which part of the table each field and bag reads."""
        all_sizes = {**self.fields, **self.bags}
        for bag, owner in shared.items():
            if bag not in self.bags or owner not in all_sizes or owner in shared:
                raise ValueError(
                    f"shared: {bag} -> {owner} is not possible; bags are {sorted(self.bags)}, and what they may share "
                    f"with {sorted(set(all_sizes) - set(shared))}"
                )
            if all_sizes[bag] != all_sizes[owner]:
                raise ValueError(
                    f"shared: {bag} has cardinality {all_sizes[bag]}, {owner} {all_sizes[owner]}; they must be equal"
                )
        owners = [name for name in all_sizes if name not in shared]
        return {name: owners.index(shared.get(name, name)) for name in all_sizes}

    def _sizes(self) -> list[int]:
        sizes = {place: {**self.fields, **self.bags}[name] for name, place in self.place.items()}
        return [sizes[place] for place in range(len(sizes))]

    def forward(self, batch: Interactions) -> Tensor:
        """Return the vectors of a batch."""
        parts = [batch.dense if self.scale is None else self._scaled(batch.dense)] if self.dense_dim else []
        if self.fields:
            parts.append(self._fields(batch.ids))
        parts += [self._bag(name, *batch.bags[name]) for name in self.bags]
        return torch.cat(parts, 1)

    def _scaled(self, dense: Tensor) -> Tensor:
        assert self.scale is not None
        if self.training and len(dense) < 2:
            raise ValueError("a training batch of one row has no variance to scale by; use batch_size 2 or more")
        return self.scale(dense)  # type: ignore[no-any-return]

    def _fields(self, ids: Tensor) -> Tensor:
        assert self.table is not None
        columns = []
        for j, name in enumerate(self.fields):
            if self.check_ids and not torch.compiler.is_exporting():  # a graph holds no errors
                self.table.check(self.place[name], ids[:, j], name)
            columns.append(self.table.rows(self.place[name], ids[:, j]))
        return self.table.lookup(torch.stack(columns, 1)).flatten(1)

    def _bag(self, name: str, ids: Tensor, weight: Tensor) -> Tensor:
        assert self.table is not None
        if self.check_ids and not torch.compiler.is_exporting():  # a graph holds no errors
            self.table.check(self.place[name], ids, name)
        filled = ids != 0
        share = torch.where(filled, weight, 0) / filled.sum(1, keepdim=True).clamp(min=1)
        return self.table.mean(self.table.rows(self.place[name], ids), share.to(self.table.table.weight.dtype))
