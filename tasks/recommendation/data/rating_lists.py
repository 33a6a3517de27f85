# SPDX-License-Identifier: Apache-2.0
"""Lists without leaks out of any log of ratings: (user, item, rating, time) and fields of the items.

A list belongs to the first rating of a user for an item, where it is high enough. Its history holds what the user rated
at STRICTLY earlier times. Its negatives are drawn by popularity in the training period, in the positive's own group of
items, from what the user never rates: that a thing will be rated later is looked up to avoid false negatives, and for
nothing else. Popularity is that among seen domains and the list's own, so that training lists hold known items alone:
else the id of the unknown would stand for a negative. No loop goes over rows or users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.recommendation.data.causal import past_events
from tasks.recommendation.data.factors import stream
from tasks.recommendation.data.lists import Lists

Ints = NDArray[np.int64]
ROUNDS = 64  # draws of a negative before its place stays empty


@dataclass(frozen=True)
class RatingLog:
    """A log of ratings in memory; users and items are numbered from 0.

    Attributes:
        user: [N].
        item: [N].
        rating: float64 [N].
        time: [N] seconds since 1970.
        domain: [N] number of the domain, -1 for none.
        item_ids: [I, F] fields of the items, 0 is unknown; the first is the item itself.
        group: [I] from 0: negatives come out of the positive's group.
        names: [I] what the files call the items, for reports.
    """

    user: Ints
    item: Ints
    rating: NDArray[np.float64]
    time: Ints
    domain: Ints
    item_ids: Ints
    group: Ints
    names: Any = None

    def __len__(self) -> int:
        """Return the number of ratings."""
        return len(self.user)

    def pairs(self) -> Ints:
        """One number per (user, item), [N]."""
        return self.user * len(self.group) + self.item


def first_liked(log: RatingLog, liked: float) -> Ints:
    """Return the ratings [L], in the order of the log, that are a user's first of an item and at least ``liked``."""
    order = np.lexsort((np.arange(len(log)), log.time, log.pairs()))
    first = order[np.diff(log.pairs()[order], prepend=-1) != 0]
    return np.sort(first[log.rating[first] >= liked])


def draw_negatives(
    log: RatingLog, rows: Ints, count: int, weight: NDArray[np.float64], rng: np.random.Generator
) -> Ints:
    """Draw items that a user never rates, without repeats, one after another by weight.

    Args:
        log: the ratings.
        rows: [n] the positives.
        count: negatives per positive.
        weight: [I]; items of weight 0 are never drawn.
        rng: random numbers.

    Returns:
        [n, count] items of the positive's group; -1 where none was found in `ROUNDS` draws.
    """
    order = np.argsort(log.group, kind="stable")
    ends = np.cumsum(weight[order])
    sizes = np.bincount(log.group, minlength=int(log.group.max(initial=-1)) + 1)
    bounds = np.concatenate([[0.0], ends])[np.concatenate([[0], np.cumsum(sizes)])]
    group, user = log.group[log.item[rows]], log.user[rows]
    low, high = bounds[group], bounds[group + 1]
    rated = np.unique(log.pairs())
    found = np.full((len(rows), count), -1, np.int64)
    for place in range(count):
        open_ = np.flatnonzero(high > low)
        for _ in range(ROUNDS):
            if len(open_) == 0:
                break
            at = low[open_] + rng.random(len(open_)) * (high[open_] - low[open_])
            # Rounding may reach past the last item: of the group, and of those with a weight.
            item = order[np.minimum(np.searchsorted(ends, at, side="right"), len(order) - 1)]
            pair = user[open_] * len(log.group) + item
            near = np.minimum(np.searchsorted(rated, pair), max(len(rated) - 1, 0))
            good = (rated[near] != pair) & (log.group[item] == group[open_]) & (weight[item] > 0)
            good &= ~(found[open_] == item[:, None]).any(1)
            found[open_[good], place] = item[good]
            open_ = open_[~good]
    # Places that stayed empty lie behind the others.
    return np.take_along_axis(found, np.argsort(found < 0, axis=1, kind="stable"), 1)


def rating_lists(
    log: RatingLog,
    rows: Ints,
    *,
    shown: NDArray[np.bool_],
    known: NDArray[np.bool_],
    history: int,
    negatives: int,
    power: float,
    same_group: bool,
    seed: int,
) -> Lists:
    """Make one list of each positive.

    Args:
        log: the ratings.
        rows: [n] the positives, out of `first_liked`.
        shown: [N] the ratings whose items' counts are the popularity: those before the validation begins, of the seen
            domains and of the lists' own.
        known: [I] items that training shows; the id of another is 0.
        history: longest history.
        negatives: per list.
        power: of the popularity by which they are drawn.
        same_group: tell the positive's group (plus 1) as the request.
        seed: of negatives and places.
    """
    popularity = np.bincount(log.item[shown], minlength=len(log.group)).astype(np.float64)
    weight = np.where(popularity > 0, np.maximum(popularity, 1) ** power, 0.0)
    drawn = draw_negatives(log, rows, negatives, weight, stream(seed, "negatives"))
    events = past_events(log.user, log.time, rows, history)
    past = np.where(events >= 0, log.item[events], -1)
    fields = log.item_ids.copy()
    fields[~known, 0] = 0
    return make_lists(
        fields,
        past=past,
        candidates=np.column_stack([log.item[rows], drawn]),
        group=log.group[log.item[rows]],
        same_group=same_group,
        profile=np.zeros((len(rows), 0), np.int64),
        user=log.user[rows],
        row=rows,
        seed=seed,
    )


def make_lists(
    item_ids: Ints,
    *,
    past: Ints,
    candidates: Ints,
    group: Ints,
    same_group: bool,
    profile: Ints,
    user: Ints,
    row: Ints,
    seed: int,
) -> Lists:
    """Put lists together; the positive comes to stand at a random place.

    Args:
        item_ids: [I, F] fields of the items.
        past: [n, H] items of the history, latest first; -1 is padding.
        candidates: [n, N] items, the positive first; -1 is padding, and stands behind.
        group: [n] group of the positive, from 0.
        same_group: tell the group (plus 1) as the request.
        profile: [n, U] fields of the users.
        user: [n].
        row: [n] numbers of the lists.
        seed: of the places.
    """
    candidates, label = shuffled(candidates, seed)
    columns: dict[str, NDArray[Any]] = {
        "history": np.where(past[..., None] >= 0, item_ids[past], 0),
        "history_mask": past >= 0,
        "history_item": past,
        "candidates": np.where(candidates[..., None] >= 0, item_ids[candidates], 0),
        "candidate_mask": candidates >= 0,
        "candidate_item": candidates,
        "label": label,
        "query": 1 + group[:, None] if same_group else np.zeros((len(row), 0), np.int64),
        "profile": profile,
        "user": user,
        "row": row,
        "factor": group,
    }
    return Lists(**{name: torch.from_numpy(values) for name, values in columns.items()})


def shuffled(candidates: Ints, seed: int) -> tuple[Ints, NDArray[np.float32]]:
    """Put the positive, which stands first, at a random place; padding (-1) stays behind. Returns labels as well."""
    label = np.zeros(candidates.shape, np.float32)
    label[:, 0] = 1
    key = stream(seed, "places").random(label.shape)
    key[candidates < 0] = 2
    order = np.argsort(key, axis=1)
    return np.take_along_axis(candidates, order, 1), np.take_along_axis(label, order, 1)
