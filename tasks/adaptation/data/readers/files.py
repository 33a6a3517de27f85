# SPDX-License-Identifier: Apache-2.0
"""Images that lie in files of their own: pictures, or arrays of more than three channels.

Shape legend: N images, C channels, H x H pixels.
"""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import Role, Split
from moeapps.data.images.arrays import ImageFileError, read_arrays
from moeapps.data.images.batch import ImageDataset, from_uint8
from moeapps.data.images.pictures import BACKGROUNDS, read_image
from moeapps.data.images.splits import split_rows
from moeapps.files import absent
from tasks.adaptation.data.source import AdaptationSource, check_split

log = logging.getLogger("moeapps")


@dataclass(frozen=True)
class ImageForm:
    """How a file becomes an image.

    Args:
        size: height and width that the model sees; pictures are scaled and cropped to it (`centre_crop`).
        channels: 1 (grey) or 3 (colour) of pictures; of arrays whatever they have.
        array: name of the float array [C, H, H] inside an npz file; None reads pictures.
        standardise: give each channel of each image mean 0 and standard deviation 1, in place of pixels in [-1, 1].
        mirror: probability of a left-right mirror image in training; features of such images cannot be cached.
        background: what shows through transparent pictures: white, grey or black.
        packed: keep all scaled pictures of a domain in one file of the cache; false reads the files again each time.

    Raises:
        ValueError: a size, a number of channels, a probability or a background that is not allowed.
    """

    size: int = 64
    channels: int = 3
    array: str | None = None
    standardise: bool = False
    mirror: float = 0.0
    background: str = "white"
    packed: bool = True

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels < 1 or (self.array is None and self.channels not in (1, 3)):
            raise ValueError(
                f"size={self.size}, channels={self.channels}; the size must be positive, pictures have 1 or 3 channels"
            )
        if not 0 <= self.mirror <= 1:
            raise ValueError(f"mirror={self.mirror}; a probability lies in [0, 1]")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background={self.background!r} is not allowed; use one of {', '.join(BACKGROUNDS)}")

    def read(self, path: Path) -> Tensor:
        """Read one file: float32 [C, H, H].

        Raises:
            ImageFileError: missing, damaged, or not of this form.
        """
        if not path.is_file():
            raise ImageFileError(f"{absent(path)}; check the root and how paths are made")
        return from_uint8(torch.from_numpy(self.pixels(path))) if self.array is None else self._channels(path)

    def finished(self, image: Tensor) -> Tensor:
        """The images [N, C, H, H] as the network sees them."""
        if not self.standardise:
            return image
        mean, deviation = image.mean((2, 3), keepdim=True), image.std((2, 3), keepdim=True)
        return (image - mean) / deviation.clamp(min=1e-6)

    def pixels(self, path: Path) -> NDArray[np.uint8]:
        """Read one picture: uint8 [C, H, H]."""
        return read_image(path, self.size, self.channels, self.background).copy()

    def _channels(self, path: Path) -> Tensor:
        array = read_arrays(path, str(self.array))[str(self.array)]
        if array.ndim != 3 or array.shape[0] != self.channels or array.dtype.kind not in "fiu":
            raise ImageFileError(
                f"{path}: {self.array} is {array.dtype} {array.shape}, not numbers ({self.channels}, H, H); "
                "set channels"
            )
        image = torch.from_numpy(array.astype(np.float32))
        if image.shape[1:] != (self.size, self.size):
            image = F.interpolate(image[None], size=(self.size, self.size), mode="bilinear", antialias=True)[0]
        return image


class FileImages(ImageDataset):
    """Images of one domain and split, read when they are asked for.

    Args:
        files: one per image.
        label: int64 [N], or float32 [N] in regression.
        form: how a file becomes an image.
        train: mirror images at random where the form says so.
        pack: scaled pictures of all files of the domain, uint8 [M, C, H, H] on disk, and the rows of these; None reads
            the files.
    """

    def __init__(
        self,
        files: Sequence[Path],
        label: Tensor,
        form: ImageForm,
        *,
        train: bool = False,
        pack: tuple[NDArray[np.uint8], Tensor] | None = None,
    ) -> None:
        super().__init__(label, train=train)
        self.files, self.form, self.pack = list(files), form, pack

    @override
    def fetch(self, rows: Tensor) -> Tensor:
        if self.pack is not None:
            pixels, place = self.pack
            image = from_uint8(torch.from_numpy(pixels[place[rows].numpy()]))
        else:
            image = torch.stack([self.form.read(self.files[row]) for row in rows.tolist()])
        image = self.form.finished(image)
        if self.train and self.form.mirror > 0:
            flipped = torch.rand(len(rows)) < self.form.mirror
            image = torch.where(flipped[:, None, None, None], image.flip(-1), image)
        return image


@dataclass
class DomainFiles:
    """The files of one domain.

    Attributes:
        files: all of them.
        label: int64 [N], or float32 [N] in regression.
        splits: the rows of each split, where the data itself says so; else the reader draws them.
    """

    files: list[Path]
    label: Tensor
    splits: dict[Split, Tensor] | None = None


