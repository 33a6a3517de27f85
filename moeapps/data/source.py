# SPDX-License-Identifier: Apache-2.0
"""A source of domains, such as a log or a set of images, and the data module that reads one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

from torch.utils.data import Dataset

from moeapps.data.domain import DomainDataModule, Role, Split


class DomainSource(ABC):
    """Base class of what a `SourceDataModule` can read.

    Attributes:
        domains: names of all domains it can give.
        default_roles: domains per role where the data module names none.
        roles: domains per role of this run, from `bind`.
        role_of: the role of each of them.
    """

    domains: Collection[str]
    default_roles: ClassVar[dict[Role, list[str]]] = {}
    roles: dict[Role, list[str]]
    role_of: dict[str, Role]

    @property
    def title(self) -> str:
        """What errors call this source."""
        return type(self).__name__

    def bind(self, roles: dict[Role, list[str]]) -> None:
        """Take note of the roles of this run's domains.

        Raises:
            ValueError: a domain this source does not have.
        """
        self.role_of = {name: role for role, names in roles.items() for name in names}
        self.check(self.role_of)
        self.roles = roles

    def check(self, domains: Collection[str]) -> None:
        """Raise ValueError where a name is not one of `domains`."""
        for name in domains:
            if name not in self.domains:
                raise ValueError(f"{self.title} has no domain {name!r}; allowed: {', '.join(self.domains) or 'none'}")

    def missing(self, domain: str, cache: Path | None) -> str | None:
        """Return why an OPTIONAL domain cannot be had, or None."""
        return None

    def prepare(self, cache: Path | None) -> None:  # noqa: B027 - files of a user need no preparing
        """Fetch or generate what is not in the cache yet; called once, by one process."""

    @abstractmethod
    def dataset(self, domain: str, split: Split, cache: Path | None) -> Dataset[Any]:
        """Return the items of one domain and split."""

    @abstractmethod
    def describe(self, domain: str) -> str:
        """Say where a domain's items come from, for results files."""


class SourceDataModule(DomainDataModule):
    """Domains out of one source, which says their roles where none are named.

    Args:
        source: the items.
        seen: domains that are trained on; None means the source's own.
        validation: domains never trained on where every choice is made; None means the source's own.
        unseen: domains that only ``test`` touches; None means the source's own.
        batch_size: items per training step and process.
        eval_batch_size: items per evaluation batch and process; None means a few times ``batch_size``.
        options: further arguments of `DomainDataModule`.

    Attributes:
        eval_factor: how many training batches make an evaluation batch.

    Raises:
        ValueError: a domain the source does not have, or roles that overlap.
    """

    eval_factor: ClassVar[int] = 1
    source: DomainSource

    def __init__(
        self,
        *,
        source: DomainSource,
        seen: list[str] | None = None,
        validation: list[str] | None = None,
        unseen: list[str] | None = None,
        batch_size: int,
        eval_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        usual = source.default_roles
        super().__init__(
            seen=usual.get("seen", []) if seen is None else seen,
            validation=usual.get("validation", []) if validation is None else validation,
            unseen=usual.get("unseen", []) if unseen is None else unseen,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size or self.eval_factor * batch_size,
            **options,
        )
        self.source = source
        source.bind(self.roles)
        self.sources = {name: source.describe(name) for name in self.domain_names}

    def available(self, domain: str) -> str | None:
        """Return why an optional domain is missing."""
        return self.source.missing(domain, self.cache_dir)

    def prepare_data(self) -> None:
        """Fetch or generate what is not in the cache yet."""
        self.source.prepare(self.cache_dir)

    def dataset(self, domain: str, split: Split) -> Dataset[Any]:
        """Return the items of one domain and split."""
        return self.source.dataset(domain, split, self.cache_dir)
