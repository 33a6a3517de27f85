# SPDX-License-Identifier: Apache-2.0
"""MovieLens 1M and 25M (GroupLens): films rated in 2000 to 2003, and in 1995 to 2019."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moeapps.data.domain import Role
from tasks.recommendation.data.readers.arrow_text import Lookup, read_csv, read_lines, whole
from tasks.recommendation.data.readers.movielens import FIRST_YEAR, GENRE_GROUPS
from tasks.recommendation.data.readers.public import replace
from tasks.recommendation.data.readers.rating_reader import RatingReader

GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "IMAX", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
GENRE_DOMAINS = (*(f"genre_{name}" for name in GENRE_GROUPS), "genre_other")
AGES = {"under25": (1, 18), "25_34": (25,), "35_49": (35, 45), "50plus": (50, 56)}  # of 1M: the codes of its readme
TERMS = (
    "GroupLens Research, University of Minnesota: for research; acknowledge the source in publications; no "
    "redistribution and no commercial use without permission; no endorsement may be implied"
)
YEARS = 24  # spans of five years from 1920, 0 unknown


class _MovieLens(RatingReader):
    """What 1M and 25M share: film fields out of title and genres; a film's domain is its rarest genre's group."""

    terms = TERMS
    default_roles: ClassVar[dict[Role, list[str]]] = {  # type: ignore[misc]
        "seen": ["genre_action", "genre_comedy", "genre_drama", "genre_other"],
        "validation": ["genre_children"],
        "unseen": ["genre_horror"],
    }
    domains = GENRE_DOMAINS

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.item_fields = {"category": len(GENRE_DOMAINS) + 1, "genre": len(GENRES) + 1, "year": YEARS}

    def films(self) -> pa.Table:
        """Return item, title and genres (separated by a bar) as published."""
        raise TypeError(f"{type(self).__name__} must define films()")

    def items(self) -> pa.Table:
        """Return category, rarest genre and span of years of each film; all films are one group."""
        films = self.films()
        genres = genre_table(films["genres"])
        count = np.where(genres, genres.sum(0), np.iinfo(np.int64).max)
        rarest = np.where(genres.any(1), count.argmin(1), -1)
        group_of = {name: k for k, names in enumerate(GENRE_GROUPS.values()) for name in names}
        groups = np.array([*(group_of.get(name, len(GENRE_GROUPS)) for name in GENRES), len(GENRE_GROUPS)])
        found = pc.extract_regex(films["title"].combine_chunks(), r"\((?P<year>[0-9]{4})\)\s*$").field("year")
        year = pc.if_else(pc.equal(found, ""), pa.scalar(None, pa.string()), found).cast(pa.int64())
        span = (year.fill_null(FIRST_YEAR - 5).to_numpy() - FIRST_YEAR) // 5 + 1
        return pa.table(
            {
                "item": films["item"],
                "category": 1 + groups[rarest],
                "genre": 1 + rarest,
                "year": span.clip(0, YEARS - 1),
                "group": np.zeros(len(films), np.int64),
            }
        )

    def by_genre(self) -> Lookup:
        """Return the genre domain of each film."""
        items = self.items()
        names = pa.array(GENRE_DOMAINS).take(pa.array(items["category"].to_numpy() - 1))
        return Lookup(iter([pa.table({"item": items["item"], "domain": names})]), "item", self.name)


def genre_table(text: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Make ``Action|Drama`` a row of [films, genres]; 25M writes Children where 1M writes Children's."""
    words = pc.split_pattern(text.combine_chunks(), "|")
    flat = pc.list_flatten(words)
    flat = pc.if_else(pc.equal(flat, "Children"), "Children's", flat)
    place = pc.index_in(flat, value_set=pa.array(GENRES))
    known = place.is_valid().to_numpy(zero_copy_only=False)
    table = np.zeros((len(text), len(GENRES)), np.bool_)
    table[pc.list_parent_indices(words).to_numpy()[known], place.drop_null().to_numpy()] = True
    return table


