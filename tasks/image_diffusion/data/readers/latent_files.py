# SPDX-License-Identifier: Apache-2.0
"""Latents of an autoencoder as files, in the layouts that public code uses (docs/papers/promoe.md, file formats).

Shape legend: n images, C channels of the latent, h x w places. MOMENTS have 2C channels: the mean, then the logarithm
of the variance of a Gaussian posterior; a latent is scale * (mean + exp(0.5 * logvar) * eps).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moeapps.data.images.arrays import ImageFileError, check_labels, read_arrays
from moeapps.data.images.batch import ImageDataset
from moeapps.files import absent

SCALE = 0.18215
"""Factor of Stable Diffusion's latents."""
KEYS = (("latent", "latent_flip"), ("moments", "moments_flip"))
"""Arrays of one file per image: ProMoE's preparation, then that of MAR and DiffMoE; each with its mirror image."""


def posterior(stored: Tensor, channels: int, scale: float, eps: Tensor | None) -> Tensor:
    """Return scaled latents of stored values.

    Args:
        stored: [n, 2C, h, w] moments, or [n, C, h, w] latents, which are only scaled.
        channels: C.
        scale: factor.
        eps: standard normal numbers [n, C, h, w]; None means 0, the mean.

    Returns:
        float32 [n, C, h, w]. The log-variance is clamped to [-30, 20].

    Raises:
        ImageFileError: another number of channels.
    """
    if stored.shape[1] == channels:
        return scale * stored.float()
    if stored.shape[1] != 2 * channels:
        raise ImageFileError(
            f"latents have {stored.shape[1]} channels; the model takes {channels}, so give {channels} (latents) or "
            f"{2 * channels} (mean and log-variance), or set channels"
        )
    mean, logvar = stored.float().chunk(2, dim=1)
    return scale * (mean if eps is None else mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * eps)


class LatentDataset(ImageDataset):
    """Latents of one domain; training draws from the posterior and mirrors where mirrored latents are stored.

    Args:
        label: int64 [N].
        channels: C.
        scale: factor.
        train: draw; otherwise the posterior's mean of the unmirrored image is given.
    """

    def __init__(self, label: Tensor, channels: int, scale: float, *, train: bool) -> None:
        super().__init__(label, train=train)
        self.channels, self.scale = channels, scale

    def stored(self, rows: Tensor, flip: Tensor) -> Tensor:
        """Return what is stored for rows [n], the mirrored latent where ``flip`` [n]."""
        raise TypeError(f"{type(self).__name__} must define stored(rows, flip)")

    def fetch(self, rows: Tensor) -> Tensor:
        """Return scaled latents."""
        flip = torch.rand(len(rows)) < 0.5 if self.train else torch.zeros(len(rows), dtype=torch.bool)
        stored = self.stored(rows, flip)
        eps = torch.randn(len(rows), self.channels, *stored.shape[2:]) if self.train else None
        return posterior(stored, self.channels, self.scale, eps)


class LatentArrays(LatentDataset):
    """Latents or moments in memory: float [N, C or 2C, h, w]."""

    def __init__(self, x: Tensor, label: Tensor, channels: int, scale: float, *, train: bool) -> None:
        super().__init__(label, channels, scale, train=train)
        self.x = x

    def stored(self, rows: Tensor, flip: Tensor) -> Tensor:
        """Return the rows; there are no mirrored ones."""
        return self.x[rows]


class LatentFolder(LatentDataset):
    """One npz file per image, read when it is asked for; ``latent`` or ``moments`` and perhaps ``..._flip``."""

    def __init__(self, paths: Sequence[Path], label: Tensor, channels: int, scale: float, *, train: bool) -> None:
        super().__init__(label, channels, scale, train=train)
        self.paths = list(paths)

    def stored(self, rows: Tensor, flip: Tensor) -> Tensor:
        """Read one file per row."""
        found = [read_latent(self.paths[i], bool(f)) for i, f in zip(rows.tolist(), flip, strict=True)]
        odd = next((k for k, latent in enumerate(found) if latent.shape != found[0].shape), None)
        if odd is not None:
            first, other = (f"{self.paths[rows[k]]} {tuple(found[k].shape)}" for k in (0, odd))
            raise ImageFileError(f"latents have different shapes: {first}, {other}; write all alike")
        return torch.stack(found)


