# SPDX-License-Identifier: Apache-2.0
"""What every set of images provides: its classes, its domains, and the images of a domain and split."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moeapps.data.domain import Role, Split
from moeapps.data.images.arrays import class_counts
from moeapps.data.images.batch import ImageDataset
from moeapps.data.images.folders import found_table
from moeapps.data.source import DomainSource

log = logging.getLogger("moeapps")


class ImageSource(DomainSource):
    """Base class of the sets of images that `ImageData` can read.

    Domains of every role have a ``train`` split: that of an unseen one is what a few examples are taken from.

    Attributes:
        latent: images are latents of an autoencoder, not pixels.
        channels: C of the images the model sees.
        image_size: H = W of the images the model sees.
        class_names: one name per label; known once the roles are bound.
        superclass: group of each label (0, 1, ...): what classification routing is supervised by.
    """

    latent: bool = False
    channels: int
    image_size: int
    class_names: list[str]
    superclass: list[int]

    @abstractmethod
    def dataset(self, domain: str, split: Split, cache: Path | None) -> ImageDataset:
        """Return the images of one domain and split."""


class OwnSource(ImageSource):
    """A user's own domains below a folder: classes of one name are one class, whichever domain they are in.

    A class is one that has an image. Labels without names are classes of their domain alone (``<domain>/3``), unless
    ``shared_labels`` says that they mean the same everywhere. The superclass of a class is the first domain that has
    it. Splits are drawn class by class.

    Args:
        root: folder that holds the domains.
        channels: C.
        image_size: height and width the model sees.
        val_share: share of each class for validation.
        test_share: share of each class for tests.
        seed: seed of the splits.
        shared_labels: label 3 of a domain without names is label 3 of every other such domain (ImageNet's, say).

    Raises:
        ValueError: shares that leave nothing for training.
    """

    def __init__(
        self,
        *,
        root: Path,
        channels: int,
        image_size: int,
        val_share: float,
        test_share: float,
        seed: int = 0,
        shared_labels: bool = False,
    ) -> None:
        if not (val_share >= 0 and test_share >= 0 and val_share + test_share < 1):
            raise ValueError(f"val_share={val_share}, test_share={test_share}; 0 or more, and together less than 1")
        self.root, self.channels, self.image_size, self.seed = Path(root), channels, image_size, seed
        self.shares: dict[Split, float] = {"test": test_share, "val": val_share}
        self.shared_labels = shared_labels
        self.counts: dict[str, dict[str, int]] = {}
        self._names: dict[str, list[str]] = {}
        self.class_names, self.superclass = [], []

    @abstractmethod
    def labels_of(self, domain: str) -> tuple[Tensor, list[str]]:
        """Return a domain's own labels, int64 [N], and the class name of each number; some may have no image."""

    def labels_of_files(self, files: Mapping[str, Sequence[Path]]) -> tuple[Tensor, list[str]]:
        """Return the same for files in the order of their classes."""
        each = torch.tensor([len(paths) for paths in files.values()])
        return torch.arange(len(files)).repeat_interleave(each), list(files)

    def unnamed(self, domain: str, label: Tensor) -> list[str]:
        """Name the numbers up to the largest label where the data gives no names."""
        count = int(label.max()) + 1 if len(label) else 0
        return [str(number) if self.shared_labels else f"{domain}/{number}" for number in range(count)]

    def bind(self, roles: dict[Role, list[str]]) -> None:
        """Count the images of every class of every domain."""
        self.counts, self._names = {}, {}
        for domain in (name for names in roles.values() for name in names):
            label, self._names[domain] = self.labels_of(domain)
            self.counts[domain] = class_counts(label, self._names[domain], f"domain {domain!r} in {self.root}")
        first: dict[str, int] = {}
        for number, names in enumerate(self.counts.values()):
            first = {**dict.fromkeys(names, number), **first}
        self.class_names = list(dict.fromkeys(name for names in self.counts.values() for name in names))
        self.superclass = [first[name] for name in self.class_names]

    def prepare(self, cache: Path | None) -> None:
        """Show what was found, before anything is trained on it."""
        log.info("%s holds, by class and domain:\n%s", self.root, found_table(self.counts))

    def numbers(self, domain: str) -> Tensor:
        """Label among all classes of each name of a domain, int64; -1 where no domain has an image of it."""
        number = {name: i for i, name in enumerate(self.class_names)}
        return torch.tensor([number.get(name, -1) for name in self._names[domain]])
