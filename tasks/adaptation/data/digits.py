# SPDX-License-Identifier: Apache-2.0
"""Generated digits: ten domains to train on, two to choose by, seven that nothing has seen."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import Role, Split
from moeapps.data.images.batch import PixelImages
from moeapps.data.images.drawing import draw
from moeapps.data.images.splits import check_domains
from moeapps.files import write_arrays
from tasks.adaptation.data import looks, textures
from tasks.adaptation.data.looks import Look
from tasks.adaptation.data.source import DomainSource
from tasks.adaptation.data.strokes import FONTS, HANDS

GENERATOR_VERSION = 1
ROLES: dict[Role, list[str]] = {
    "seen": [
        "plain",
        "inverted",
        "turned_left",
        "turned_right",
        "clouds",
        "noise",
        "blocks",
        "coarse",
        "pen",
        "segments",
    ],
    "validation": ["turned_back", "stripes"],
    "unseen": [
        *("turned_far", "tiles", "colours", "faded", "coarse_inverted", "marker_tiles", "corners_inverted"),
    ],
}
"""Domains of each role by default."""


@cache
def _textures() -> tuple[Tensor, Tensor]:
    """Clouds, for seen domains, and tiles, for others."""
    first, second = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    return textures.clouds(40, 64, first), textures.tiles(40, 64, second)


def recipes(distance: float) -> dict[str, tuple[str, tuple[Look, ...]]]:
    """Return domain -> font, and looks in the order they are applied.

    Args:
        distance: how far the domains lie apart: 1 as listed, 0 all but their fonts alike. Angles, noise, share of
            textures and loss of contrast grow with it.
    """
    clouds, tiles = _textures()
    d = distance
    near = min(d, 1.0)
    cells = {size: max(4, round(size + (1 - d) * (28 - size))) for size in (8, 9, 10)}
    return {
        "plain": ("round", ()),
        "inverted": ("round", (looks.inverted,)),
        "turned_left": ("round", (looks.rotated(30 * d),)),
        "turned_right": ("round", (looks.rotated(-30 * d),)),
        "clouds": ("round", (looks.over(clouds, near),)),
        "noise": ("round", (looks.noisy(0.24 * d),)),
        "blocks": ("round", (looks.pixelated(cells[10]),)),
        "coarse": ("segments", (looks.coarse(cells[9]),)),
        "pen": ("pen", ()),
        "segments": ("segments", (looks.rotated(0.0, 12 * d),)),
        "turned_back": ("round", (looks.rotated(55 * d), looks.blurred(0.3 + 0.5 * d))),
        "stripes": ("round", (looks.striped(0.9 * near),)),
        "turned_far": ("round", (looks.rotated(-55 * d),)),
        "tiles": ("round", (looks.over(tiles, near),)),
        "colours": ("round", (looks.coloured(0.4 / max(d, 0.8)),)),
        "faded": ("round", (looks.faded(min(0.12 * d, 1.0), max(1 - 0.65 * d, 0.1)),)),
        "coarse_inverted": ("corners", (looks.coarse(cells[8]), looks.inverted)),
        "marker_tiles": ("marker", (looks.over(tiles, near),)),
        "corners_inverted": ("corners", (looks.rotated(0.0, 12 * d), looks.inverted)),
    }


class DigitDomains(DomainSource):
    """Ten digits, 3 x 28 x 28, drawn by four hands and dressed as nineteen domains (see `recipes`).

    Every domain and split has drawings of its own: none is in two of them.

    Args:
        train_per_class: training images of a digit in each seen domain.
        held_per_class: images of a digit for validation and again for tests in each seen domain.
        unseen_per_class: images of a digit in each validation domain (for either split) and each unseen one.
        distance: how far the domains lie apart, see `recipes`.
        image_size: height and width in pixels.
        seed: seed of all drawings.

    Raises:
        ValueError: a count or size below 1, or a negative distance.
    """

    def __init__(
        self,
        *,
        train_per_class: int = 60,
        held_per_class: int = 15,
        unseen_per_class: int = 50,
        distance: float = 1.0,
        image_size: int = 28,
        seed: int = 0,
    ) -> None:
        self.counts = {"train": train_per_class, "held": held_per_class, "unseen": unseen_per_class}
        for name, count in (*self.counts.items(), ("image_size", image_size)):
            if count < 1:
                raise ValueError(f"{name}: {count} is not allowed; use 1 or more")
        if not distance >= 0:
            raise ValueError(f"distance={distance} is not allowed; use 0 or more, 1 as published")
        self.distance, self.seed = distance, seed
        self.channels, self.image_size = 3, image_size
        self.class_names = [f"digit_{number}" for number in range(10)]
        self.default_roles = {role: list(names) for role, names in ROLES.items()}
        self._roles: dict[str, Role] = {}

    @override
    def bind(self, roles: dict[Role, list[str]]) -> None:
        check_domains(roles, [name for names in ROLES.values() for name in names], "DigitDomains")
        self._roles = {name: role for role, names in roles.items() for name in names}

    def prepare(self, cache: Path | None) -> None:
        """Draw what is not in the cache yet: about 10 seconds for the base config."""
        from rich.progress import track

        wanted = [
            (n, s) for n, role in self._roles.items() for s in splits_of(role) if not self._path(n, s, cache).exists()
        ]
        for name, split in track(wanted, "drawing digits", transient=True, disable=not wanted):
            self._load(name, split, cache)

    @override
    def dataset(self, domain: str, split: Split, cache: Path | None) -> PixelImages:
        arrays = self._load(domain, split, cache)
        return PixelImages(torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]))

    @override
    def describe(self, domain: str) -> str:
        return f"generated digits, version {GENERATOR_VERSION}, seed {self.seed}, distance {self.distance:g}"

    def count(self, domain: str, split: Split) -> int:
        """Return the images of each digit in a domain and split."""
        if self._roles[domain] != "seen":
            return self.counts["unseen"]
        return self.counts["train" if split == "train" else "held"]

    def _path(self, domain: str, split: Split, cache: Path | None) -> Path:
        parts = [GENERATOR_VERSION, domain, split, self.count(domain, split), self.image_size, self.distance, self.seed]
        return cache_dir("adaptation", root=cache) / f"{domain}-{split}-{config_hash(parts)}.npz"

    def _load(self, domain: str, split: Split, cache: Path | None) -> dict[str, Any]:
        check_split(domain, split, self._roles[domain])
        with np.load(
            build_once(self._path(domain, split, cache), lambda path: self._write(domain, split, path))
        ) as file:
            return dict(file)

    def _write(self, domain: str, split: Split, path: Path) -> None:
        grey, label = self.draw(domain, split)
        generator = torch.Generator().manual_seed(self._seed(domain, split, "look"))
        image = looks.dressed(grey, recipes(self.distance)[domain][1], generator)
        write_arrays(path, x=image.numpy(), y=label.numpy())

    def draw(self, domain: str, split: Split) -> tuple[Tensor, Tensor]:
        """Draw the digits of a domain and split before they are dressed, in random order.

        Returns:
            uint8 [N, 1, H, H], white on black, and int64 [N].
        """
        font, _ = recipes(self.distance)[domain]
        generator = torch.Generator().manual_seed(self._seed(domain, split, "draw"))
        count = self.count(domain, split)
        each = [draw(sketch, HANDS[font], count, self.image_size, generator) for sketch in FONTS[font]]
        order = torch.randperm(10 * count, generator=generator)
        return torch.cat(each)[order], torch.arange(10).repeat_interleave(count)[order]

    def _seed(self, domain: str, split: Split, part: str) -> int:
        return int(config_hash([self.seed, domain, split, part]), 16)


def splits_of(role: Role) -> tuple[Split, ...]:
    """Return the splits that a domain of a role has."""
    every: dict[Role, tuple[Split, ...]] = {
        "seen": ("train", "val", "test"),
        "validation": ("val", "test"),
        "unseen": ("test",),
    }
    return every[role]


def check_split(domain: str, split: Split, role: Role) -> None:
    """Raise ValueError where a split is asked for that a domain of this role must not have."""
    if split not in splits_of(role):
        raise ValueError(
            f"domain {domain!r} is {role}: it has no {split} images, only {', '.join(splits_of(role))}; "
            "training uses seen domains alone"
        )
