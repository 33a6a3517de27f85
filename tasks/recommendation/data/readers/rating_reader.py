# SPDX-License-Identifier: Apache-2.0
"""Logs of ratings as impressions (HoME) or as lists with histories (AW-MoE): what their readers share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from numpy.typing import NDArray

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import SPLITS, Role, Split
from moeapps.data.gather import TableDataset
from tasks.recommendation.data.lists import Lists, ListSchema
from tasks.recommendation.data.rating_lists import RatingLog, first_liked, rating_lists
from tasks.recommendation.data.readers.arrow_text import Lookup, hash_text
from tasks.recommendation.data.readers.blocks import block_writer
from tasks.recommendation.data.readers.columns import IdColumn, TableColumns, TaskColumn
from tasks.recommendation.data.readers.public import PublicLog, by_time, replace
from tasks.recommendation.data.readers.published import Published
from tasks.recommendation.data.readers.values import TableError
from tasks.recommendation.data.source import LogSource

CUTS = (0.7, 0.8)  # of the log's ratings in the order of time: where validation and test begin


class RatingReader(Published):
    """Base class of the readers of rating logs.

    Args:
        root: folder of the published files.

    Attributes:
        liked: ratings of at least so much are positive.
        item_fields: fields of an item beside the item: name -> cardinality, id 0 (unknown) included.
        items_table: cardinality of the item itself; items are hashed to it.
        groups: names of the groups that negatives are drawn in; a search for one is the request of its lists.
        domains: names of the domains.
        default_roles: domains per role where the data module names none.
    """

    liked: ClassVar[float] = 4.0
    items_table: int
    item_fields: dict[str, int]
    groups: tuple[str, ...] = ()
    domains: tuple[str, ...]
    default_roles: dict[Role, list[str]]

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the rows, beside the files."""
        return {}

    def ratings(self) -> Iterator[pa.Table]:
        """Yield user, item (integers or text), rating (float64), time (int64 seconds) and domain (text or missing)."""
        raise TypeError(f"{type(self).__name__} must define ratings()")

    def items(self) -> pa.Table:
        """Return item, its fields as ids, and ``group`` (from 0); items that are rated may be missing."""
        raise TypeError(f"{type(self).__name__} must define items()")


def whole_ratings(reader: RatingReader) -> Iterator[pa.Table]:
    """Yield the reader's ratings, none of which may lack an entry: a rating without a time has no place in any split.

    Raises:
        TableError: one that does; the text says which entry, how often, and where it is first.
    """
    before = 0
    for table in reader.ratings():
        for name in ("user", "item", "rating", "time"):
            lacking = pc.is_null(table[name], nan_is_null=True)
            if pc.any(lacking).as_py():
                first = before + pc.index(lacking, True).as_py() + 1
                raise TableError(
                    f"{reader.name}: {pc.sum(lacking).as_py()} ratings have no {name}, the first of them is number "
                    f"{first} of the log; fill it in or leave these rows out of the files"
                )
        before += len(table)
        yield table


def item_codes(items: pa.ChunkedArray | pa.Array, cardinality: int) -> NDArray[np.int64]:
    """Return ids 1 .. cardinality - 1: the number itself where all fit, else hashes."""
    if pa.types.is_integer(items.type):
        values = items.to_numpy()
        if not len(values) or (values.min() >= 1 and values.max() < cardinality):
            return np.asarray(values, np.int64)
    hashed = hash_text(items.cast(pa.string()))
    return np.asarray(1 + (hashed % np.uint64(cardinality - 1)), np.int64)


