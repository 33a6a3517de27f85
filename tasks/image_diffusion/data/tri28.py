# SPDX-License-Identifier: Apache-2.0
"""Three real sets of small grey images as three domains: digits, clothes, silhouettes of animals."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from typing_extensions import override

from moeapps.data.archives import ArchiveError, fetch_package
from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import Role, Split
from moeapps.data.images.batch import PixelImages
from moeapps.data.images.mnist import Bytes, Labels, check_images, read_digits
from moeapps.data.images.splits import split_rows
from moeapps.data.unpacking import load_numpy_pickle
from tasks.image_diffusion.data.source import ImageSource
from tasks.image_diffusion.data.styles import STYLES
from tasks.image_diffusion.packages import ANIMALS, DIGITS, FASHION, PACKAGES

CLASSES: dict[str, tuple[str, ...]] = {
    "digits": tuple(f"digit_{number}" for number in range(10)),
    "fashion": ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot"),
    "animals": ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"),
}
SHARES: dict[Split, float] = {"test": 0.10, "val": 0.05}


class Tri28(ImageSource):
    """5,000 digits (MNIST), 10,000 clothes (Fashion-MNIST), 10,000 animals, 1 x 28 x 28; label = 10 * domain + class.

    Of every class 10 per cent are held out for tests and 5 for validation. Beside the three domains each style
    (``outline``, ``stripes``, ``negative``) is one: held-out images of all thirty classes, drawn otherwise. Its
    ``test`` images are a third of the test images of the three; its ``train`` and ``val`` images are their validation
    images.

    Args:
        seed: seed of the choice of held-out images.
    """

    default_roles: ClassVar[dict[Role, list[str]]] = {
        "seen": list(CLASSES),
        "validation": ["outline"],
        "unseen": ["stripes"],
    }

    def __init__(self, *, seed: int = 0) -> None:
        self.channels, self.image_size, self.seed = 1, 28, seed
        self.domains = (*CLASSES, *STYLES)
        self.class_names = [name for names in CLASSES.values() for name in names]
        self.superclass = [number for number, names in enumerate(CLASSES.values()) for _ in names]
        self._arrays: dict[str, Any] | None = None

    def prepare(self, cache: Path | None) -> None:
        """Fetch the three packages and join them into one file of the cache.

        Raises:
            ArchiveError: one of them could not be had; the text says what to do.
        """
        build_once(self._path(cache), lambda path: _write(path, cache))

    @override
    def dataset(self, domain: str, split: Split, cache: Path | None) -> PixelImages:
        if self._arrays is None:
            self.prepare(cache)
            with np.load(self._path(cache)) as file:
                self._arrays = dict(file)
        pixels, label = torch.from_numpy(self._arrays["x"])[:, None], torch.from_numpy(self._arrays["y"])
        rows = split_rows(label, SHARES, self.seed)
        if domain in STYLES:
            held = rows["test"][::3] if split == "test" else rows["val"][int(split == "val") :: 2]
            return PixelImages(STYLES[domain](pixels[held], self.seed), label[held], train=split == "train")
        own = rows[split][label[rows[split]] // 10 == list(CLASSES).index(domain)]
        return PixelImages(pixels[own], label[own], train=split == "train")

    def describe(self, domain: str) -> str:
        """Name the package a domain comes from."""
        own = dict(zip(CLASSES, PACKAGES, strict=True))
        if domain in own:
            return f"{own[domain].source}; licence: {own[domain].licence}"
        return f"held-out images of {', '.join(CLASSES)}, drawn as {domain}"

    @staticmethod
    def _path(cache: Path | None) -> Path:
        key = config_hash([1, [package.sha256 for package in PACKAGES]])
        return cache_dir("image_diffusion", root=cache) / f"tri28-{key}.npz"


def _write(path: Path, cache: Path | None) -> None:
    parts: list[tuple[Bytes, Labels]] = [
        _read(DIGITS, read_digits, cache),
        _read(FASHION, read_fashion, cache),
        _read(ANIMALS, read_animals, cache),
    ]
    label = np.concatenate([10 * number + y for number, (_, y) in enumerate(parts)])
    np.savez_compressed(path, x=np.concatenate([x for x, _ in parts]), y=label)


def _read(package: Any, reader: Callable[[Path], tuple[Bytes, Labels]], cache: Path | None) -> tuple[Bytes, Labels]:
    pixels, label = reader(fetch_package(package, root=cache))
    return check_images(pixels, label, package.name)


def read_idx(path: Path) -> Bytes:
    """Read a gzipped idx file of unsigned bytes, any number of dimensions.

    Raises:
        ArchiveError: damaged, cut short or of another type.
    """
    try:
        data = gzip.decompress(path.read_bytes())
        zero, kind, ndim = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{ndim}I", data, 4)
    except (OSError, EOFError, struct.error) as error:
        raise ArchiveError(f"{path.name} is not a readable idx file ({error}); fetch it again") from error
    if zero != 0 or kind != 8 or len(data) != 4 + 4 * ndim + int(np.prod(shape)):
        raise ArchiveError(f"{path.name} is not an idx file of {shape} bytes: it has {len(data)}; fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def read_fashion(folder: Path, per_class: int = 1000) -> tuple[Bytes, Labels]:
    """Read the first images of each class of the training files."""
    images = read_idx(next(folder.rglob("train-images-idx3-ubyte.gz")))
    label = read_idx(next(folder.rglob("train-labels-idx1-ubyte.gz"))).astype(np.int64)
    if len(images) != len(label):
        raise ArchiveError(f"{len(images)} images and {len(label)} labels; fetch the package again")
    rows = np.sort(np.concatenate([np.flatnonzero(label == c)[:per_class] for c in np.unique(label)]))
    return images[rows], label[rows]


def read_animals(folder: Path) -> tuple[Bytes, Labels]:
    """Read two pickles that may hold numpy arrays and nothing else; none of the package's code is run."""
    images, label = (load_numpy_pickle(next(folder.rglob(f"animal_{part}_*.gz"))) for part in ("data", "label"))
    return np.asarray(images), np.asarray(label).astype(np.int64)
