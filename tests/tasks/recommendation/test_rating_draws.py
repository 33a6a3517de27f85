# SPDX-License-Identifier: Apache-2.0
"""How lists are drawn from a log of ratings: what counts as liked, what came before, which negatives, which split."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.recommendation.data.causal import look_back, past_events
from tasks.recommendation.data.rating_lists import RatingLog, draw_negatives, first_liked, rating_lists, shuffled
from tasks.recommendation.data.readers.rating_reader import time_cuts


def test_every_first_rating_that_is_high_gives_one_list() -> None:
    rows = [(0, 0, 5, 9), (0, 0, 5, 3), (0, 1, 3, 1), (0, 1, 5, 2), (1, 0, 4, 5), (1, 2, 5, 5), (1, 2, 5, 5)]
    user, item, rating, time = np.array(rows).T

    # (0, 0) was first rated by row 1; (0, 1) first by row 2, low; of two equal rows the first counts.
    assert first_liked(small_log(user, item, rating, time), 4).tolist() == [1, 4, 5]


def small_log(user: Any, item: Any, rating: Any, time: Any, group: Any = None) -> RatingLog:
    items = int(np.max(item, initial=0)) + 1 if group is None else len(group)
    ids = np.column_stack([1 + np.arange(items), 1 + np.arange(items) % 3])
    group = np.zeros(items, np.int64) if group is None else np.array(group)
    return RatingLog(
        np.array(user), np.array(item), np.array(rating, float), np.array(time), np.zeros(len(user), int), ids, group
    )


events = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(1, 5), st.integers(0, 9)), min_size=1)


@given(events, st.integers(1, 4))
def test_histories_of_some_events_are_those_of_all_and_what_a_loop_finds(rows: Any, length: int) -> None:
    user, item, rating, time = np.array(rows).T
    some = np.arange(0, len(rows), 2)
    found = past_events(user, time, some, length)

    assert np.array_equal(found, look_back(user, item, rating, time, length).history[some])
    for k, row in zip(found, some, strict=True):
        earlier = [j for j in range(len(rows)) if user[j] == user[row] and time[j] < time[row]]
        assert [time[j] for j in k if j >= 0] == sorted((time[j] for j in earlier), reverse=True)[:length]
        assert set(k[k >= 0]) <= set(earlier)


@settings(deadline=None)
@given(events, st.integers(0, 2**31), st.lists(st.integers(0, 1), min_size=7, max_size=7))
def test_negatives_are_never_rated_of_the_positives_group_and_without_repeats(rows: Any, seed: int, group: Any) -> None:
    user, item, rating, time = np.array(rows).T
    log = small_log(user, item, rating, time, group)
    weight = np.bincount(item, minlength=7).astype(float)
    found = draw_negatives(log, np.arange(len(rows)), 3, weight, np.random.default_rng(seed))

    for k, drawn in enumerate(found):
        mine = set(item[user == user[k]])
        allowed = [i for i in range(7) if weight[i] and i not in mine and group[i] == group[item[k]]]
        real = [i for i in drawn if i >= 0]
        assert set(real) <= set(allowed)
        assert len(set(real)) == len(real)
        assert real == drawn[: len(real)].tolist()  # padding stands behind
        if not allowed:
            assert not real


def test_negatives_are_drawn_as_often_as_their_weights_say() -> None:
    n = 40_000
    log = small_log(np.zeros(n, int), np.zeros(n, int), np.ones(n), np.arange(n), group=[0, 0, 0, 0, 1])
    weight = np.array([5.0, 1.0, 2.0, 0.0, 9.0])
    found = draw_negatives(log, np.arange(n), 1, weight, np.random.default_rng(0))[:, 0]

    # Item 0 is rated, 3 has no weight, 4 is of another group.
    assert set(found.tolist()) == {1, 2}
    assert abs((found == 2).mean() - 2 / 3) < 4 * np.sqrt(2 / 9 / n)
    two = draw_negatives(log, np.arange(100), 3, weight, np.random.default_rng(0))
    assert np.array_equal(np.sort(two, 1), np.tile([-1, 1, 2], (100, 1)))


def test_the_positive_stands_at_each_place_equally_often_and_padding_behind() -> None:
    candidates, label = shuffled(np.tile([7, 8, 9, -1], (30_000, 1)), seed=0)

    assert (candidates[:, 3] == -1).all()
    assert (candidates[label == 1] == 7).all()
    assert np.abs(label[:, :3].mean(0) - 1 / 3).max() < 4 * np.sqrt(2 / 9 / 30_000)


def test_items_that_training_does_not_show_have_no_id_anywhere() -> None:
    user, item, time = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 3]), np.array([1, 2, 9, 1, 8])
    log = small_log(user, item, [5] * 5, time)
    train = time < 5
    known = np.bincount(item[train], minlength=4) > 0
    lists = rating_lists(
        log, np.array([2]), shown=train, known=known, history=4, negatives=2, power=1.0, same_group=True, seed=0
    )

    assert lists.history_item.tolist() == [[1, 0, -1, -1]]
    assert lists.history[0].tolist() == [[2, 2], [1, 1], [0, 0], [0, 0]]
    assert lists.history_mask.tolist() == [[True, True, False, False]]
    # The user rated all known items, and item 3 was never in training: a list of one candidate, without its id.
    assert lists.candidate_item.tolist() == [[2, -1, -1]]
    assert lists.candidates[0].tolist() == [[0, 3], [0, 0], [0, 0]]
    assert lists.query.tolist() == [[1]]


@given(st.lists(st.integers(0, 20), min_size=5, max_size=60))
def test_no_second_lies_in_two_splits(times: list[int]) -> None:
    array = np.array(times)
    period = np.searchsorted(time_cuts(array, (0.5, 0.7)), array, side="right")

    for a, b in ((0, 1), (0, 2), (1, 2)):
        if (period == a).any() and (period == b).any():
            assert array[period == a].max() < array[period == b].min()
