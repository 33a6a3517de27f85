# SPDX-License-Identifier: Apache-2.0
"""What every set of images provides: its classes, its domains, and the images of a domain and split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from moeapps.data.domain import Role, Split
from tasks.image_diffusion.data.batch import ImageDataset


class ImageSource(ABC):
    """Base class of the sets of images that `ImageData` can read.

    Attributes:
        default_roles: domains per role where the data module names none.
        latent: images are latents of an autoencoder, not pixels.
    """

    default_roles: ClassVar[dict[Role, list[str]]] = {}
    latent: bool = False

    @property
    @abstractmethod
    def channels(self) -> int:
        """C of the images the model sees."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """H = W of the images the model sees."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """One name per label."""

    @property
    @abstractmethod
    def superclass(self) -> list[int]:
        """Group of each label (0, 1, ...): what classification routing is supervised by."""

    @abstractmethod
    def bind(self, roles: dict[Role, list[str]]) -> None:
        """Take note of the roles of this run's domains.

        Raises:
            ValueError: a domain this set does not have.
        """

    def missing(self, domain: str, cache: Path | None) -> str | None:
        """Return why an OPTIONAL domain cannot be had, or None."""
        return None

    def prepare(self, cache: Path | None) -> None:  # noqa: B027 - files of a user need no preparing
        """Fetch or generate what is not in the cache yet; called once, by one process."""

    @abstractmethod
    def dataset(self, domain: str, split: Split, cache: Path | None) -> ImageDataset:
        """Return the images of one domain and split.

        Domains of every role have a ``train`` split: that of an unseen one is what a few examples are taken from.
        """

    @abstractmethod
    def describe(self, domain: str) -> str:
        """Say where a domain's images come from, for results files."""


def check_domains(roles: dict[Role, list[str]], known: Sequence[str], what: str) -> None:
    """Raise ValueError where a role names a domain that is not known."""
    for names in roles.values():
        for name in names:
            if name not in known:
                raise ValueError(f"{what} has no domain {name!r}; allowed: {', '.join(known)}")


def split_rows(label: Tensor, parts: dict[Split, float], seed: int) -> dict[Split, Tensor]:
    """Split rows class by class.

    Args:
        label: int64 [N].
        parts: share of each class that goes into every split but ``train``, which gets the rest.
        seed: seed of the choice; the same rows for the same labels and seed.

    Returns:
        split -> sorted int64 rows. A class of which there is little gives ``train`` first.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[Split, list[Tensor]] = {"train": [], "val": [], "test": []}
    for value in label.unique().tolist():
        rows = torch.nonzero(label == value).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        start = 0
        for split, share in parts.items():
            count = min(round(share * len(rows)), len(rows) - 1 - start)
            chosen[split].append(rows[start : start + max(count, 0)])
            start += max(count, 0)
        chosen["train"].append(rows[start:])
    none = torch.empty(0, dtype=torch.int64)
    return {split: torch.cat([none, *rows]).sort().values for split, rows in chosen.items()}
