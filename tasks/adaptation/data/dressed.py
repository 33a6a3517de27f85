# SPDX-License-Identifier: Apache-2.0
"""What generated and real digits share: grey digits are dressed as domains, once, and kept in the cache."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import SPLITS_OF, Split
from moeapps.data.images.batch import PixelImages
from moeapps.files import write_arrays
from tasks.adaptation.data.looks import Look, dressed
from tasks.adaptation.data.source import AdaptationSource, check_split


class DressedDigits(AdaptationSource):
    """Ten digits, 3 x H x H, white on black until each domain dresses them in its own way.

    Args:
        counts: images of a domain: ``train`` of a seen one; ``held`` of a seen one for validation, and for tests;
            ``unseen`` of the test split of an unseen one, and of either split of a validation domain.
        distance: how far the domains lie apart: 1 as listed, 0 as alike as their writers are.
        image_size: H.
        seed: seed of everything random.

    Raises:
        ValueError: a count or size below 1, or a negative distance.
    """

    def __init__(self, counts: dict[str, int], *, distance: float, image_size: int, seed: int) -> None:
        for name, count in (*counts.items(), ("image_size", image_size)):
            if count < 1:
                raise ValueError(f"{name}: {count} is not allowed; use 1 or more")
        if not distance >= 0:
            raise ValueError(f"distance={distance} is not allowed; use 0 or more, 1 for the domains as listed")
        self.domains = [name for names in self.default_roles.values() for name in names]
        self.counts, self.distance, self.seed = counts, distance, seed
        self.channels, self.image_size = 3, image_size
        self.class_names = [f"digit_{number}" for number in range(10)]

    @abstractmethod
    def base(self, domain: str, split: Split, cache: Path | None) -> tuple[Tensor, Tensor]:
        """Return the digits of a domain and split before they are dressed, in random order.

        Returns:
            uint8 [N, 1, H, H], white on black, and int64 [N].
        """

    @abstractmethod
    def looks(self, domain: str, cache: Path | None) -> tuple[Look, ...]:
        """Return what a domain's digits are dressed with, in that order."""

    @abstractmethod
    def key(self) -> Any:
        """Return a plain value that changes with whatever else the images depend on."""

    def prepare(self, cache: Path | None) -> None:
        """Make what is not in the cache yet."""
        from rich.progress import track

        every = [(name, split) for name, role in self.role_of.items() for split in SPLITS_OF[role]]
        wanted = [(name, split) for name, split in every if not self._path(name, split, cache).exists()]
        for name, split in track(wanted, "drawing digits", transient=True, disable=not wanted):
            self._load(name, split, cache)

    @override
    def dataset(self, domain: str, split: Split, cache: Path | None) -> PixelImages:
        arrays = self._load(domain, split, cache)
        return PixelImages(torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]))

    def count(self, domain: str, split: Split) -> int:
        """Return the images of a domain and split."""
        if self.role_of[domain] != "seen":
            return self.counts["unseen"]
        return self.counts["train" if split == "train" else "held"]

    def generator(self, domain: str, split: Split, part: str) -> torch.Generator:
        """Return a generator of its own for each domain, split and part of the work."""
        return torch.Generator().manual_seed(int(config_hash([self.seed, domain, split, part]), 16))

    def _path(self, domain: str, split: Split, cache: Path | None) -> Path:
        sizes = [self.count(domain, split), self.image_size, self.distance, self.seed, self.role_of[domain]]
        key = config_hash([type(self).__name__, self.key(), domain, split, *sizes])
        return cache_dir("adaptation", root=cache) / f"{domain}-{split}-{key}.npz"

    def _load(self, domain: str, split: Split, cache: Path | None) -> dict[str, Any]:
        check_split(domain, split, self.role_of[domain])

        def write(path: Path) -> None:
            grey, label = self.base(domain, split, cache)
            image = dressed(grey, self.looks(domain, cache), self.generator(domain, split, "look"))
            write_arrays(path, x=image.numpy(), y=label.numpy())

        with np.load(build_once(self._path(domain, split, cache), write)) as file:
            return dict(file)
