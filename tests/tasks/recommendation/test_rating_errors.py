# SPDX-License-Identifier: Apache-2.0
"""Rating logs that cannot give lists: entries, files and domains that lack something are told, and not guessed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.recommendation.data.readers.amazon import AmazonReviews
from tasks.recommendation.data.readers.kuairand import KuaiRand
from tasks.recommendation.data.readers.movielens_files import MovieLens1M, MovieLens25M
from tasks.recommendation.data.readers.rating_reader import RatingImpressions, RatingLists, RatingReader
from tasks.recommendation.data.readers.values import TableError
from tasks.recommendation.data.readers.watched import Watched
from tests.tasks.recommendation import public_layouts as layouts


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