def read_latent(path: Path, flip: bool = False) -> Tensor:
    """Read the moments or latent [2C or C, h, w] of one image.

    Raises:
        ImageFileError: missing, damaged, of another shape, or with neither known array.
    """
    arrays = read_arrays(path, *(f"{key}?" for pair in KEYS for key in pair))
    for plain, mirrored in KEYS:
        if plain in arrays:
            value = arrays[mirrored] if flip and mirrored in arrays else arrays[plain]
            if value.ndim != 3 or value.dtype.kind != "f":
                raise ImageFileError(f"{path}: {plain} is {value.dtype} {value.shape}; give floats (channels, h, w)")
            if not np.isfinite(value).all():
                raise ImageFileError(f"{path}: {plain} holds numbers that are not finite; write it again")
            return torch.from_numpy(value)
    known = " or ".join(plain for plain, _ in KEYS)
    raise ImageFileError(f"{path} has neither {known} but {', '.join(arrays) or 'nothing'}")


class LatentShards(LatentDataset):
    """safetensors files with ``latents`` [n, C, h, w], ``labels`` [n] and perhaps ``latents_flip``, read row by row.

    With ``statistics`` a latent is (z - mean) / std per channel, as LightningDiT does, before it is scaled. [layout and
    normalisation: secondary sources]

    Args:
        paths: the shards, in order.
        channels: C.
        scale: factor; 1 beside statistics.
        rows: rows of all shards laid end to end that belong to this data set; None means all.
        statistics: mean and standard deviation [C, 1, 1]; None leaves the latents as they are.
        train: mirror at random.

    Raises:
        ImageFileError: a shard that is damaged or lacks an array.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        channels: int,
        scale: float,
        *,
        train: bool,
        rows: Tensor | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        labels = [read_shard(path, "labels") for path in paths]
        label = torch.cat(labels)
        self.rows = torch.arange(len(label)) if rows is None else rows
        super().__init__(label[self.rows], channels, scale, train=train)
        self.paths, self.statistics = list(paths), statistics
        self.ends = torch.tensor([len(part) for part in labels]).cumsum(0)

    @cached_property
    def mirrored(self) -> bool:
        """Whether the shards hold mirrored latents."""
        return "latents_flip" in shard_keys(self.paths[0])

    def stored(self, rows: Tensor, flip: Tensor) -> Tensor:
        """Read the rows out of their shards."""
        rows = self.rows[rows]
        shard = torch.searchsorted(self.ends, rows, right=True)
        start = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])[shard]
        out = []
        for number, row, f in zip(shard.tolist(), (rows - start).tolist(), flip.tolist(), strict=True):
            key = "latents_flip" if f and self.mirrored else "latents"
            out.append(read_shard(self.paths[number], key, row))
            if not out[-1].isfinite().all():
                raise ImageFileError(f"{self.paths[number]}: {key}[{row}] is not finite; write the file again")
        z = torch.stack(out).float()
        return z if self.statistics is None else (z - self.statistics[0]) / self.statistics[1]


def shard_keys(path: Path) -> list[str]:
    """Names of the arrays of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ImageFileError(f"{path} cannot be read ({error}); it is damaged or cut short: write it again") from error


def read_shard(path: Path, key: str, row: int | None = None) -> Tensor:
    """Read one array of a safetensors file, or one row of it.

    Raises:
        ImageFileError: a damaged file, or no such array.
    """
    from safetensors import SafetensorError, safe_open

    there = shard_keys(path)
    if key not in there:
        raise ImageFileError(f"{path} has no {key!r} but {', '.join(there) or 'nothing'}")
    try:
        with safe_open(path, framework="pt") as file:
            value: Tensor = file.get_tensor(key) if row is None else file.get_slice(key)[row]
    except (SafetensorError, OSError) as error:
        raise ImageFileError(f"{path}: {key} cannot be read ({error}); write the file again") from error
    return check_labels(value.numpy(), len(value), path) if key == "labels" else value


def read_statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Read ``latents_stats.pt``: a dictionary with ``mean`` and ``std`` of C numbers.

    Raises:
        ImageFileError: missing, damaged, or of another size.
    """
    if not path.is_file():
        raise ImageFileError(f"{absent(path)}; lay the statistics there, or set statistics: false to scale instead")
    try:
        held = torch.load(path, weights_only=True)
        mean, std = (torch.as_tensor(held[name]).float().reshape(channels, 1, 1) for name in ("mean", "std"))
    # A damaged file makes torch raise nearly any error.
    except Exception as error:
        raise ImageFileError(f"{path} holds no mean and std of {channels} channels ({error})") from error
    if not ((std > 0) & std.isfinite() & mean.isfinite()).all():
        raise ImageFileError(
            f"{path}: std must be positive, and all finite; mean is {mean.flatten().tolist()}, std is "
            f"{std.flatten().tolist()}"
        )
    return mean, std
