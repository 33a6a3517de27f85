# SPDX-License-Identifier: Apache-2.0
"""MovieLens 100K as lists: one film the user liked among films the user never rated, ranked by the user's past.

A list belongs to a rating of 4 or 5. Its negatives are drawn once, by popularity among the ratings that seen domains
and the list's own give in the training period (so that training lists hold known films alone), from the films that the
user NEVER rates: whether a film will be rated later is looked up to avoid false negatives and for nothing else. The
history holds films rated at STRICTLY earlier times (half of the ratings share their second with another of the user),
whatever their rating.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from moeapps.data.domain import Role, Split
from moeapps.data.gather import TableDataset
from tasks.recommendation.data.factors import stream
from tasks.recommendation.data.lists import Lists, ListSchema
from tasks.recommendation.data.rating_lists import make_lists
from tasks.recommendation.data.readers.movielens import AGE_CUTS, FIRST_YEAR, GENRE_GROUPS, HISTORY, Cut, MovieLens100K
from tasks.recommendation.data.readers.ratings import GENRES, NUM_ITEMS, OCCUPATIONS, read_titles
from tasks.recommendation.data.source import LogSource

Ints = NDArray[np.int64]
LIKED = 4  # the least rating of a positive
YEARS = 17  # 16 spans of five years, 0 for unknown


class MovieLensLists(LogSource):
    """Lists of MovieLens 100K; domains by age, gender, occupation, genre of the liked film and month.

    A list that fits a held-out domain belongs to no seen one, as in `MovieLens100K`. The domain ``rest`` holds all
    lists that no held-out domain claims: with ``seen: [rest]`` and no other domain, all lists.

    Args:
        root: folder with ml-100k.inter, .item and .user; None fetches them out of the recbole wheel.
        split: ``time`` (first 70 per cent of the log train, next 10 validate, the rest tests) or ``user_time`` (each
            user's own).
        negatives: films beside the liked one.
        popularity: power of a film's number of training ratings by which negatives are drawn; 0 = evenly among those
            rated at all.
        same_category: draw negatives of the liked film's category only and tell the category as the request, as a
            search within a category does; else there is no request (it would give the positive away).
        data_seed: seed of the negatives.

    Raises:
        ValueError: an unknown split, no negative, more negatives than other films, or a power below 0.
    """

    default_roles: ClassVar[dict[Role, list[str]]] = {
        "seen": ["age_25_34", "age_35_49"],
        "validation": ["age_50plus"],
        "unseen": ["age_under25"],
    }

    def __init__(
        self,
        *,
        root: Path | None = None,
        split: Cut = "time",
        negatives: int = 4,
        popularity: float = 0.75,
        same_category: bool = False,
        data_seed: int = 0,
    ) -> None:
        if not 1 <= negatives < NUM_ITEMS or popularity < 0:
            raise ValueError(
                f"negatives={negatives}, popularity={popularity}: give 1 to {NUM_ITEMS - 1} negatives (there are "
                f"{NUM_ITEMS} films), and a power of at least 0"
            )
        self.log = MovieLens100K(root=root, split=split)
        self.negatives, self.popularity = negatives, popularity
        self.same_category, self.data_seed = same_category, data_seed
        self._cache: Path | None = None

    @cached_property
    def schema(self) -> ListSchema:
        """Film, category, rarest genre, next rarest genre and year; the request's category; age, gender, occupation."""
        categories = len(GENRE_GROUPS) + 2
        return ListSchema(
            item_fields={
                "item": NUM_ITEMS + 1,
                "category": categories,
                "genre": len(GENRES) + 1,
                "genre_2": len(GENRES) + 1,
                "year": YEARS,
            },
            query_fields={"category": categories} if self.same_category else {},
            profile_fields={"age": len(AGE_CUTS) + 2, "gender": 3, "occupation": len(OCCUPATIONS) + 1},
            history=HISTORY,
            candidates=1 + self.negatives,
            factors=(*GENRE_GROUPS, "other"),
        )

    def bind(self, roles: dict[Role, list[str]]) -> None:
        """Check the names of the domains."""
        self.__dict__.pop("item_ids", None)  # they depend on the roles
        self.log.bind(roles)

    def describe(self, domain: str) -> str:
        """Say which data set it is, how it is split, and where the files came from."""
        return f"{self.log.describe(domain)}; negatives of seed {self.data_seed}"

    def prepare(self, cache: Path | None) -> None:
        """Fetch the files and show on which terms they may be used.

        Raises:
            ValueError: they cannot be had.
        """
        self.log.prepare(cache)

    def item_name(self, item: int) -> str:
        """Title of a film."""
        return self._titles.get(item, f"film {item}")

    @cached_property
    def _titles(self) -> dict[int, str]:
        return read_titles(self.log.folder(self._cache))

    # Lists --------------------------------------------------------------------------------------------------------

    def dataset(self, domain: str, split: Split, cache: Path | None) -> TableDataset:
        """Return the lists of one domain and split.

        Raises:
            ValueError: seen domains share lists, or a file is missing or damaged.
        """
        self._cache = cache
        self.log.read(cache)
        inside = self.log.period == ("train", "val", "test").index(split)
        return TableDataset(self.table(domain).take(torch.from_numpy(np.flatnonzero(inside[self.positives(domain)]))))

    def positives(self, domain: str) -> Ints:
        """Numbers [L] of the ratings that give a list of a domain."""
        return np.flatnonzero((self.log.ratings.rating >= LIKED) & self.log.member(domain))

    @cached_property
    def category(self) -> Ints:
        """Category of each film, [1683], from 0; films of numbers that do not exist have the last."""
        return np.asarray(self.log.genre_group)

    def weight(self, domain: str) -> NDArray[np.float64]:
        """How readily each film is drawn as a negative for a domain, [1683].

        0 for films without a training rating of a seen domain or of this one.
        """
        names = {*self.log.roles["seen"], domain}
        shown = np.any([self.log.member(name) for name in names], axis=0) & (self.log.period == 0)
        count = np.bincount(self.log.ratings.item[shown], minlength=NUM_ITEMS + 1)
        return np.asarray(np.where(count > 0, count.clip(1) ** self.popularity, 0.0))

    def sampled(self, domain: str) -> Ints:
        """Negatives of every list of a domain, [L, negatives], without repeats; -1 where a user has rated all others.

        The least of independent exponentials with rates w are a draw without replacement with weights w.
        """
        ratings, positives, readily = self.log.ratings, self.positives(domain), self.weight(domain)
        who, own = ratings.user[positives], self.category[ratings.item[positives]]
        rng, drawn = stream(self.data_seed, "negatives"), np.full((len(who), self.negatives), -1)
        for user in np.unique(who):
            rows = np.flatnonzero(who == user)
            weight = readily.copy()
            weight[ratings.item[ratings.user == user]] = 0
            waiting = rng.standard_exponential((len(rows), len(weight)))
            allowed = np.broadcast_to(weight > 0, waiting.shape)
            if self.same_category:
                allowed = allowed & (self.category == own[rows, None])
            waiting = np.divide(waiting, weight, out=np.full_like(waiting, np.inf), where=allowed)
            first = np.argpartition(waiting, self.negatives, axis=1)[:, : self.negatives]
            drawn[rows] = np.where(np.isfinite(np.take_along_axis(waiting, first, 1)), first, -1)
        return drawn

    @cached_property
    def item_ids(self) -> Ints:
        """Fields of every film, [1683, 5], in the order of the schema; a film no training rating shows has item 0."""
        ratings, number = self.log.ratings, np.arange(NUM_ITEMS + 1)
        films = np.where(ratings.genres, ratings.genres.sum(0), np.iinfo(np.int64).max)
        order = np.argsort(films, axis=1, kind="stable")[:, :2]
        genre = np.where(np.take_along_axis(ratings.genres, order, 1), 1 + order, 0)
        year = np.where(ratings.year > 0, ((ratings.year - FIRST_YEAR) // 5 + 1).clip(1, YEARS - 1), 0)
        return np.column_stack([np.where(self.log.known_items, number, 0), 1 + self.category, genre, year])

    def table(self, domain: str) -> Lists:
        """All lists of a domain, in the order of the file; the liked film stands at a random place."""
        ratings, rows = self.log.ratings, self.positives(domain)
        events = self.log.past.history[rows]
        past = np.where(events >= 0, ratings.item[events], -1)
        past[past == ratings.item[rows, None]] = -1  # a film rated twice is not in the past of its own list
        who = ratings.user[rows]
        age = np.where(ratings.age > 0, 1 + np.searchsorted(AGE_CUTS, ratings.age, side="right"), 0)
        return make_lists(
            self.item_ids,
            past=past,
            candidates=np.column_stack([ratings.item[rows], self.sampled(domain)]),
            group=self.category[ratings.item[rows]],
            same_group=self.same_category,
            profile=np.column_stack([age[who], ratings.gender[who], ratings.occupation[who]]),
            user=who,
            row=rows,
            seed=self.data_seed,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Do not copy the tables to loader processes; data sets hold their own lists."""
        kept = ("log", "negatives", "popularity", "same_category", "data_seed", "_cache")
        return {name: self.__dict__[name] for name in kept}
