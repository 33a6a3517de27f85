# SPDX-License-Identifier: Apache-2.0
"""Features known just before each rating, from STRICTLY earlier times, without a loop over rows.

Half of the events of MovieLens 100K share their time with the user's event before (ratings were sent page by page), so
the order inside a time is unknowable: an event of the same second is never in the past of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

PRIOR = 3.5  # mean of a rating where nothing is known; a constant, so that nothing of the log leaks into it


@dataclass(frozen=True)
class Past:
    """The past of every event, in the order of the log.

    Attributes:
        history: int64 [N, H] events (rows of the log) of the same user at earlier times, latest first; -1 for none.
        user_count: int64 [N], number of the user's earlier events.
        user_mean: float64 [N], their mean rating; one rating of `PRIOR` is added.
        item_count: int64 [N], number of the item's earlier events.
        item_mean: float64 [N], their mean rating; five ratings of `PRIOR` are added.
        next_time: float64 [N], time of the user's next event at a later time; infinite if there is none.
        page: int64 [N], number of the (user, time) that the event belongs to.
        share: float64 [N] in [0, 1), the part of the user's events that lies before the event's page.
    """

    history: Ints
    user_count: Ints
    user_mean: NDArray[np.float64]
    item_count: Ints
    item_mean: NDArray[np.float64]
    next_time: NDArray[np.float64]
    page: Ints
    share: NDArray[np.float64]


def look_back(user: Ints, item: Ints, rating: Ints, time: Ints, length: int = 20) -> Past:
    """Find the past of every event.

    Args:
        user: [N].
        item: [N].
        rating: [N].
        time: [N], any order.
        length: H, events of the history that are kept.
    """
    order, first, page, ends = _runs(user, time)
    before = page - first  # the user's events earlier than the page
    places = page[:, None] - 1 - np.arange(length)
    inside = places >= first[:, None]
    history = np.where(inside, order[np.where(inside, places, 0)], -1)
    sorted_time, last = time[order].astype(np.float64), len(order)
    later = np.where(ends < last, sorted_time[np.minimum(ends, last - 1)], np.inf) if last else sorted_time
    same_user = np.append(user[order], -1)[ends] == user[order]
    _, per_user = np.unique(user[order], return_inverse=True)
    total = np.bincount(per_user)[per_user] if last else before
    item_order, item_first, item_page, _ = _runs(item, time)
    item_before = item_page - item_first
    return Past(
        history=_back(history, order),
        user_count=_back(before, order),
        user_mean=_back(_mean(rating[order], first, page, 1), order),
        item_count=_back(item_before, item_order),
        item_mean=_back(_mean(rating[item_order], item_first, item_page, 5), item_order),
        next_time=_back(np.where(same_user, later, np.inf), order),
        page=_back(page, order),
        share=_back(before / np.maximum(total, 1), order),
    )


def past_events(user: Ints, time: Ints, rows: Ints, length: int) -> Ints:
    """Return the history of some events only, [n, H], as `Past.history` has it; what a long log can hold.

    Args:
        user: [N].
        time: [N], any order.
        rows: [n], the events.
        length: H, events of the history that are kept.
    """
    order, first, page, _ = _runs(user, time)
    sorted_place = np.empty_like(order)
    sorted_place[order] = np.arange(len(order))
    at = sorted_place[rows]
    places = page[at][:, None] - 1 - np.arange(length)
    inside = places >= first[at][:, None]
    return np.where(inside, order[np.where(inside, places, 0)], -1)


def _runs(key: Ints, time: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Sort by (key, time); return the order and, per sorted place, where its key begins, its page begins and ends."""
    order = np.lexsort((time, key))
    k, t, place = key[order], time[order], np.arange(len(order))
    new_key = np.ones(len(order), np.bool_)
    new_key[1:] = k[1:] != k[:-1]
    new_page = new_key.copy()
    new_page[1:] |= t[1:] != t[:-1]
    first = np.maximum.accumulate(np.where(new_key, place, 0))
    page = np.maximum.accumulate(np.where(new_page, place, 0))
    ends = np.append(np.flatnonzero(new_page)[1:], len(order))[np.cumsum(new_page) - 1] if len(order) else place
    return order, first, page, ends


def _mean(rating: Ints, first: Ints, page: Ints, prior: int) -> NDArray[np.float64]:
    total = np.concatenate([[0], np.cumsum(rating)])
    return np.asarray((total[page] - total[first] + prior * PRIOR) / (page - first + prior))


def _back(values: NDArray[Any], order: Ints) -> NDArray[Any]:
    """Undo a sort."""
    result = np.empty_like(values)
    result[order] = values
    return result
