# SPDX-License-Identifier: Apache-2.0
"""MovieLens 100K as a multi-task log: opinions (what was rated how) and sessions (how long until the next page).

The labels are proxies: "dwell" is the time until the user's next page of ratings, not watch time, and "leave" and
"return" are what the log shows of visits. All rows of one page share them. Every feature is made of strictly earlier
events, every label of events before the end of its row's split period, so that no cut in time is looked across.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from moeapps.data.archives import ArchiveError, fetch_package
from moeapps.data.domain import Role, Split
from moeapps.data.gather import TableDataset
from tasks.recommendation.data.batch import Interactions, Schema
from tasks.recommendation.data.causal import Past, look_back
from tasks.recommendation.data.readers.ratings import GENRES, NUM_ITEMS, OCCUPATIONS, Ratings, read_ratings
from tasks.recommendation.data.source import LogSource
from tasks.recommendation.packages import ML100K, ML100K_TERMS

log = logging.getLogger("moeapps")

Cut = Literal["time", "user_time"]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Label = Callable[[NDArray[np.int64], Floats], Bools]

MINUTE, HOUR, DAY = 60, 3600, 86_400
HISTORY = 20
AGE_CUTS = (18, 25, 35, 45, 50, 56)
FIRST_YEAR = 1920

# task -> (category, label from rating and gap in seconds, seconds that must have been watched to know it)
TASKS: dict[str, tuple[str, Label, int]] = {
    "like": ("opinion", lambda rating, gap: rating >= 4, 0),
    "love": ("opinion", lambda rating, gap: rating == 5, 0),
    "dislike": ("opinion", lambda rating, gap: rating <= 2, 0),
    "hate": ("opinion", lambda rating, gap: rating == 1, 0),
    "dwell20": ("session", lambda rating, gap: (gap >= 20) & (gap < 30 * MINUTE), 30 * MINUTE),
    "dwell60": ("session", lambda rating, gap: (gap >= 60) & (gap < 30 * MINUTE), 30 * MINUTE),
    "leave": ("session", lambda rating, gap: gap >= 30 * MINUTE, 30 * MINUTE),
    "return": ("session", lambda rating, gap: (gap >= DAY) & (gap < np.inf), 7 * DAY),
}
DEFAULT_TASKS = ("like", "love", "dislike", "dwell60", "leave", "return")

GENRE_GROUPS = {
    "action": ("Action", "Adventure", "Sci-Fi", "Thriller"),
    "comedy": ("Comedy", "Romance"),
    "drama": ("Drama", "War"),
    "children": ("Children's", "Animation", "Musical"),
    "horror": ("Horror",),
}
AGE_GROUPS = {"under25": (0, 25), "25_34": (25, 35), "35_49": (35, 50), "50plus": (50, 200)}
MONTHS = ("1997_09", "1997_10", "1997_11", "1997_12", "1998_01", "1998_02", "1998_03", "1998_04")
DOMAINS = (
    "rest",
    *(f"genre_{name}" for name in (*GENRE_GROUPS, "other")),
    *(f"age_{name}" for name in AGE_GROUPS),
    "gender_f",
    "gender_m",
    *(f"occupation_{name}" for name in OCCUPATIONS),
    *(f"month_{name}" for name in MONTHS),
)


class MovieLens100K(LogSource):
    """MovieLens 100K with six tasks in two categories; domains by age, gender, occupation, genre and month.

    A rating that fits a held-out domain belongs to no seen one: unseen domains claim their rows first, then
    validation domains, then seen ones.

    Args:
        root: folder with ml-100k.inter, .item and .user; None fetches them out of the recbole wheel.
        split: ``time`` trains on the first 70 per cent of the log, validates on the next 10 and tests on the rest
            (mostly on users never seen); ``user_time`` cuts each user's own events so, whole pages only (users are
            known, but items know other users' future: not strictly causal).
        tasks: names out of `TASKS`.

    Raises:
        ValueError: an unknown task or split.
    """

    domains = DOMAINS
    default_roles: ClassVar[dict[Role, list[str]]] = {
        "seen": ["genre_action", "genre_comedy", "genre_drama", "genre_other"],
        "validation": ["genre_children"],
        "unseen": ["genre_horror", "age_under25"],
    }

    def __init__(
        self, *, root: Path | None = None, split: Cut = "time", tasks: tuple[str, ...] = DEFAULT_TASKS
    ) -> None:
        if split not in get_args(Cut):
            raise ValueError(f"split={split!r} is unknown; use time or user_time")
        for name in tasks:
            if name not in TASKS:
                raise ValueError(f"unknown task {name!r}; allowed: {', '.join(TASKS)}")
        self.root, self.split, self.tasks = root, split, tuple(tasks)
        self._cache: Path | None = None

    @cached_property
    def schema(self) -> Schema:
        """Columns: four numbers, six fields, three bags, the chosen tasks."""
        return Schema(
            tasks=self.tasks,
            categories=tuple(TASKS[name][0] for name in self.tasks),
            dense_dim=4,
            fields={
                "item": NUM_ITEMS + 1,
                "year": 17,
                "age": len(AGE_CUTS) + 2,
                "gender": 3,
                "occupation": len(OCCUPATIONS) + 1,
                "hour": 25,
            },
            bags={"genres": len(GENRES) + 1, "history": NUM_ITEMS + 1, "history_rated": NUM_ITEMS + 1},
        )

    def bind(self, roles: dict[Role, list[str]]) -> None:
        """Check the names of the domains."""
        super().bind(roles)
        for name in ("known_items", "table"):  # they depend on the roles
            self.__dict__.pop(name, None)

    def describe(self, domain: str) -> str:
        """Say which data set it is, how it is split, and where the files came from."""
        place = "recbole 1.2.1 wheel" if self.root is None else "own files"
        return f"MovieLens 100K ({place}), split by {self.split}"

    def prepare(self, cache: Path | None) -> None:
        """Fetch the files and show on which terms they may be used.

        Raises:
            ValueError: they cannot be had.
        """
        log.info("%s", ML100K_TERMS)
        self.folder(cache)

    def folder(self, cache: Path | None) -> Path:
        """Return the folder of the three files, fetching them where ``root`` names none.

        Raises:
            ValueError: they cannot be had.
        """
        if self.root is not None:
            return Path(self.root)
        try:
            return fetch_package(ML100K, root=cache) / Path(ML100K.members[0]).parent
        except ArchiveError as error:
            raise ValueError(f"MovieLens 100K is needed: {error}; or give source.init_args.root") from error

    # Rows ---------------------------------------------------------------------------------------------------------

    def dataset(self, domain: str, split: Split, cache: Path | None) -> TableDataset:
        """Return the rows of one domain and split.

        Raises:
            ValueError: seen domains share rows, or a file is missing or damaged.
        """
        self.read(cache)
        rows = np.flatnonzero(self.member(domain) & (self.period == ("train", "val", "test").index(split)))
        return TableDataset(self.table.take(torch.from_numpy(rows)))

    def read(self, cache: Path | None) -> Ratings:
        """Return the log; read on first use, from the cache given then."""
        self._cache = cache
        return self.ratings

    @cached_property
    def ratings(self) -> Ratings:
        """The log, in the order of its file."""
        return read_ratings(self.folder(self._cache))

    @cached_property
    def past(self) -> Past:
        """What was known before each rating."""
        log_ = self.ratings
        return look_back(log_.user, log_.item, log_.rating, log_.time, HISTORY)

    @cached_property
    def period(self) -> NDArray[np.int64]:
        """0 train, 1 validation, 2 test for each rating."""
        if self.split == "user_time":
            return np.searchsorted([0.7, 0.8], self.past.share, side="right")
        return np.searchsorted(self.cuts, self.ratings.time, side="right")

    @cached_property
    def cuts(self) -> NDArray[np.int64]:
        """First time of the validation and of the test period."""
        times = np.sort(self.ratings.time)
        return times[[int(0.7 * len(times)), int(0.8 * len(times))]]

    @cached_property
    def horizon(self) -> Floats:
        """Time before which the events lie that a rating's labels may use: the end of its period."""
        end = float(self.ratings.time.max()) + 1
        ends = [*self.cuts.astype(float), end] if self.split == "time" else [end] * 3
        return np.array(ends)[self.period]

    # Domains ------------------------------------------------------------------------------------------------------

    def fits(self, domain: str) -> Bools:
        """Return bool [N]: which ratings a domain's description fits."""
        ratings = self.ratings
        kind, _, name = domain.partition("_")
        if kind == "genre":
            return np.asarray(self.genre_group[ratings.item] == (*GENRE_GROUPS, "other").index(name))
        if kind == "age":
            low, high = AGE_GROUPS[name]
            return np.asarray((ratings.age >= low) & (ratings.age < high))[ratings.user]
        if kind == "gender":
            return np.asarray(ratings.gender[ratings.user] == 1 + ("f", "m").index(name))
        if kind == "occupation":
            return np.asarray(ratings.occupation[ratings.user] == 1 + OCCUPATIONS.index(name))
        if kind == "month":
            first = np.datetime64(name.replace("_", "-"), "M")
            return np.asarray(ratings.time.astype("datetime64[s]").astype("datetime64[M]") == first)
        return np.ones(len(ratings), np.bool_)

    @cached_property
    def genre_group(self) -> NDArray[np.int64]:
        """Group of each item, [1683]: that of its rarest genre (fewest films), so that Drama does not swallow all."""
        genres = self.ratings.genres
        films = np.where(genres, genres.sum(0), np.iinfo(np.int64).max)
        group_of = {name: k for k, names in enumerate(GENRE_GROUPS.values()) for name in names}
        groups = np.array([group_of.get(name, len(GENRE_GROUPS)) for name in GENRES])
        return np.where(genres.any(1), groups[films.argmin(1)], len(GENRE_GROUPS))

    def member(self, domain: str) -> Bools:
        """Return bool [N]: which ratings belong to a domain of this run, held-out domains first.

        Raises:
            ValueError: two seen domains claim one rating.
        """
        free = np.ones(len(self.ratings), np.bool_)
        for role in ("unseen", "validation"):
            names = self.roles.get(role, [])
            if domain in names:
                return self.fits(domain) & free
            for name in names:
                free &= ~self.fits(name)
        claims = np.sum([self.fits(name) & free for name in self.roles["seen"]], axis=0)
        if claims.max(initial=0) > 1:
            raise ValueError(
                f"seen domains {', '.join(self.roles['seen'])} share {int((claims > 1).sum())} ratings, which would "
                "count twice in training; take domains of one kind (genre, age ...), or only rest"
            )
        return self.fits(domain) & free

    # Columns ------------------------------------------------------------------------------------------------------

    @cached_property
    def known_items(self) -> Bools:
        """Bool [1683]: items that training rows show; others have id 0."""
        train = np.any([self.member(name) for name in self.roles["seen"]], axis=0) & (self.period == 0)
        known = np.zeros(NUM_ITEMS + 1, np.bool_)
        known[self.ratings.item[train]] = True
        return known

    @cached_property
    def table(self) -> Interactions:
        """All ratings as rows, in the order of the file."""
        ratings, past = self.ratings, self.past
        label, mask = self.labels()
        return Interactions(
            dense=torch.from_numpy(self._dense().astype(np.float32)),
            ids=torch.from_numpy(self._ids()),
            bags=self._bags(),
            label=torch.from_numpy(label.astype(np.float32)),
            mask=torch.from_numpy(mask),
            user=torch.from_numpy(ratings.user),
            row=torch.arange(len(past.page)),
        )

    def labels(self) -> tuple[Bools, Bools]:
        """Return labels and masks [N, T]; a label not decided before the end of its row's period is masked."""
        time = self.ratings.time.astype(np.float64)
        gap = np.where(self.past.next_time < self.horizon, self.past.next_time - time, np.inf)
        labels, masks = [], []
        for name in self.tasks:
            _, rule, watched = TASKS[name]
            mask = np.ones(len(time), np.bool_) if watched == 0 else time + watched <= self.horizon
            labels.append(rule(self.ratings.rating, gap) & mask)
            masks.append(mask)
        return np.stack(labels, 1), np.stack(masks, 1)

    def _dense(self) -> Floats:
        past = self.past
        counts = np.log1p([past.user_count, past.item_count])
        return np.stack([counts[0], past.user_mean - 3.5, counts[1], past.item_mean - 3.5], 1)

    def _ids(self) -> NDArray[np.int64]:
        ratings = self.ratings
        year = np.where(ratings.year > 0, ((ratings.year - FIRST_YEAR) // 5 + 1).clip(1, 16), 0)
        age = np.where(ratings.age > 0, 1 + np.searchsorted(AGE_CUTS, ratings.age, side="right"), 0)
        columns = [
            np.where(self.known_items[ratings.item], ratings.item, 0),
            year[ratings.item],
            age[ratings.user],
            ratings.gender[ratings.user],
            ratings.occupation[ratings.user],
            1 + ratings.time // HOUR % 24,
        ]
        return np.stack(columns, 1)

    def _bags(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        ratings, history = self.ratings, self.past.history
        most = int(ratings.genres.sum(1).max())
        genre = np.sort(np.where(ratings.genres, -(1 + np.arange(len(GENRES))), 0), axis=1)[:, :most]
        genre_ids = torch.from_numpy(-genre[ratings.item])
        seen = history >= 0
        shown = np.where(seen, ratings.item[history], 0)
        items = torch.from_numpy(np.where(self.known_items[shown], shown, 0))
        liking = torch.from_numpy(np.where(seen, (ratings.rating[history] - 3) / 2, 0).astype(np.float32))
        filled = (items > 0).float()
        return {
            "genres": (genre_ids, (genre_ids > 0).float()),
            "history": (items, filled),
            "history_rated": (items, liking * filled),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Do not copy the tables to loader processes; data sets hold their own rows."""
        kept = ("root", "split", "tasks", "roles", "_cache")
        return {name: self.__dict__[name] for name in kept}
