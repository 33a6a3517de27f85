# SPDX-License-Identifier: Apache-2.0
"""The batches of personalised ranking: lists of candidates, each for one user with a history.

B lists, N candidates per list, H past items, F fields of an item, Q fields of the request, U fields of the user.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from moeapps.data.gather import Rows
from tasks.recommendation.data.batch import check_ids


@dataclass
class Lists(Rows):
    """Some lists, a batch or a whole table.

    Attributes:
        history: int64 [B, H, F], fields of the user's past items, latest first; 0 is unknown and padding.
        history_mask: bool [B, H], True at real past items; a row may be all False (a new user).
        history_item: int64 [B, H], numbers of the past items in their source, -1 at padding; for reports only.
        candidates: int64 [B, N, F], fields of the candidates.
        candidate_mask: bool [B, N], False at padding of a short list.
        candidate_item: int64 [B, N], numbers of the candidates in their source, -1 at padding.
        label: float32 [B, N], 1 for what the user took, else 0; 0 at padding.
        query: int64 [B, Q], fields of the request (query or context), Q may be 0.
        profile: int64 [B, U], fields of the user that may be read (age, sex ...), U may be 0; never the user's number.
        user: int64 [B], whose list it is: groups of GAUC, false negatives of the contrastive loss.
        row: int64 [B], number of the list in its source, for predictions.
        factor: int64 [B], what an expert may stand for where it is known (taste, genre of the positive), else -1.
        oracle: float32 [B, N], where the source knows it the probability that a candidate is the ONE of its list that
            the user takes (a row sums to 1); else None.
    """

    history: Tensor
    history_mask: Tensor
    history_item: Tensor
    candidates: Tensor
    candidate_mask: Tensor
    candidate_item: Tensor
    label: Tensor
    query: Tensor
    profile: Tensor
    user: Tensor
    row: Tensor
    factor: Tensor
    oracle: Tensor | None = None


def truncated(batch: Lists, keep: int) -> Lists:
    """Return the lists with no more than the ``keep`` latest past items of each user; the rest becomes padding.

    The same lists with less known of the user: what a score loses by it is a paired comparison.

    Raises:
        ValueError: ``keep`` below 0.
    """
    if keep < 0:
        raise ValueError(f"keep={keep} past items is not possible; use 0 (no history) or more")
    mask = batch.history_mask & (batch.history_mask.cumsum(1) <= keep)
    history = batch.history.where(mask.unsqueeze(2), 0)
    return replace(batch, history=history, history_mask=mask, history_item=batch.history_item.where(mask, -1))


@dataclass(frozen=True)
class ListSchema:
    """The sizes of the columns of `Lists`, known before any row is read.

    Args:
        item_fields: fields of an item: name -> cardinality, id 0 (unknown, padding) included; the first is the item.
        query_fields: fields of a request; may be empty. The names ``category`` and ``query`` mean what they say.
        profile_fields: fields of a user; may be empty.
        history: H, the longest history.
        candidates: N, the longest list.
        factors: names of the values of ``Lists.factor``; empty where nothing is known.

    Raises:
        ValueError: no item field, a cardinality below 2, or no room for a history or a candidate.
    """

    item_fields: dict[str, int]
    query_fields: dict[str, int]
    profile_fields: dict[str, int]
    history: int
    candidates: int
    factors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.item_fields:
            raise ValueError("item_fields is empty; give at least the item itself")
        for name, size in {**self.item_fields, **self.query_fields, **self.profile_fields}.items():
            if size < 2:
                raise ValueError(f"field {name!r} has cardinality {size}; id 0 is unknown, so give 2 or more")
        if self.history < 1 or self.candidates < 1:
            raise ValueError(f"history={self.history}, candidates={self.candidates}; both must be 1 or more")

    def check(self, table: Lists, name: str) -> None:
        """Compare a table with the sizes and with what a list may be.

        Args:
            table: the lists.
            name: what to call the table in an error.

        Raises:
            ValueError: a column of another shape, an id beyond its cardinality, a label that is neither 0 nor 1 or lies
                on padding, a factor without a name, a list without a candidate, with one twice or with one that lies in
                its own history. The text names the field or the row.
        """
        B, H, N = len(table), self.history, self.candidates
        shapes = {
            "history": (B, H, len(self.item_fields)),
            "history_mask": (B, H),
            "history_item": (B, H),
            "candidates": (B, N, len(self.item_fields)),
            "candidate_mask": (B, N),
            "candidate_item": (B, N),
            "label": (B, N),
            "query": (B, len(self.query_fields)),
            "profile": (B, len(self.profile_fields)),
            **{"user": (B,), "row": (B,), "factor": (B,)},
            **({} if table.oracle is None else {"oracle": (B, N)}),
        }
        for column, shape in shapes.items():
            if getattr(table, column).shape != shape:
                raise ValueError(f"{name}: {column} has shape {tuple(getattr(table, column).shape)}, expected {shape}")
        for part, sizes in (
            ("history", self.item_fields),
            ("candidates", self.item_fields),
            ("query", self.query_fields),
            ("profile", self.profile_fields),
        ):
            for j, (field, size) in enumerate(sizes.items()):
                check_ids(getattr(table, part)[..., j], size, f"{name}: {part} field {field!r}")
        if not ((table.label == 0) | ((table.label == 1) & table.candidate_mask)).all():
            raise ValueError(f"{name}: labels must be 0 or 1, and 0 at padding")
        _check_rows(~table.candidate_mask.any(1), f"{name}: list {{}} has no candidate; leave it out")
        if self.factors:
            nameless = (table.factor < -1) | (table.factor >= len(self.factors))
            _check_rows(nameless, f"{name}: list {{}} has a factor that is neither -1 nor one of {len(self.factors)}")
        twice = table.candidate_item.unsqueeze(2) == table.candidate_item.unsqueeze(1)
        twice = twice.triu(1) & (table.candidate_item >= 0).unsqueeze(2)
        _check_rows(twice.any(2).any(1), f"{name}: list {{}} has the same candidate twice; drop one of the two")
        same = table.candidate_item.unsqueeze(2) == table.history_item.unsqueeze(1)
        repeated = (same & (table.candidate_item >= 0).unsqueeze(2)).any(2).any(1)
        _check_rows(repeated, f"{name}: list {{}} has a candidate that lies in its own history; drop one of the two")

    def facts(self) -> dict[str, Any]:
        """Return the plain dictionary that networks are built from."""
        return {
            "item_fields": dict(self.item_fields),
            "query_fields": dict(self.query_fields),
            "profile_fields": dict(self.profile_fields),
            "history": self.history,
            "candidates": self.candidates,
            "factors": list(self.factors),
        }


def _check_rows(wrong_B: Tensor, message: str) -> None:
    if wrong_B.any():
        raise ValueError(message.format(int(wrong_B.nonzero()[0])))
