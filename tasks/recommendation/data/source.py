# SPDX-License-Identifier: Apache-2.0
"""What every log provides: its columns, its domains, and the rows of a domain and split."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import SPLITS_OF, Role, Split
from moeapps.data.gather import BatchDataset
from moeapps.data.source import DomainSource
from tasks.recommendation.data.batch import Schema
from tasks.recommendation.data.lists import ListSchema


class LogSource(DomainSource):
    """Base class of the logs that `RecommendationData` (impressions) and `ListData` (lists) can read.

    Attributes:
        streaming: rows are read block by block while training; see `tasks.recommendation.data.readers.tables`.
    """

    streaming: bool = False

    @property
    @abstractmethod
    def schema(self) -> Schema | ListSchema:
        """Sizes of the columns, known before anything is read."""

    @abstractmethod
    def dataset(self, domain: str, split: Split, cache: Path | None) -> BatchDataset:
        """Return the rows of one domain and split."""

    def item_name(self, item: int) -> str:
        """Return what to call an item, by its number in this log, in reports."""
        return f"item {item}"


class GeneratedLog(LogSource):
    """Base class of logs that are drawn: what was drawn of a domain and split is one file in the cache.

    Attributes:
        data_seed: seed of everything.
        stem: how the files' names begin.
    """

    data_seed: int
    stem: ClassVar[str]

    @abstractmethod
    def made_of(self, domain: str, split: Split) -> list[Any]:
        """Return everything that `draw` depends on."""

    @abstractmethod
    def draw(self, domain: str, split: Split) -> dict[str, NDArray[Any]]:
        """Draw one domain and split."""

    def describe(self, domain: str) -> str:
        """Say what was drawn."""
        return f"generated, data_seed {self.data_seed}"

    def prepare(self, cache: Path | None) -> None:
        """Generate what the roles can touch."""
        for _, name, split in touched(self.roles):
            self._file(name, split, cache)

    def drawn(self, domain: str, split: Split, cache: Path | None) -> dict[str, NDArray[Any]]:
        """Return what `draw` gave, out of the cache."""
        with np.load(self._file(domain, split, cache)) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def _file(self, domain: str, split: Split, cache: Path | None) -> Path:
        key = config_hash(self.made_of(domain, split))

        def write(target: Path) -> None:
            with open(target, "wb") as file:
                np.savez(file, allow_pickle=False, **self.draw(domain, split))

        return build_once(cache_dir("recommendation", root=cache) / f"{self.stem}-{domain}-{split}-{key}.npz", write)


def touched(roles: dict[Role, list[str]]) -> Iterator[tuple[Role, str, Split]]:
    """Yield role, domain and split of all rows that a run may read."""
    for role, names in roles.items():
        yield from ((role, name, split) for name in names for split in SPLITS_OF[role])
