# SPDX-License-Identifier: Apache-2.0
"""Lists of rating logs: histories strictly earlier, negatives never rated, and the published files as they are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest
import torch

from tasks.recommendation.data.causal import past_events
from tasks.recommendation.data.readers.amazon import AmazonReviews
from tasks.recommendation.data.readers.kuairand import KuaiRand
from tasks.recommendation.data.readers.kuairec import KuaiRec
from tasks.recommendation.data.readers.movielens_files import MovieLens1M, MovieLens25M
from tasks.recommendation.data.readers.rating_reader import RatingImpressions, RatingLists
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
