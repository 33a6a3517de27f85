# SPDX-License-Identifier: Apache-2.0
"""Generated images: three families of ten sketches each, and styles that nothing is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import Role, Split
from moeapps.data.images.batch import PixelImages
from moeapps.data.images.drawing import draw
from tasks.image_diffusion.data.sketches import FAMILIES, HANDS
from tasks.image_diffusion.data.source import ImageSource
from tasks.image_diffusion.data.styles import STYLES

GENERATOR_VERSION = 1
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class GlyphShapes(ImageSource):
    """Drawings of glyphs, clothes and animals, 10 classes each, 1 x 28 x 28 by default; label = 10 * family + class.

    Domains: a family (``glyphs``, ``clothes``, ``animals``); a style (``outline``, ``stripes``, ``negative``) of all
    thirty classes, a third as many images of each; or both, such as ``clothes_outline``. No drawing is in two domains
    or two splits.

    Args:
        train_per_class: training images of a class in each domain.
        val_per_class: validation images.
        test_per_class: test images; 50 make 1500 of the three families.
        image_size: height and width in pixels.
        seed: seed of all drawings.

    Raises:
        ValueError: a count or size below 1.
    """

    default_roles: ClassVar[dict[Role, list[str]]] = {
        "seen": list(FAMILIES),
        "validation": ["outline"],
        "unseen": ["stripes"],
    }

    def __init__(
        self,
        *,
        train_per_class: int = 400,
        val_per_class: int = 15,
        test_per_class: int = 50,
        image_size: int = 28,
        seed: int = 0,
    ) -> None:
        self.counts: dict[Split, int] = {"train": train_per_class, "val": val_per_class, "test": test_per_class}
        for name, count in (*self.counts.items(), ("image_size", image_size)):
            if count < 1:
                raise ValueError(f"{name}: {count} is not allowed; use 1 or more")
        self.channels, self.image_size, self.seed = 1, image_size, seed
        self.domains = [*FAMILIES, *STYLES, *(f"{family}_{style}" for family in FAMILIES for style in STYLES)]
        self.class_names = [name for sketches in FAMILIES.values() for name in sketches]
        self.superclass = [number for number, sketches in enumerate(FAMILIES.values()) for _ in sketches]

    def prepare(self, cache: Path | None) -> None:
        """Draw what is not in the cache yet: about 5 seconds for the base config."""
        from rich.progress import track

        names = [name for role in self.roles.values() for name in role]
        wanted = [name for name in names if not self._path(name, cache).exists()]
        for name in track(wanted, "drawing images", transient=True, disable=not wanted):
            self._load(name, cache)

    @override
    def dataset(self, domain: str, split: Split, cache: Path | None) -> PixelImages:
        arrays = self._load(domain, cache)
        pixels, label = torch.from_numpy(arrays[f"{split}_x"]), torch.from_numpy(arrays[f"{split}_y"])
        return PixelImages(pixels, label, train=split == "train")

    @override
    def describe(self, domain: str) -> str:
        return f"generated drawings, version {GENERATOR_VERSION}, seed {self.seed}, {self.counts} images per class"

    def _path(self, domain: str, cache: Path | None) -> Path:
        key = config_hash([GENERATOR_VERSION, domain, self.counts, self.image_size, self.seed])
        return cache_dir("image_diffusion", root=cache) / f"{domain}-{key}.npz"

    def _load(self, domain: str, cache: Path | None) -> dict[str, Any]:
        with np.load(build_once(self._path(domain, cache), lambda path: self._write(domain, path))) as file:
            return dict(file)

    def _write(self, domain: str, path: Path) -> None:
        arrays: dict[str, Any] = {}
        for split in SPLITS:
            pixels, label = self.render(domain, split)
            arrays[f"{split}_x"], arrays[f"{split}_y"] = pixels.numpy(), label.numpy()
        np.savez_compressed(path, **arrays)

    def render(self, domain: str, split: Split) -> tuple[Tensor, Tensor]:
        """Draw one domain and split anew: uint8 [N, 1, H, H] and int64 labels [N], class by class."""
        family, _, style = domain.partition("_") if domain not in STYLES else ("", "", domain)
        seed = int(config_hash([self.seed, domain, split]), 16)
        generator = torch.Generator().manual_seed(seed)
        count = self.counts[split] if domain not in STYLES else -(-self.counts[split] // 3)
        pixels, labels, label = [], [], -1
        for name, sketches in FAMILIES.items():
            for sketch in sketches.values():
                label += 1
                if family in ("", name):
                    pixels.append(draw(sketch, HANDS[name], count, self.image_size, generator))
                    labels.append(torch.full((count,), label, dtype=torch.int64))
        drawn = torch.cat(pixels)
        return (STYLES[style](drawn, seed % (1 << 31)) if style else drawn), torch.cat(labels)