class FileDomains(AdaptationSource):
    """Base class of readers of files: splits that the data does not give are drawn class by class, by the role.

    A seen domain is cut by the shares; the halves of a validation domain are its ``val`` and ``test``; all of an unseen
    one is ``test``.

    Args:
        root: folder of the data.
        form: how a file becomes an image.
        val_share: share of each class of a seen domain for validation.
        test_share: share of it for tests.
        seed: seed of the splits.

    Raises:
        ValueError: shares that leave nothing for training.
        ImageFileError: no such folder.
    """

    def __init__(
        self, *, root: Path, form: ImageForm | None, val_share: float = 0.1, test_share: float = 0.1, seed: int = 0
    ) -> None:
        if not (val_share >= 0 and test_share >= 0 and val_share + test_share < 1):
            raise ValueError(f"val_share={val_share}, test_share={test_share}; 0 or more, and together less than 1")
        self.root, self.form, self.seed = Path(root), form or ImageForm(), seed
        if not self.root.is_dir():
            raise ImageFileError(f"no folder {self.root}; set root to the folder that holds the data")
        self.shares: dict[Split, float] = {"test": test_share, "val": val_share}
        self.channels, self.image_size = self.form.channels, self.form.size
        self.augmented = self.form.mirror > 0
        self._packs: dict[str, NDArray[np.uint8]] = {}

    @property
    @override
    def title(self) -> str:
        return str(self.root)

    @abstractmethod
    def of(self, domain: str) -> DomainFiles:
        """Return the files of a domain, with splits only if they hold for its role."""

    def prepare(self, cache: Path | None) -> None:
        """Look whether the files are there, one of each end of each domain, and pack them where that is asked for.

        Raises:
            ImageFileError: a missing or damaged file.
        """
        for domain in self.role_of:
            files = self.of(domain).files
            for file in (files[0], files[-1]):
                self.form.read(file)
            if self.form.packed and self.form.array is None:
                self._pack(domain, cache)

    @override
    def dataset(self, domain: str, split: Split, cache: Path | None) -> FileImages:
        check_split(domain, split, self.role_of[domain])
        own = self.of(domain)
        rows = (own.splits or self._drawn(own, self.role_of[domain])).get(split, torch.empty(0, dtype=torch.int64))
        packed = self.form.packed and self.form.array is None
        return FileImages(
            [own.files[row] for row in rows.tolist()],
            own.label[rows],
            self.form,
            train=split == "train",
            pack=(self._pack(domain, cache), rows) if packed else None,
        )

    def _drawn(self, own: DomainFiles, role: Role) -> dict[Split, Tensor]:
        label = own.label if self.target == "classification" else torch.zeros(len(own.label), dtype=torch.int64)
        if role == "unseen":
            return {"test": torch.arange(len(label))}
        if role == "validation":
            return dealt(label, torch.arange(len(label)), ("val", "test"), self.seed)
        return filled(split_rows(label, self.shares, self.seed), [s for s, share in self.shares.items() if share > 0])

    def _pack(self, domain: str, cache: Path | None) -> NDArray[np.uint8]:
        """Return the scaled pictures of a domain, uint8 [N, C, H, H], from one file that is read as needed."""
        if domain in self._packs:
            return self._packs[domain]
        files, form = self.of(domain).files, self.form
        try:
            stamps = [(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in files]
        except OSError as error:
            raise ImageFileError(f"domain {domain!r}: {absent(Path(error.filename))}; check the root") from error
        key = config_hash([1, stamps, form.size, form.channels, form.background])

        def write(path: Path) -> None:
            from rich.progress import track

            shape = (len(files), form.channels, form.size, form.size)
            with open(path, "wb") as out:
                np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for file in track(files, f"reading {domain}", transient=True, disable=len(files) < 500):
                    out.write(form.pixels(file).tobytes())

        path = build_once(cache_dir("adaptation", root=cache) / f"{domain}-{key}.npy", write)
        self._packs[domain] = np.load(path, mmap_mode="r")
        return self._packs[domain]


def dealt(label: Tensor, rows: Tensor, splits: Sequence[Split], seed: int) -> dict[Split, Tensor]:
    """Deal rows to splits in turn, class by class and at random inside a class; sizes differ by at most one.

    Args:
        label: int64 [N].
        rows: int64 [n], those that are dealt.
        splits: what they are dealt to.
        seed: seed of the choice.
    """
    mixed = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    mixed = mixed[label[mixed].argsort(stable=True)]
    return {split: mixed[place :: len(splits)].sort().values for place, split in enumerate(splits)}


def filled(splits: dict[Split, Tensor], wanted: Sequence[Split]) -> dict[Split, Tensor]:
    """Give every wanted split that is empty a row of the largest one, unless that would be left empty."""
    splits = dict(splits)
    for split in wanted:
        largest = max(splits, key=lambda name: len(splits[name]))
        if not len(splits.get(split, ())) and len(splits[largest]) > 1:
            splits[split], splits[largest] = splits[largest][-1:], splits[largest][:-1]
    return splits


def domain_name(text: str) -> str:
    """Return text as the name of a domain: whatever a name may not hold becomes an underscore."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_-") or "domain"
