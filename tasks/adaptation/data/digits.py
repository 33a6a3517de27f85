# SPDX-License-Identifier: Apache-2.0
"""Generated digits: ten domains to train on, two to choose by, seven that nothing has seen."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.domain import Role, Split
from moeapps.data.images.drawing import draw
from tasks.adaptation.data import looks, textures
from tasks.adaptation.data.dressed import DressedDigits
from tasks.adaptation.data.looks import Look
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


class DigitDomains(DressedDigits):
    """Ten digits, 3 x 28 x 28, drawn by five hands and dressed as nineteen domains (see `recipes`).

    Every domain and split has drawings of its own: none is in two of them.

    Args:
        train_per_class: training images of a digit in each seen domain.
        held_per_class: images of a digit for validation, and again for tests, in each seen domain.
        unseen_per_class: images of a digit in each unseen domain, and in either split of a validation domain.
        distance: how far the domains lie apart, see `recipes`.
        image_size: height and width in pixels.
        seed: seed of all drawings.

    Raises:
        ValueError: a count or size below 1, or a negative distance.
    """

    default_roles: ClassVar[dict[Role, list[str]]] = ROLES

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
        counts = {"train": 10 * train_per_class, "held": 10 * held_per_class, "unseen": 10 * unseen_per_class}
        super().__init__(counts, distance=distance, image_size=image_size, seed=seed)

    @override
    def describe(self, domain: str) -> str:
        return f"generated digits, version {GENERATOR_VERSION}, seed {self.seed}, distance {self.distance:g}"

    @override
    def key(self) -> Any:
        return GENERATOR_VERSION

    @override
    def looks(self, domain: str, cache: Path | None) -> tuple[Look, ...]:
        return recipes(self.distance)[domain][1]

    @override
    def base(self, domain: str, split: Split, cache: Path | None) -> tuple[Tensor, Tensor]:
        font, _ = recipes(self.distance)[domain]
        generator = self.generator(domain, split, "draw")
        count = self.count(domain, split) // 10
        each = [draw(sketch, HANDS[font], count, self.image_size, generator) for sketch in FONTS[font]]
        order = torch.randperm(10 * count, generator=generator)
        return torch.cat(each)[order], torch.arange(10).repeat_interleave(count)[order]
