# SPDX-License-Identifier: Apache-2.0
"""Your own latents as domains, in one of four layouts that are recognised by the files in the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.domain import Role, Split
from moeapps.data.images.arrays import ImageFileError, check_labels, class_names, read_arrays
from moeapps.data.images.folders import class_files
from moeapps.data.images.splits import split_rows
from moeapps.files import absent
from tasks.image_diffusion.data.readers.latent_files import (
    SCALE,
    LatentArrays,
    LatentDataset,
    LatentFolder,
    LatentShards,
    read_latent,
    read_shard,
    read_statistics,
)
from tasks.image_diffusion.data.source import OwnSource

Layout = Literal["folder", "shards", "arrays"]


class LatentImages(OwnSource):
    """Latents below ``root``, one domain each; classes of one name are one class.

    Layouts of a domain: ``<domain>/<class>/*.npz`` with ``latent`` (ProMoE) or ``moments`` (MAR, DiffMoE);
    ``<domain>/*.safetensors`` with ``latents``, ``labels`` and the file ``latents_stats.pt`` (LightningDiT);
    ``<domain>.npz`` with ``x`` float [N, C, h, w] and ``y`` [N]. Twice as many channels as the model's are moments:
    mean and log-variance of a posterior, from which training draws.

    Args:
        root: folder that holds the domains.
        channels: channels of the latent (Stable Diffusion: 4).
        image_size: height and width of the latent (32 for images of 256).
        scale: factor on latents (Stable Diffusion: 0.18215); beside statistics 1 is taken.
        statistics: normalise shards by their ``latents_stats.pt``.
        val_share: share of each class for validation.
        test_share: share of each class for tests.
        options: see `OwnSource`.

    Raises:
        ValueError: a share or size that is not allowed.
        ImageFileError: nothing there, a damaged file, other shapes than the model's.
    """

    latent = True

    def __init__(
        self,
        *,
        root: Path,
        channels: int = 4,
        image_size: int = 32,
        scale: float = SCALE,
        statistics: bool = True,
        val_share: float = 0.01,
        test_share: float = 0.01,
        **options: Any,
    ) -> None:
        if channels < 1 or image_size < 1 or not scale > 0:
            raise ValueError(f"channels={channels}, image_size={image_size}, scale={scale}; all must be positive")
        super().__init__(
            root=root, channels=channels, image_size=image_size, val_share=val_share, test_share=test_share, **options
        )
        self.scale, self.normalise = scale, statistics

    def layout(self, domain: str) -> Layout:
        """Return how a domain is kept.

        Raises:
            ImageFileError: nothing of the kind is there.
        """
        folder = self.root / domain
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            return "shards"
        if folder.is_dir() and any(folder.rglob("*.npz")):
            return "folder"
        if (self.root / f"{domain}.npz").is_file():
            return "arrays"
        if not self.root.is_dir():
            raise ImageFileError(f"{absent(self.root / domain)}; set root to the folder that holds your latents")
        raise ImageFileError(
            f"{self.root} has no latents of domain {domain!r}: neither {domain}/<class>/*.npz, nor "
            f"{domain}/*.safetensors, nor {domain}.npz"
        )

    def bind(self, roles: dict[Role, list[str]]) -> None:
        """Look for the classes of every domain and read one latent of each, whose shape must be the model's."""
        super().bind(roles)
        for name in self.counts:
            self._check_shape(name)

    def labels_of(self, domain: str) -> tuple[Tensor, list[str]]:
        """Labels of its files, shards or arrays."""
        kind, names = self.layout(domain), None
        if kind == "folder":
            return self.labels_of_files(self._files(domain))
        if kind == "shards":
            label = torch.cat([read_shard(path, "labels") for path in self._shards(domain)])
        else:
            path = self.root / f"{domain}.npz"
            arrays = read_arrays(path, "y", "names?")
            names = class_names(arrays["names"], path) if "names" in arrays else None
            label = check_labels(arrays["y"], len(arrays["y"]), path, names)
        return label, names or self.unnamed(domain, label)

    def _files(self, domain: str) -> dict[str, list[Path]]:
        return class_files(self.root / domain, (".npz",), "latent")

    def _shards(self, domain: str) -> list[Path]:
        return sorted((self.root / domain).glob("*.safetensors"))

    def _check_shape(self, domain: str) -> None:
        kind = self.layout(domain)
        if kind == "arrays":
            return  # all of it is read at once, see _arrays
        if kind == "shards":
            path = self._shards(domain)[0]
            shape = tuple(read_shard(path, "latents", 0).shape)
            if self.normalise:
                read_statistics(path.parent / "latents_stats.pt", self.channels)
        else:
            path = next(iter(self._files(domain).values()))[0]
            shape = tuple(read_latent(path).shape)
        self._check(shape, path)

    def _check(self, shape: tuple[int, ...], path: Path) -> None:
        allowed = (self.channels, 2 * self.channels)
        if len(shape) != 3 or shape[0] not in allowed or shape[1:] != (self.image_size, self.image_size):
            raise ImageFileError(
                f"{path}: a latent has shape {shape}; channels={self.channels} and image_size={self.image_size} allow "
                f"{allowed[0]} (latent) or {allowed[1]} (mean and log-variance) x {self.image_size} x {self.image_size}"
            )

    @override
    def dataset(self, domain: str, split: Split, cache: Path | None) -> LatentDataset:
        kind, train = self.layout(domain), split == "train"
        if kind == "folder":
            return self._folder(domain, split)
        if kind == "arrays":
            return self._arrays(domain, split)
        paths = self._shards(domain)
        label = self.numbers(domain)[self.labels_of(domain)[0]]
        stats = read_statistics(paths[0].parent / "latents_stats.pt", self.channels) if self.normalise else None
        rows = split_rows(label, self.shares, self.seed)[split]
        scale = 1.0 if self.normalise else self.scale
        shards = LatentShards(paths, self.channels, scale, train=train, rows=rows, statistics=stats)
        shards.label = label[rows]
        return shards

    def _folder(self, domain: str, split: Split) -> LatentFolder:
        found = self._files(domain)
        files = [path for paths in found.values() for path in paths]
        label = self.numbers(domain)[self.labels_of_files(found)[0]]
        rows = split_rows(label, self.shares, self.seed)[split]
        paths = [files[row] for row in rows.tolist()]
        return LatentFolder(paths, label[rows], self.channels, self.scale, train=split == "train")

    def _arrays(self, domain: str, split: Split) -> LatentArrays:
        path = self.root / f"{domain}.npz"
        x = read_arrays(path, "x")["x"]
        if x.ndim != 4 or x.dtype.kind != "f" or not np.isfinite(x).all():
            raise ImageFileError(f"{path}: x is {x.dtype} {x.shape}; give finite floats (N, C, h, w)")
        self._check(x.shape[1:], path)
        label = self.numbers(domain)[check_labels(self.labels_of(domain)[0].numpy(), len(x), path)]
        rows = split_rows(label, self.shares, self.seed)[split]
        values = torch.from_numpy(x)[rows]
        return LatentArrays(values, label[rows], self.channels, self.scale, train=split == "train")

    @override
    def describe(self, domain: str) -> str:
        return f"own latents, {self.root.name}/{domain}, {self.channels} x {self.image_size} x {self.image_size}"