class RatingLists(LogSource):
    """Ratings as lists with histories: see `tasks.recommendation.data.rating_lists`.

    The log is converted once to ratings.parquet and items.parquet in the cache, and held in memory as numbers, five of
    eight bytes a rating; the lists of each split and domain are at most ``max_lists``.

    Args:
        reader: the published files.
        history: longest history.
        negatives: beside each positive.
        popularity: power of an item's number of training ratings by which negatives are drawn.
        cuts: shares of the ratings, in the order of time, where validation and test begin.
        max_lists: lists per split and domain, a random choice of all; None keeps all.
        data_seed: seed of the negatives and of the choice.

    Raises:
        ValueError: no history or negative, or cuts that are not 0 < validation < test < 1.
    """

    def __init__(
        self,
        *,
        reader: RatingReader,
        history: int = 20,
        negatives: int = 4,
        popularity: float = 0.75,
        cuts: tuple[float, float] = CUTS,
        max_lists: int | None = 200_000,
        data_seed: int = 0,
    ) -> None:
        if history < 1 or negatives < 1 or popularity < 0:
            raise ValueError(f"history={history}, negatives={negatives} must be 1 or more, popularity={popularity} 0")
        check_cuts(cuts)
        self.reader, self.history, self.negatives, self.popularity = reader, history, negatives, popularity
        self.cuts, self.max_lists, self.data_seed = cuts, max_lists, data_seed
        self.default_roles = reader.default_roles  # type: ignore[misc]  # the base class' are of the class
        self.domains = reader.domains
        self._cache: Path | None = None

    @property
    def schema(self) -> ListSchema:
        """The item and its fields; the group as the request, where there are groups."""
        groups = self.reader.groups
        return ListSchema(
            item_fields={"item": self.reader.items_table, **self.reader.item_fields},
            query_fields={"category": len(groups) + 1} if groups else {},
            profile_fields={},
            history=self.history,
            candidates=1 + self.negatives,
            factors=groups,
        )

    def bind(self, roles: dict[Role, list[str]]) -> None:
        """Check the names of the domains."""
        super().bind(roles)
        self.__dict__.pop("known", None)

    def describe(self, domain: str) -> str:
        """Name the data set."""
        return f"{self.reader.name}, domain {domain}; negatives of seed {self.data_seed}"

    def item_name(self, item: int) -> str:
        """The item as the files name it."""
        return f"{self.log.names[item]}"

    def prepare(self, cache: Path | None) -> None:
        """Convert the published files if that was not done yet."""
        self._folder(cache)

    def _folder(self, cache: Path | None) -> Path:
        key = config_hash(
            [type(self.reader).__name__, self.reader.revision, self.reader.stamps(), self.reader.settings]
        )
        folder = cache_dir("recommendation", root=cache) / f"ratings-{type(self.reader).__name__.lower()}-{key}"
        build_once(folder / "items.parquet", lambda path: pyarrow.parquet.write_table(self.reader.items(), path))
        build_once(folder / "ratings.parquet", self._write)
        return folder

    def _write(self, path: Path) -> None:
        writer, rows = None, 0
        for table in whole_ratings(self.reader):
            writer = writer or block_writer(path, table.schema)
            writer.write_table(table)
            rows += len(table)
        if writer is not None:
            writer.close()
        if rows == 0:
            raise TableError(f"{self.reader.name}: the files hold no rating")

    @cached_property
    def log(self) -> RatingLog:
        """The ratings; users and items are numbered in the order in which they first appear."""
        folder = self._folder(self._cache)
        table = pyarrow.parquet.read_table(folder / "ratings.parquet")
        user, item = (table[name].combine_chunks().dictionary_encode() for name in ("user", "item"))
        items = pyarrow.parquet.read_table(folder / "items.parquet")
        described = Lookup(iter([items]), "item", "items").add(pa.table({"item": item.dictionary}), "item")
        fields = [described[name].fill_null(0).to_numpy() for name in self.reader.item_fields]
        first = item_codes(item.dictionary, self.reader.items_table)
        place = pc.index_in(table["domain"], value_set=pa.array(self.reader.domains))
        # Items that no file describes join the last group.
        group = described["group"].fill_null(max(len(self.reader.groups) - 1, 0)).to_numpy()
        return RatingLog(
            user=user.indices.to_numpy().astype(np.int64),
            item=item.indices.to_numpy().astype(np.int64),
            rating=table["rating"].to_numpy(),
            time=table["time"].to_numpy(),
            domain=place.fill_null(-1).to_numpy().astype(np.int64),
            item_ids=np.column_stack([first, *fields]).astype(np.int64),
            group=group.astype(np.int64),
            names=item.dictionary,
        )

    @cached_property
    def period(self) -> NDArray[np.int64]:
        """0 train, 1 validation, 2 test for each rating; one second is never in two of them."""
        return np.searchsorted(time_cuts(self.log.time, self.cuts), self.log.time, side="right")

    def training_ratings(self, domain: str | None = None) -> NDArray[np.bool_]:
        """Ratings [N] of the training period of the seen domains and of ``domain``, which may be another."""
        names = {*self.roles["seen"], domain} - {None}
        numbers = [number for number, name in enumerate(self.reader.domains) if name in names]
        return np.asarray((self.period == 0) & np.isin(self.log.domain, numbers))

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """Items that training ratings of seen domains show."""
        return np.asarray(np.bincount(self.log.item[self.training_ratings()], minlength=len(self.log.group)) > 0)

    def dataset(self, domain: str, split: Split, cache: Path | None) -> TableDataset:
        """Return the lists of one domain and split.

        Raises:
            ValueError: there is none.
        """
        self._cache = cache
        inside = (self.log.domain == self.reader.domains.index(domain)) & (self.period == SPLITS.index(split))
        rows = self.positives[inside[self.positives]]
        if len(rows) == 0:
            place = self.log.domain[self.positives[self.period[self.positives] == SPLITS.index(split)]]
            there = ", ".join(self.reader.domains[k] for k in np.unique(place[place >= 0])) or "none"
            raise ValueError(
                f"{self.reader.name}: domain {domain!r} has no {split} lists (a list needs a rating of "
                f"{self.reader.liked:g} or more); choose other cuts or domains; domains with some: {there}"
            )
        if self.max_lists is not None and len(rows) > self.max_lists:
            rows = np.sort(np.random.default_rng(self.data_seed).choice(rows, self.max_lists, replace=False))
        return TableDataset(self.lists(rows, domain))

    @cached_property
    def positives(self) -> NDArray[np.int64]:
        """Ratings that give a list."""
        return first_liked(self.log, self.reader.liked)

    def lists(self, rows: NDArray[np.int64], domain: str) -> Lists:
        """Return the lists of some positives of a domain."""
        return rating_lists(
            self.log,
            rows,
            shown=self.training_ratings(domain),
            known=self.known,
            history=self.history,
            negatives=self.negatives,
            power=self.popularity,
            same_group=bool(self.reader.groups),
            seed=self.data_seed,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Do not copy the tables to loader processes; data sets hold their own lists."""
        dropped = ("log", "period", "known", "positives")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}


class RatingImpressions(PublicLog):
    """Ratings as impressions of two tasks: ``like`` and ``love``, read block by block.

    Args:
        reader: the published files.
        love: ratings of at least so much are loved; the reader says what is liked.
        cuts: shares of the ratings, in the order of time, where validation and test begin.
        user_table: size of the table of users.
        window: blocks whose rows are shuffled together.

    Raises:
        ValueError: cuts that are not 0 < validation < test < 1.
    """

    def __init__(
        self,
        *,
        reader: RatingReader,
        love: float = 5.0,
        cuts: tuple[float, float] = CUTS,
        user_table: int = 1 << 18,
        window: int = 8,
    ) -> None:
        check_cuts(cuts)
        self.reader, self.cuts = reader, cuts
        self.name, self.terms, self.get = reader.name, reader.terms, reader.get  # type: ignore[misc]
        self.default_roles = reader.default_roles  # type: ignore[misc]
        fields = [IdColumn(name, size, hashed=False) for name, size in reader.item_fields.items()]
        super().__init__(
            root=reader.root,
            columns=TableColumns(
                # Ratings come in steps of at least a half.
                tasks=[
                    TaskColumn(n, "opinion", "rating", above=a - 0.25)
                    for n, a in (("like", reader.liked), ("love", love))
                ],
                user="user",
                ids=[IdColumn("user", user_table), IdColumn("item", reader.items_table), *fields],
                time="time",
            ),
            domains=reader.domains,
            settings={"reader": [type(reader).__name__, reader.revision, reader.settings], "cuts": cuts},
            window=window,
        )

    def files(self) -> list[Path]:
        """Return the reader's files."""
        return self.reader.files()

    def parts(self) -> Iterator[pa.Table]:
        """Yield the ratings with the fields of their items; a first pass finds where the splits begin."""
        times = np.concatenate([table["time"].to_numpy() for table in whole_ratings(self.reader)])
        val, test = time_cuts(times, self.cuts)
        items = Lookup(iter([self.reader.items()]), "item", self.reader.name)
        for table in self.reader.ratings():
            yield replace(items.add(table, "item"), split=by_time(table["time"], val, test))


def check_cuts(cuts: tuple[float, float]) -> None:
    """Check shares.

    Raises:
        ValueError: not 0 < validation < test < 1.
    """
    if not 0 < cuts[0] < cuts[1] < 1:
        raise ValueError(f"cuts={list(cuts)}: 0 < validation < test < 1 is needed")


def time_cuts(times: NDArray[np.int64], cuts: tuple[float, float]) -> NDArray[np.int64]:
    """Return the first second of the validation and of the test."""
    ordered = np.sort(times)
    return ordered[[int(share * len(ordered)) for share in cuts]]
