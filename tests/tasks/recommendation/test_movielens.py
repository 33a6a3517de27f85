# SPDX-License-Identifier: Apache-2.0
"""MovieLens 100K: nothing of the future in any row, whatever the split; on a log written here, then on the file."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from public_layouts import write_ratings

from moeapps.data.archives import ArchiveError, fetch_package
from tasks.recommendation.data.causal import look_back
from tasks.recommendation.data.readers.blocks import TableError
from tasks.recommendation.data.readers.movielens import DEFAULT_TASKS, DOMAINS, GENRE_GROUPS, TASKS, MovieLens100K
from tasks.recommendation.data.readers.ratings import GENRES, NUM_ITEMS, Ratings, read_ratings
from tasks.recommendation.datamodule import RecommendationData
from tasks.recommendation.packages import ML100K

DAY, START = 86_400, 880_000_000
REST: dict[str, list[str]] = {"seen": ["rest"], "validation": [], "unseen": []}


def small_ratings(events: int = 900, users: int = 25, items: int = 40, seed: int = 0) -> Ratings:
    """Bursts of ratings in pages: half of the events share their time with another of the user."""
    rng = np.random.default_rng(seed)
    visit = START + rng.integers(0, 60, (users, 3)) * DAY
    user = rng.integers(0, users, events)
    pages = visit[user, rng.integers(0, 3, events)] + 40 * rng.integers(0, 8, events)
    genres = np.zeros((NUM_ITEMS + 1, len(GENRES)), bool)
    genres[1 : items + 1] = rng.random((items, len(GENRES))) < 0.12
    year = np.zeros(NUM_ITEMS + 1, np.int64)
    year[1 : items + 1] = rng.integers(1930, 1999, items) * (rng.random(items) < 0.9)
    person = np.zeros((3, users + 1), np.int64)
    person[:, 1:] = rng.integers(10, 70, users), rng.integers(1, 3, users), rng.integers(1, 22, users)
    item = np.append(rng.integers(1, items + 1, events - items), np.arange(1, items + 1))
    return Ratings(1 + user, item, rng.integers(1, 6, events), pages, year, genres, *person)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_ratings(tmp_path, small_ratings())
    return tmp_path


def bound(folder: Path, roles: dict[str, list[str]] | None = None, **options: Any) -> MovieLens100K:
    source = MovieLens100K(root=folder, **options)
    source.bind(roles or REST)  # type: ignore[arg-type]
    return source


def test_what_is_written_is_read(folder: Path) -> None:
    wrote, read = small_ratings(), read_ratings(folder)

    for name, values in vars(wrote).items():
        np.testing.assert_array_equal(getattr(read, name), values, err_msg=name)


def test_past_is_that_of_a_loop_over_strictly_earlier_events() -> None:
    log = small_ratings(400, users=12)
    past = look_back(log.user, log.item, log.rating, log.time, length=5)

    for k in range(len(log)):
        earlier = np.flatnonzero((log.user == log.user[k]) & (log.time < log.time[k]))
        on_item = np.flatnonzero((log.item == log.item[k]) & (log.time < log.time[k]))
        later = log.time[(log.user == log.user[k]) & (log.time > log.time[k])]
        history = past.history[k][past.history[k] >= 0]
        assert len(history) == min(5, len(earlier))
        assert set(history) <= set(earlier)
        assert sorted(log.time[history]) == sorted(log.time[earlier])[-5:]
        assert (np.diff(log.time[history]) <= 0).all()
        assert past.user_count[k] == len(earlier)
        assert past.item_count[k] == len(on_item)
        assert past.user_mean[k] == pytest.approx((log.rating[earlier].sum() + 3.5) / (len(earlier) + 1))
        assert past.item_mean[k] == pytest.approx((log.rating[on_item].sum() + 17.5) / (len(on_item) + 5))
        assert past.next_time[k] == (later.min() if len(later) else np.inf)
        assert past.share[k] == pytest.approx(len(earlier) / (log.user == log.user[k]).sum())


@pytest.mark.parametrize("split", ["time", "user_time"])
def test_features_do_not_change_when_the_present_and_the_future_do(folder: Path, tmp_path: Path, split: Any) -> None:
    log, source = small_ratings(), bound(folder, split=split)
    row = int(np.argsort(log.time)[500])
    now = log.time >= log.time[row]
    changed = replace(log, rating=np.where(now, 6 - log.rating, log.rating))
    (tmp_path / "other").mkdir()
    write_ratings(tmp_path / "other", changed)
    other = bound(tmp_path / "other", split=split)

    for name in ("dense", "ids"):
        assert torch.equal(getattr(source.table, name)[row], getattr(other.table, name)[row])
    for name, (ids, weight) in source.table.bags.items():
        assert torch.equal(ids[row], other.table.bags[name][0][row])
        assert torch.equal(weight[row], other.table.bags[name][1][row])
    assert not torch.equal(source.table.label[row, :3], other.table.label[row, :3]) or log.rating[row] == 3


def test_training_labels_do_not_change_when_later_periods_are_deleted(folder: Path, tmp_path: Path) -> None:
    log, source = small_ratings(), bound(folder)
    train = source.period == 0
    label, mask = source.labels()
    past = {name: value[train] if len(value) == len(log) else value for name, value in vars(log).items()}
    (tmp_path / "cut").mkdir()
    write_ratings(tmp_path / "cut", Ratings(**past))
    alone = bound(tmp_path / "cut")
    alone.__dict__["period"] = np.zeros(int(train.sum()), np.int64)
    alone.__dict__["cuts"] = source.cuts

    cut_label, cut_mask = alone.labels()
    assert np.array_equal(label[train], cut_label)
    assert np.array_equal(mask[train], cut_mask)


def test_time_split_has_all_training_before_all_tests_and_known_users_split_keeps_pages_whole(folder: Path) -> None:
    by_time, by_user = bound(folder), bound(folder, split="user_time")
    time = by_time.ratings.time

    assert time[by_time.period == 0].max() < time[by_time.period == 1].min()
    assert time[by_time.period == 1].max() < time[by_time.period == 2].min()
    for user in np.unique(by_user.ratings.user):
        own = by_user.ratings.user == user
        for earlier, later in ((0, 1), (1, 2), (0, 2)):
            a, b = time[own & (by_user.period == earlier)], time[own & (by_user.period == later)]
            assert not len(a) or not len(b) or a.max() < b.min()


def test_labels_of_a_hand_made_visit(tmp_path: Path) -> None:
    # One user: two ratings on a page, the next page after 100 s, then after 2 days; a second user stretches the log.
    base = small_ratings(60, users=2)
    time = np.array([0, 0, 100, 100 + 2 * DAY, 30 * DAY]) + START
    rating, user = np.array([5, 1, 4, 2, 3]), np.array([1, 1, 1, 1, 2])
    write_ratings(tmp_path, replace(base, user=user, item=np.array([1, 2, 3, 4, 5]), rating=rating, time=time))
    source = bound(tmp_path, tasks=tuple(TASKS))
    source.__dict__["horizon"] = np.full(5, float(START + 40 * DAY))

    label, mask = source.labels()
    found = {name: label[:, t].astype(int).tolist() for t, name in enumerate(TASKS)}
    assert found["like"] == [1, 0, 1, 0, 0]
    assert found["love"] == [1, 0, 0, 0, 0]
    assert found["dislike"] == [0, 1, 0, 1, 0]
    assert found["hate"] == [0, 1, 0, 0, 0]
    assert found["dwell20"] == found["dwell60"] == [1, 1, 0, 0, 0]
    assert found["leave"] == [0, 0, 1, 1, 1]
    assert found["return"] == [0, 0, 1, 0, 0]
    assert mask.all()
    source.__dict__["horizon"] = np.full(5, float(START + 3 * DAY))
    assert source.labels()[1][:, list(TASKS).index("return")].tolist() == [False] * 5


def test_held_out_domains_claim_their_ratings_first_and_seen_domains_do_not_overlap(folder: Path) -> None:
    roles = {
        "seen": ["genre_action", "genre_drama", "genre_other"],
        "validation": ["age_35_49"],
        "unseen": ["genre_horror", "gender_f"],
    }
    source = bound(folder, roles)
    members = {name: source.member(name) for names in roles.values() for name in names}

    unseen = source.fits("genre_horror") | source.fits("gender_f")
    for name in roles["unseen"]:
        assert (source.fits(name) == members[name]).all()
    assert (members["age_35_49"] == source.fits("age_35_49") & ~unseen).all()
    assert np.sum([unseen, *(members[name] for name in roles["seen"] + roles["validation"])], axis=0).max() == 1
    assert all(members[name].sum() for name in members)
    with pytest.raises(ValueError, match=r"share \d+ ratings"):
        bound(folder, {**REST, "seen": ["genre_action", "gender_m"]}).member("genre_action")


def test_each_domain_kind_partitions_the_log(folder: Path) -> None:
    source = bound(folder)
    for kind in ("genre", "age", "gender", "occupation"):
        claims = np.sum([source.fits(name) for name in DOMAINS if name.startswith(f"{kind}_")], axis=0)
        assert (claims == 1).all(), kind


def test_primary_genre_is_the_rarest(folder: Path) -> None:
    source, films = bound(folder), small_ratings().genres
    counts = films.sum(0)
    for item in range(1, 41):
        names = [GENRES[g] for g in np.flatnonzero(films[item])]
        if names and (films[item] & (counts == counts[films[item]].min())).sum() == 1:
            rarest = min(names, key=lambda name: counts[GENRES.index(name)])
            wanted = next((k for k, group in enumerate(GENRE_GROUPS.values()) if rarest in group), 5)
            assert source.genre_group[item] == wanted


def test_items_that_no_training_rating_shows_are_unknown(folder: Path) -> None:
    source = bound(folder, {**REST, "unseen": ["genre_horror"]})
    train = source.member("rest") & (source.period == 0)
    shown = set(source.ratings.item[train])

    ids = source.table.ids[:, 0].numpy()
    assert set(ids[ids > 0]) <= shown
    assert ((ids == 0) == ~np.isin(source.ratings.item, list(shown))).all()
    assert set(source.table.bags["history"][0].unique().tolist()) <= shown | {0}


def test_data_module_gives_batches_that_fit_the_schema(folder: Path) -> None:
    source = MovieLens100K(root=folder)
    roles: dict[str, Any] = {"seen": ["rest"], "validation": ["age_25_34"], "unseen": ["genre_horror"]}
    data = RecommendationData(source=source, batch_size=32, **roles)
    batch = next(iter(data.train_dataloader()))

    source.schema.check(batch, "batch")
    assert data.facts["tasks"] == list(DEFAULT_TASKS)
    assert data.facts["categories"] == ["opinion"] * 3 + ["session"] * 3
    test = data.get_dataset("genre_horror", "test")
    assert set(source.ratings.item[test.table.row]) <= set(np.flatnonzero(source.genre_group == 4))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("ending", "text", "message"),
    [
        ("inter", "user_id:token\titem_id:token\trating:float\n", "no column 'timestamp'"),
        ("inter", "user_id:t\titem_id:t\trating:f\ttimestamp:f\n1\t1\t7\t5\n", "rating goes from 7 to 7"),
        ("inter", "user_id:t\titem_id:t\trating:f\ttimestamp:f\n1\t1\tx\t5\n", "numbers are needed"),
        ("inter", "user_id:t\titem_id:t\trating:f\ttimestamp:f\n1\t1\t3.5\t5\n", "rating: line 2 reads '3.5'; whole"),
        ("inter", "user_id:t\titem_id:t\trating:f\ttimestamp:f\n1\t1\t3\tnan\n", "timestamp: line 2 reads 'nan'"),
        ("inter", "user_id:t\titem_id:t\trating:f\ttimestamp:f\n1\t1\n", "line 2 has 2 fields"),
        ("inter", "user_id:t\titem_id:t\trating:f\ttimestamp:f\n1\t900\t5\t5\n", "item_id 900 has no record"),
        ("item", "item_id:t\trelease_year:t\tclass:t\n1\t1990\tNoir\n", "genre 'Noir' is unknown"),
    ],
)
def test_damaged_files_are_told(folder: Path, ending: str, text: str, message: str) -> None:
    (folder / f"ml-100k.{ending}").write_text(text)

    with pytest.raises(TableError, match=message):
        read_ratings(folder)


def test_missing_folder_and_wrong_settings_are_told(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="root must hold the three files"):
        read_ratings(tmp_path)
    with pytest.raises(ValueError, match="unknown task 'click'"):
        MovieLens100K(tasks=("click",))
    with pytest.raises(ValueError, match="split='random'"):
        MovieLens100K(split="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no domain 'genre_western'"):
        bound(tmp_path, {**REST, "seen": ["genre_western"]})


def test_terms_are_shown_before_the_data_is_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="moeapps"):
        bound(folder).prepare(None)

    assert "no redistribution and no commercial use without permission" in caplog.text
    assert "no redistribution" in ML100K.licence


@pytest.fixture(scope="module")
def real() -> MovieLens100K:
    try:
        fetch_package(ML100K)
    except ArchiveError as error:
        pytest.skip(f"the recbole wheel cannot be fetched here: {error}")
    source = MovieLens100K()
    source.bind(REST)  # type: ignore[arg-type]
    return source


def test_real_log_has_the_known_counts_and_rates(real: MovieLens100K) -> None:
    ratings, train = real.ratings, real.period == 0

    assert (len(ratings), len(np.unique(ratings.user)), len(np.unique(ratings.item))) == (100_000, 943, 1682)
    assert np.bincount(ratings.rating).tolist() == [0, 6110, 11370, 27145, 34174, 21201]
    assert 100_000 - len(np.unique(real.past.page)) == pytest.approx(50_600, abs=100)  # share the time of one before
    label, mask = real.labels()
    rates = [label[train, t].sum() / mask[train, t].sum() for t in range(6)]
    assert rates[:3] == pytest.approx([0.557, 0.210, 0.174], abs=0.001)
    assert rates[3:] == pytest.approx([0.234, 0.050, 0.020], abs=0.002)
    assert (real.past.user_count == 0).mean() == pytest.approx(0.021, abs=0.001)
    assert [int((real.period == k).sum()) for k in range(3)] == [69_997, 10_002, 20_001]


def test_real_log_has_no_rating_in_its_own_past(real: MovieLens100K) -> None:
    time, history = real.ratings.time, real.past.history

    inside = history >= 0
    assert (np.where(inside, time[history], -1) < time[:, None]).all()
    assert (
        np.where(inside, real.ratings.user[history], real.ratings.user[:, None]) == real.ratings.user[:, None]
    ).all()
    assert time[real.period == 0].max() < time[real.period == 2].min()
    real.schema.check(real.table, "ml-100k")
