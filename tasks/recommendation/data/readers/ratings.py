# SPDX-License-Identifier: Apache-2.0
"""Rating logs in RecBole's atomic files: tab-separated text with ``name:type`` headers.

One file each for ratings (``.inter``), items (``.item``) and users (``.user``).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeapps.files import absent
from tasks.recommendation.data.readers.values import TableError

Ints = NDArray[np.int64]

# The 19 genres and 21 occupations of MovieLens 100K, in alphabetical order; ids are 1 + position.
GENRES = (
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western", "unknown",
)  # fmt: skip
OCCUPATIONS = (
    "administrator", "artist", "doctor", "educator", "engineer", "entertainment", "executive", "healthcare",
    "homemaker", "lawyer", "librarian", "marketing", "none", "other", "programmer", "retired", "salesman", "scientist",
    "student", "technician", "writer",
)  # fmt: skip
NUM_ITEMS = 1682


@dataclass(frozen=True)
class Ratings:
    """A log of ratings with what is known of items and users.

    Attributes:
        user: int64 [N].
        item: int64 [N], 1 .. 1682.
        rating: int64 [N], 1 .. 5.
        time: int64 [N], seconds since 1970.
        year: int64 [1683], release year of each item; 0 where unknown.
        genres: bool [1683, 19], in the order of `GENRES`.
        age: int64 [U + 1], years, by user number; 0 for numbers without a user.
        gender: int64 [U + 1], 1 F, 2 M.
        occupation: int64 [U + 1], 1 + position in `OCCUPATIONS`.
    """

    user: Ints
    item: Ints
    rating: Ints
    time: Ints
    year: Ints
    genres: NDArray[np.bool_]
    age: Ints
    gender: Ints
    occupation: Ints

    def __len__(self) -> int:
        """Return the number of ratings."""
        return len(self.user)


def read_ratings(folder: Path, name: str = "ml-100k") -> Ratings:
    """Read ``<name>.inter``, ``<name>.item`` and ``<name>.user``.

    Raises:
        TableError: a missing file or column, a number out of range, or a rating of a user or item that has no record.
    """
    inter = _columns(folder / f"{name}.inter", ("user_id", "item_id", "rating", "timestamp"))
    user, item, rating, time = (
        _integers(inter[key], f"{name}.inter, {key}", fractions=key == "timestamp") for key in inter
    )
    items = _columns(folder / f"{name}.item", ("item_id", "release_year", "class"))
    users = _columns(folder / f"{name}.user", ("user_id", "age", "gender", "occupation"))
    number = _integers(items["item_id"], f"{name}.item, item_id")
    _within(number, 1, NUM_ITEMS, f"{name}.item: item_id")
    _within(rating, 1, 5, f"{name}.inter: rating")
    year, genres = np.zeros(NUM_ITEMS + 1, np.int64), np.zeros((NUM_ITEMS + 1, len(GENRES)), np.bool_)
    year[number] = [int(word) if word.isdigit() else 0 for word in items["release_year"]]
    for place, words in zip(number, items["class"], strict=True):
        genres[place, [_place(word, GENRES, f"{name}.item: genre") for word in words.split()]] = True
    who = _integers(users["user_id"], f"{name}.user, user_id")
    _within(who, 1, 1_000_000, f"{name}.user: user_id")
    age, gender, occupation = np.zeros((3, int(who.max()) + 1), np.int64)
    age[who] = _integers(users["age"], f"{name}.user, age")
    gender[who] = [1 + _place(word, ("F", "M"), f"{name}.user: gender") for word in users["gender"]]
    occupation[who] = [1 + _place(word, OCCUPATIONS, f"{name}.user: occupation") for word in users["occupation"]]
    _known(user, who, f"{name}.inter: user_id")
    _known(item, number, f"{name}.inter: item_id")
    return Ratings(user, item, rating, time, year, genres, age, gender, occupation)


def read_titles(folder: Path, name: str = "ml-100k") -> dict[int, str]:
    """Read the title of every item out of ``<name>.item``."""
    items = _columns(folder / f"{name}.item", ("item_id", "movie_title"))
    number = _integers(items["item_id"], f"{name}.item, item_id")
    return dict(zip(number.tolist(), items["movie_title"], strict=True))


def _columns(path: Path, wanted: Sequence[str]) -> dict[str, list[str]]:
    if not path.is_file():
        raise TableError(f"{absent(path)}; root must hold the three files ml-100k.inter, .item and .user")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (csv.Error, UnicodeDecodeError) as error:
        raise TableError(f"{path} is not a readable table ({error}); fetch it again") from error
    header = [word.split(":")[0] for word in rows[0]] if rows else []
    for name in wanted:
        if name not in header:
            raise TableError(f"{path} has no column {name!r}; it has: {', '.join(header)}")
    for k, row in enumerate(rows):
        if len(row) != len(header):
            raise TableError(f"{path}: line {k + 1} has {len(row)} fields, the header {len(header)}")
    return {name: [row[header.index(name)] for row in rows[1:]] for name in wanted}


def _integers(words: list[str], what: str, *, fractions: bool = False) -> Ints:
    """Whole numbers; ``fractions`` are cut off where they mean nothing (of a second), else refused."""
    try:
        values = np.array([float(word) for word in words], np.float64)
    except ValueError as error:
        raise TableError(f"{what}: {error}; numbers are needed") from error
    wrong = ~np.isfinite(values) | ((values != np.floor(values)) & (not fractions))
    if wrong.any():
        line = int(wrong.argmax()) + 2
        raise TableError(f"{what}: line {line} reads {words[line - 2]!r}; whole numbers are needed")
    return values.astype(np.int64)


def _within(values: Ints, low: int, high: int, what: str) -> None:
    if len(values) and (values.min() < low or values.max() > high):
        raise TableError(f"{what} goes from {values.min()} to {values.max()}; allowed are {low} to {high}")


def _known(values: Ints, known: Ints, what: str) -> None:
    strange = ~np.isin(values, known)
    if strange.any():
        raise TableError(f"{what} {values[strange][0]} has no record of its own; the files do not belong together")


def _place(word: str, known: Sequence[str], what: str) -> int:
    if word not in known:
        raise TableError(f"{what} {word!r} is unknown; known are {', '.join(known)}")
    return known.index(word)
