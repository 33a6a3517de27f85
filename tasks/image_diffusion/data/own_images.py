# SPDX-License-Identifier: Apache-2.0
"""Your own images: a folder of classes per domain, or an npz file per domain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import Split
from moeapps.data.images.arrays import (
    ImageFileError,
    check_labels,
    class_names,
    pixels_nchw,
    read_array,
    read_arrays,
)
from moeapps.data.images.batch import PixelImages
from moeapps.data.images.folders import class_files
from moeapps.data.images.pictures import BACKGROUNDS, ENDINGS, read_image
from moeapps.data.images.splits import split_rows
from moeapps.files import absent, write_arrays
from tasks.image_diffusion.data.source import OwnSource


class OwnImages(OwnSource):
    """``root/<domain>/<class>/*.png`` (see `ENDINGS`), ``root/<domain>.npz``, or ``root/<domain>_x.npy`` and ``_y``.

    Image files are cropped to a square and scaled as ImageNet usually is for diffusion; arrays must have the right size
    already. Domains share classes as `OwnSource` says.

    Args:
        root: folder that holds the domains.
        image_size: height and width the model sees.
        channels: 1 (grey) or 3 (colour).
        mirror: probability of a left-right mirror image in training; 0 where the side matters (digits, letters).
        val_share: share of each class for validation.
        test_share: share of each class for tests.
        background: what shows through transparent pictures: white, grey or black.
        options: see `OwnSource`.

    Raises:
        ValueError: a size, a share, a background or a number of channels that is not allowed.
        ImageFileError: no such folder, no class, a class without a picture, a file that is not read, a damaged file.
    """

    def __init__(
        self,
        *,
        root: Path,
        image_size: int = 32,
        channels: int = 3,
        mirror: float = 0.5,
        val_share: float = 0.05,
        test_share: float = 0.1,
        background: str = "white",
        **options: Any,
    ) -> None:
        if channels not in (1, 3) or image_size < 1:
            raise ValueError(
                f"channels={channels}, image_size={image_size}; channels must be 1 or 3, the size positive"
            )
        if not 0 <= mirror <= 1:
            raise ValueError(f"mirror={mirror}; a probability lies in [0, 1]")
        if background not in BACKGROUNDS:
            raise ValueError(f"background={background!r} is not allowed; use one of {', '.join(BACKGROUNDS)}")
        super().__init__(
            root=root, channels=channels, image_size=image_size, val_share=val_share, test_share=test_share, **options
        )
        self.mirror, self.background = mirror, background
        self._read: dict[str, tuple[Tensor, Tensor]] = {}

    def labels_of(self, domain: str) -> tuple[Tensor, list[str]]:
        """Labels of its files, or those of its arrays."""
        if (self.root / domain).is_dir():
            return self.labels_of_files(self._files(domain))
        return self._arrays(domain, pixels=False)[1:]

    def _files(self, domain: str) -> dict[str, list[Path]]:
        """Picture files of each class of a domain kept as a folder."""
        both = [path for end in (".npz", "_x.npy") if (path := self.root / f"{domain}{end}").exists()]
        if both:
            raise ImageFileError(f"{self.root} holds a folder {domain} and {both[0].name}; keep one of them")
        return class_files(self.root / domain, ENDINGS)

    def _arrays(self, domain: str, *, pixels: bool = True) -> tuple[Tensor, Tensor, list[str]]:
        """Pixels (none if not asked for), labels within the domain and class names of a domain kept as arrays."""
        path, pair = self.root / f"{domain}.npz", [self.root / f"{domain}_{part}.npy" for part in "xy"]
        if path.is_file():
            arrays = read_arrays(path, *(["x"] if pixels else []), "y", "names?")
        elif all(part.is_file() for part in pair):
            arrays = {"x": read_array(pair[0]), "y": read_array(pair[1])}
        else:
            if not self.root.is_dir():
                raise ImageFileError(f"{absent(self.root / domain)}; set root to the folder that holds your data")
            there = sorted(p.name for p in self.root.iterdir())
            raise ImageFileError(
                f"{self.root} has neither a folder {domain}, nor {domain}.npz, nor {domain}_x.npy and {domain}_y.npy; "
                f"it holds {', '.join(there[:8]) or 'nothing'}"
            )
        given = class_names(arrays["names"], path) if "names" in arrays else None
        count = len(arrays["x"]) if pixels else len(arrays["y"])
        label = check_labels(arrays["y"], count, path, given)
        names = given or self.unnamed(domain, label)
        return (
            (pixels_nchw(arrays["x"], path, BACKGROUNDS[self.background]) if pixels else torch.empty(0)),
            label,
            names,
        )

    @override
    def dataset(self, domain: str, split: Split, cache: Path | None) -> PixelImages:
        if domain not in self._read:
            self._read[domain] = self._all(domain, cache)
        pixels, label = self._read[domain]
        rows = split_rows(label, self.shares, self.seed)[split]
        return PixelImages(pixels[rows], label[rows], train=split == "train", mirror=self.mirror)

    def _all(self, domain: str, cache: Path | None) -> tuple[Tensor, Tensor]:
        if (self.root / domain).is_dir():
            pixels, label = self._from_files(domain, cache)
        else:
            pixels, label, _ = self._arrays(domain)
        wanted = (self.channels, self.image_size, self.image_size)
        if tuple(pixels.shape[1:]) != wanted:
            raise ImageFileError(
                f"domain {domain!r}: images of shape {tuple(pixels.shape[1:])}, the model takes {wanted}; set "
                "image_size and channels, or scale the arrays"
            )
        return pixels, self.numbers(domain)[label]

    def _from_files(self, domain: str, cache: Path | None) -> tuple[Tensor, Tensor]:
        found = self._files(domain)
        files = [path for paths in found.values() for path in paths]
        stamps = [(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in files]
        form = (self.image_size, self.channels, self.background)
        key = config_hash([2, stamps, *form])

        def write(path: Path) -> None:
            from rich.progress import track

            shown = track(files, f"reading {domain}", transient=True, disable=len(files) < 500)
            write_arrays(path, x=np.stack([read_image(file, *form) for file in shown]))

        saved = read_arrays(build_once(cache_dir("image_diffusion", root=cache) / f"{domain}-{key}.npz", write), "x")
        return torch.from_numpy(saved["x"]), self.labels_of_files(found)[0]

    @override
    def describe(self, domain: str) -> str:
        return f"own images, {self.root.name}/{domain}, {self.image_size} x {self.image_size}"
