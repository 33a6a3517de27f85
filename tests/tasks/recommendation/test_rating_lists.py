# SPDX-License-Identifier: Apache-2.0
"""Lists of rating logs: histories strictly earlier, negatives never rated, and the published files as they are."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.recommendation.data.causal import look_back, past_events
from tasks.recommendation.data.rating_lists import RatingLog, draw_negatives, first_liked, rating_lists, shuffled
from tasks.recommendation.data.readers.amazon import AmazonReviews
from tasks.recommendation.data.readers.kuairand import KuaiRand
from tasks.recommendation.data.readers.kuairec import KuaiRec
from tasks.recommendation.data.readers.movielens_files import MovieLens1M, MovieLens25M
from tasks.recommendation.data.readers.rating_reader import RatingImpressions, RatingLists, RatingReader, time_cuts
from tasks.recommendation.data.readers.values import TableError
from tasks.recommendation.data.readers.watched import Watched
from tasks.recommendation.datamodule import ListData, RecommendationData
from tests.tasks.recommendation import public_layouts as layouts

BOOKS: dict[str, Any] = {"categories": ("Books", "Toys")}
READERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "1m": (lambda r: MovieLens1M(root=r), layouts.write_movielens_1m, {}),
    "1m_age": (lambda r: MovieLens1M(root=r, by="age"), layouts.write_movielens_1m, {}),
    "25m": (lambda r: MovieLens25M(root=r), layouts.write_movielens_25m, {}),
    **{
        f"amazon_{edition}": (
            lambda r, e=edition: AmazonReviews(root=r, edition=e, meta=True, **BOOKS),
            lambda r, e=edition: layouts.write_amazon(r, e),
            {"seen": ["Books"], "unseen": ["Toys"]},
        )
        for edition in ("2014", "2018", "2023")
    },
}


def make(name: str, root: Path, **options: Any) -> tuple[RatingLists, ListData, list[dict[str, Any]]]:
    reader, write, roles = READERS[name]
    wrote = write(root)
    source = RatingLists(reader=reader(root), **options)
    return source, ListData(source=source, batch_size=16, cache_dir=root / "cache", **roles), wrote


@pytest.mark.parametrize("name", READERS)
def test_lists_train_and_test_in_their_domains_and_are_what_lists_must_be(tmp_path: Path, name: str) -> None:
    source, data, _ = make(name, tmp_path)
    data.prepare_data()

    for loader in [data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]:
        for batch in loader:
            source.schema.check(batch, name)
            assert (batch.label.sum(1) == 1).all()


@pytest.mark.parametrize("name", READERS)
def test_ratings_come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    source, data, wrote = make(name, tmp_path)
    data.get_dataset(data.roles["seen"][0], "train")
    log = source.log

    items = [source.item_name(int(k)) for k in log.item]
    assert items == [str(row["item"]) for row in wrote]
    assert log.rating.tolist() == [row["rating"] for row in wrote]
    assert log.time.tolist() == [row["time"] for row in wrote]
    names = np.array([row["user"] for row in wrote])
    assert np.array_equal(np.unique(names, return_inverse=True)[1][:, None] == np.unique(names, return_inverse=True)[1],
                          log.user[:, None] == log.user)  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_nothing_later_is_shown_and_no_negative_was_ever_rated(tmp_path: Path, name: str) -> None:
    source, data, wrote = make(name, tmp_path)
    rated = {(row["user"], str(row["item"])): row["time"] for row in wrote}
    order = sorted(row["time"] for row in wrote)
    val, test = order[int(0.7 * len(order))], order[int(0.8 * len(order))]
    ends = {"train": (0, val), "val": (val, test), "test": (test, 2**62)}
    trained = {str(row["item"]) for row in wrote if row["time"] < val}

    for split, (since, before) in ends.items():
        table = data.get_dataset(data.roles["seen"][0], split).table  # type: ignore[arg-type, attr-defined]
        assert len(table)
        for k, row in enumerate(table.row.tolist()):
            mine = wrote[row]
            assert since <= mine["time"] < before
            assert mine["rating"] >= 4
            past = [source.item_name(i) for i in table.history_item[k].tolist() if i >= 0]
            times = [rated[mine["user"], item] for item in past]
            assert all(time < mine["time"] for time in times)
            assert times == sorted(times, reverse=True)
            earlier = [r for r in wrote if r["user"] == mine["user"] and r["time"] < mine["time"]]
            assert len(past) == min(len(earlier), source.history)
            shown = [source.item_name(i) for i in table.candidate_item[k].tolist() if i >= 0]
            assert len(set(shown)) == len(shown)
            others = [item for item in shown if item != str(mine["item"])]
            assert len(others) == len(shown) - 1
            assert not [item for item in others if (mine["user"], item) in rated]
            assert set(others) <= trained


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


def test_movielens_films_have_the_fields_their_lines_say(tmp_path: Path) -> None:
    for name, write in (("1m", layouts.write_movielens_1m), ("25m", layouts.write_movielens_25m)):
        write(tmp_path / name)
        reader: Any = READERS[name][0](tmp_path / name)
        items = {row["item"]: row for row in reader.items().to_pylist()}
        assert set(items) == set(range(1, 43))
        # 1950 + 7 lies in the span 1955 to 1959, the eighth from 1920.
        assert items[7]["year"] == 8
        # Film 1 is "Comedy|Romance", film 3 "Animation|Children's".
        assert items[1]["category"] == 1 + ["action", "comedy", "drama", "children", "horror", "other"].index("comedy")
        assert items[3]["category"] == 4
    assert items[5]["genre"] == 0  # "(no genres listed)"
    assert items[5]["category"] == 6


def test_movielens_1m_ages_are_those_of_its_users(tmp_path: Path) -> None:
    layouts.write_movielens_1m(tmp_path)
    found = {r["user"]: r["domain"] for t in MovieLens1M(root=tmp_path, by="age").ratings() for r in t.to_pylist()}
    names = ["under25", "under25", "25_34", "35_49", "35_49", "50plus", "50plus"]

    assert all(domain == f"age_{names[user % 7]}" for user, domain in found.items())


@pytest.mark.parametrize(
    ("name", "seen", "held_out"), [("1m", ["age_25_34"], "age_under25"), ("1m", ["genre_comedy"], "genre_drama")]
)
def test_training_lists_hold_known_items_alone(tmp_path: Path, name: str, seen: list[str], held_out: str) -> None:
    layouts.write_movielens_1m(tmp_path)
    source = RatingLists(reader=MovieLens1M(root=tmp_path, by=seen[0].split("_")[0]))  # type: ignore[arg-type]
    source.bind({"seen": seen, "validation": [], "unseen": [held_out]})
    source.prepare(tmp_path / "cache")
    train = source.dataset(seen[0], "train", tmp_path / "cache").table
    test = source.dataset(held_out, "test", tmp_path / "cache").table

    assert (train.candidates[train.candidate_mask][:, 0] > 0).all()
    # Where nothing of a group was trained on, its lists have negatives all the same.
    assert (test.candidate_mask.sum(1) > 1).any()


@pytest.mark.parametrize("edition", ["2014", "2018", "2023"])
def test_amazons_sub_categories_are_read_in_every_edition(tmp_path: Path, edition: str) -> None:
    layouts.write_amazon(tmp_path, edition)
    items = AmazonReviews(root=tmp_path, edition=edition, meta=True, **BOOKS).items().to_pylist()  # type: ignore[arg-type]
    kinds: dict[str, set[int]] = {}
    for row in items:
        kinds.setdefault(row["item"][-1], set()).add(row["kind"])

    assert Counter(row["group"] for row in items) == {0: 30, 1: 30}
    # The writer's sub-category is the last digit of the item: the same digit, the same hash; ten digits, ten hashes.
    assert all(len(found) == 1 for found in kinds.values())
    assert len(set.union(*kinds.values())) == len(kinds) == 10
    assert 0 not in set.union(*kinds.values())


def test_amazons_editions_give_the_same_log(tmp_path: Path) -> None:
    found = []
    for edition in ("2014", "2018", "2023"):
        layouts.write_amazon(tmp_path / edition, edition)
        reader = AmazonReviews(root=tmp_path / edition, edition=edition, **BOOKS)  # type: ignore[arg-type]
        found.append([row for table in reader.ratings() for row in table.to_pylist()])

    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", ["1m", "25m", "amazon_2023"])
def test_ratings_as_impressions_train_on_nothing_later_than_a_test_row(tmp_path: Path, name: str) -> None:
    reader, write, roles = READERS[name]
    wrote = write(tmp_path)
    data = RecommendationData(
        source=RatingImpressions(reader=reader(tmp_path)), batch_size=16, cache_dir=tmp_path / "cache", **roles
    )
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    folder = data.source.convert(tmp_path / "cache")  # type: ignore[attr-defined]

    data.source.schema.check(batch, name)  # type: ignore[arg-type]
    parts = {
        s: pyarrow.dataset.dataset(sorted((folder / s).glob("*.parquet"))).to_table() for s in ("train", "val", "test")
    }
    times = {split: table["time"].to_numpy() for split, table in parts.items()}
    assert times["train"].max() < times["val"].min() <= times["val"].max() < times["test"].min()
    assert sum(map(len, times.values())) == len(wrote)
    assert data.facts["tasks"] == ["like", "love"]
    one = data.get_dataset(data.roles["seen"][0], "train").__getitems__(range(50))  # type: ignore[attr-defined]
    assert (one.label[:, 1] <= one.label[:, 0]).all()


@given(st.lists(st.integers(0, 20), min_size=5, max_size=60))
def test_no_second_lies_in_two_splits(times: list[int]) -> None:
    array = np.array(times)
    period = np.searchsorted(time_cuts(array, (0.5, 0.7)), array, side="right")

    for a, b in ((0, 1), (0, 2), (1, 2)):
        if (period == a).any() and (period == b).any():
            assert array[period == a].max() < array[period == b].min()


@pytest.mark.parametrize(
    ("log", "task", "column"),
    [
        (lambda r: (layouts.write_kuairand(r), KuaiRand(root=r))[1], "long_view", "long_view"),
        (lambda r: (layouts.write_kuairec(r), KuaiRec(root=r))[1], "whole", "watch_ratio"),
    ],
)
def test_impressions_with_times_give_lists_too(tmp_path: Path, log: Any, task: str, column: str) -> None:
    source = RatingLists(reader=Watched(log=log(tmp_path), task=task))
    domain = source.reader.domains[0]
    data = ListData(source=source, seen=[domain], validation=[], unseen=[], batch_size=8, cache_dir=tmp_path / "cache")
    data.prepare_data()

    for batch in data.train_dataloader():
        source.schema.check(batch, column)
    table = data.get_dataset(domain, "test").table  # type: ignore[attr-defined]
    past, now = source.log.time, table.row
    events = past_events(source.log.user, source.log.time, now.numpy(), 20)
    assert all((past[e[e >= 0]] < past[r]).all() for e, r in zip(events, now.tolist(), strict=True))
    assert (source.log.rating == 1).all()


@pytest.mark.parametrize("taken", [True, False])
def test_negatives_were_never_taken_and_never_shown_where_the_log_keeps_what_was_shown(
    tmp_path: Path, taken: bool
) -> None:
    wrote = layouts.write_kuairand(tmp_path)
    source = RatingLists(reader=Watched(log=KuaiRand(root=tmp_path), taken=taken))
    domain = source.reader.domains[0]
    source.bind({"seen": [domain], "validation": [], "unseen": []})
    table = source.dataset(domain, "train", tmp_path / "cache").table
    rows = [row for name in ("early", "late") for row in wrote[name]]
    shown = {(row["user_id"], str(row["video_id"])) for row in rows}
    watched = {(row["user_id"], str(row["video_id"])) for row in rows if row["long_view"]}
    whose = {(row["user_id"], str(row["video_id"]), row["time_ms"]): row["user_id"] for row in rows}
    by_row = {
        k: next(u for (u, v, t) in whose if (v, t) == (source.item_name(int(source.log.item[k])), source.log.time[k]))
        for k in table.row.tolist()
    }
    negatives = {
        (by_row[row], source.item_name(item))
        for row, items, labels in zip(
            table.row.tolist(), table.candidate_item.tolist(), table.label.tolist(), strict=True
        )
        for item, label in zip(items, labels, strict=True)
        if item >= 0 and not label
    }

    assert negatives
    assert not negatives & watched
    assert bool(negatives & shown) == taken


@pytest.mark.parametrize(
    ("line", "name"), [(",5,4,99", "user"), ("3,,4,99", "item"), ("3,5,,99", "rating"), ("3,5,4,", "time")]
)
def test_ratings_that_lack_an_entry_are_told_and_not_guessed(tmp_path: Path, line: str, name: str) -> None:
    wrote = layouts.write_movielens_25m(tmp_path)
    with open(tmp_path / "ratings.csv", "a") as file:
        file.write(line + "\n")
    roles: Any = {"seen": ["genre_drama"], "validation": [], "unseen": []}
    text = f"MovieLens 25M: 1 ratings have no {name}, the first of them is number {len(wrote) + 1} of the log; fill it"

    for source in (
        RatingLists(reader=MovieLens25M(root=tmp_path)),
        RatingImpressions(reader=MovieLens25M(root=tmp_path)),
    ):
        source.bind(roles)
        with pytest.raises(TableError, match=text):
            source.prepare(tmp_path / "cache")


def test_a_log_in_which_nothing_was_taken_is_told(tmp_path: Path) -> None:
    wrote = layouts.write_kuairand(tmp_path)
    for name, key in (("log_standard_4_08_to_4_21", "early"), ("log_standard_4_22_to_5_08", "late")):
        layouts.write_rows(tmp_path / f"{name}_pure.csv", [{**row, "long_view": 0} for row in wrote[key]])
    source = RatingLists(reader=Watched(log=KuaiRand(root=tmp_path)))
    source.bind({"seen": ["tab_0"], "validation": [], "unseen": []})

    with pytest.raises(TableError, match=r"KuaiRand: (the files hold no rating|no row has long_view and a time)"):
        source.prepare(tmp_path / "cache")


def test_a_domain_without_lists_is_told_with_those_that_have_some(tmp_path: Path) -> None:
    layouts.write_movielens_25m(tmp_path)
    source = RatingLists(reader=MovieLens25M(root=tmp_path))
    source.bind({"seen": ["genre_drama"], "validation": [], "unseen": []})
    source.dataset("genre_drama", "train", tmp_path / "cache")
    log = source.log
    drama = log.domain == source.reader.domains.index("genre_drama")
    vars(source).update(log=dataclasses.replace(log, rating=np.where(drama, 1, log.rating)))
    del vars(source)["positives"]

    with pytest.raises(
        ValueError, match=r"'genre_drama' has no train lists \(a list needs a rating of 4 or more\)"
    ) as told:
        source.dataset("genre_drama", "train", tmp_path / "cache")
    named = set(str(told.value).split("domains with some: ")[1].split(", "))
    liked = (source.period == 0) & (source.log.rating >= 4) & (source.log.domain >= 0)
    assert named == {source.reader.domains[k] for k in np.unique(source.log.domain[liked])}
    assert "genre_drama" not in named
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n")
    with pytest.raises(TableError, match=r"movies.csv: the file has a header and nothing else"):
        MovieLens25M(root=tmp_path).films()


def test_lists_are_the_same_again_and_a_choice_of_them_where_they_are_many(tmp_path: Path) -> None:
    _, data, _ = make("1m", tmp_path)
    domain = data.roles["seen"][0]
    first = data.get_dataset(domain, "train").table  # type: ignore[attr-defined]
    again, _, _ = make("1m", tmp_path)
    again.bind(data.roles)
    few = RatingLists(reader=MovieLens1M(root=tmp_path), max_lists=10)
    few.bind(data.roles)

    assert torch.equal(first.candidate_item, again.dataset(domain, "train", tmp_path / "cache").table.candidate_item)
    chosen = few.dataset(domain, "train", tmp_path / "cache").table
    assert len(chosen) == 10
    assert set(chosen.row.tolist()) < set(first.row.tolist())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda r: MovieLens1M(root=r, by="zip"), "by='zip' is unknown; allowed: genre, age"),
        (lambda r: AmazonReviews(root=r, categories=()), "at least one category is needed"),
        (lambda r: AmazonReviews(root=r, categories=("B",), edition="2020"), "editions are 2014, 2018, 2023"),
        (lambda r: RatingLists(reader=RatingReader(r), negatives=0), "negatives=0 must be 1 or more"),
        (lambda r: RatingLists(reader=RatingReader(r), cuts=(0.9, 0.8)), "0 < validation < test < 1 is needed"),
        (lambda r: RatingLists(reader=MovieLens25M(root=r)).bind({"seen": ["x"]}), "Lists has no domain 'x'; allowed"),
        (lambda r: MovieLens25M(root=r).files(), "no file .*ratings.csv; root must be .* Download ml-25m.zip"),
        (lambda r: Watched(log=KuaiRand(root=r), task="whole"), "one of its tasks, click, long_view"),
    ],
)  # fmt: skip
def test_wrong_options_and_missing_files_are_told(tmp_path: Path, call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(tmp_path)


def test_damaged_rating_files_are_shown_beside_what_was_expected(tmp_path: Path) -> None:
    layouts.write_movielens_1m(tmp_path)
    with open(tmp_path / "ratings.dat", "a") as file:
        file.write("1:2:3:4\n")
    with pytest.raises(TableError, match="the line '1:2:3:4' is not UserID::MovieID::Rating::Timestamp"):
        list(MovieLens1M(root=tmp_path).ratings())
    layouts.write_movielens_25m(tmp_path)
    (tmp_path / "ratings.csv").write_text("user,film,stars,when\n1,2,3,4\n")
    with pytest.raises(TableError, match="the header has no userId, movieId, rating, timestamp; it reads 'user,film"):
        list(MovieLens25M(root=tmp_path).ratings())
    layouts.write_amazon(tmp_path, "2018")
    (tmp_path / "Books.jsonl").write_text((tmp_path / "Books_5.json").read_text())
    with pytest.raises(TableError, match=r"lines have no 'user_id'.*expected are: user_id"):
        list(AmazonReviews(root=tmp_path, categories=("Books",), edition="2023").ratings())