class MovieLens1M(_MovieLens):
    """MovieLens 1M: 1,000,209 ratings of whole stars.

    Source: files.grouplens.org/datasets/movielens/ml-1m.zip; terms as printed by errors and docs. Layout recalled, NOT
    tried on the real files: ratings.dat ``UserID::MovieID::Rating::Timestamp``, movies.dat
    ``MovieID::Title (Year)::Genre|Genre`` in latin-1, users.dat ``UserID::Gender::Age::Occupation::Zip``.

    Args:
        root: folder of the files.
        by: domains by ``genre`` (a film's rarest) or ``age`` (the user's group).

    Raises:
        ValueError: another kind of domain.
    """

    name = "MovieLens 1M"
    get = "Download ml-1m.zip of grouplens.org/datasets/movielens/1m and unpack it."

    def __init__(self, *, root: Path, by: Literal["genre", "age"] = "genre") -> None:
        super().__init__(root)
        if by not in ("genre", "age"):
            raise ValueError(f"by={by!r} is unknown; allowed: genre, age")
        self.by, self.items_table = by, 3_953
        if by == "age":
            self.domains = tuple(f"age_{name}" for name in AGES)
            self.default_roles = {  # type: ignore[misc]
                "seen": ["age_25_34", "age_35_49"], "validation": ["age_50plus"], "unseen": ["age_under25"]
            }  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """The kind of domains."""
        return {"by": self.by}

    def files(self) -> list[Path]:
        """Return ratings, films and users."""
        return [path for name in ("ratings.dat", "movies.dat", "users.dat") for path in self.find(name)]

    def films(self) -> pa.Table:
        """Read movies.dat."""
        pattern = r"^(?P<item>[0-9]+)::(?P<title>.*)::(?P<genres>[^:]*)$"
        said = "MovieID::Title (Year)::Genre|Genre"
        table = whole(read_lines(self.files()[1], pattern, encoding="latin-1", expected=said), self.files()[1])
        return replace(table, item=table["item"].cast(pa.int64()))

    def ratings(self) -> Iterator[pa.Table]:
        """Read ratings.dat."""
        pattern = "^(?P<user>[0-9]+)::(?P<item>[0-9]+)::(?P<rating>[0-9.]+)::(?P<time>[0-9]+)$"
        key, domain = ("item", self.by_genre()) if self.by == "genre" else ("user", self._by_age())
        for table in read_lines(self.files()[0], pattern, expected="UserID::MovieID::Rating::Timestamp"):
            numbers = {name: table[name].cast(pa.int64()) for name in ("user", "item", "time")}
            yield domain.add(replace(table, **numbers, rating=table["rating"].cast(pa.float64())), key)

    def _by_age(self) -> Lookup:
        pattern = "^(?P<user>[0-9]+)::(?P<gender>[FM])::(?P<age>[0-9]+)::(?P<occupation>[0-9]+)::(?P<zip>.*)$"
        said = "UserID::Gender::Age::Occupation::Zip-code"
        users = whole(read_lines(self.files()[2], pattern, expected=said), self.files()[2])
        codes = {code: f"age_{name}" for name, known in AGES.items() for code in known}
        place = pc.index_in(users["age"].cast(pa.int64()), value_set=pa.array(list(codes)))
        domain = pa.chunked_array([pa.array(list(codes.values()))]).take(place)
        return Lookup(iter([pa.table({"user": users["user"].cast(pa.int64()), "domain": domain})]), "user", "users.dat")


class MovieLens25M(_MovieLens):
    """MovieLens 25M: 25,000,095 ratings in steps of half a star; domains by a film's rarest genre.

    Source: files.grouplens.org/datasets/movielens/ml-25m.zip; terms as of 1M. Layout recalled, NOT tried on the real
    files: ratings.csv (userId,movieId,rating,timestamp) and movies.csv (movieId,title,genres), with headers. Tags are
    not read: many are later than the ratings they would describe.

    Args:
        root: folder of the files.
    """

    name = "MovieLens 25M"
    get = "Download ml-25m.zip of grouplens.org/datasets/movielens/25m and unpack it."

    def __init__(self, *, root: Path) -> None:
        super().__init__(root)
        self.items_table = 1 << 18

    def files(self) -> list[Path]:
        """Return ratings and films."""
        return [path for name in ("ratings.csv", "movies.csv") for path in self.find(name)]

    def films(self) -> pa.Table:
        """Read movies.csv."""
        types = {"movieId": pa.int64(), "title": pa.string(), "genres": pa.string()}
        return whole(read_csv(self.files()[1], types), self.files()[1]).rename_columns(["item", "title", "genres"])

    def ratings(self) -> Iterator[pa.Table]:
        """Read ratings.csv."""
        types = {"userId": pa.int64(), "movieId": pa.int64(), "rating": pa.float64(), "timestamp": pa.int64()}
        domain = self.by_genre()
        for table in read_csv(self.files()[0], types):
            yield domain.add(table.rename_columns(["user", "item", "rating", "time"]), "item")
