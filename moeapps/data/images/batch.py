# SPDX-License-Identifier: Apache-2.0
"""A batch of labelled images, and the data sets that make such batches.

Shape legend: B images, C channels, H x W pixels (or places of a latent).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.gather import BatchDataset, Rows


@dataclass
class ImageBatch(Rows):
    """Images with their labels.

    Attributes:
        image: float32 [B, C, H, W]; pixels in [-1, 1], or scaled latents, which have no bounds.
        label: int64 [B], 0 to K - 1, or -1 where it is unknown; float32 [B] where it is a measured value, nan where
            that is unknown. The null label K of a diffusion model is never in the data.
        domain: int64 [B], position of the domain among all configured ones.
        index: int64 [B], row in the data set of its domain and split: what fixed noise is drawn from.
    """

    image: Tensor
    label: Tensor
    domain: Tensor
    index: Tensor


class ImageDataset(BatchDataset):
    """Labelled images of one domain and split.

    A subclass provides ``fetch``.

    Args:
        label: int64 [N]; float32 [N] where a value is measured.
        train: whether ``fetch`` may draw random numbers (mirroring, posterior samples of latents).
    """

    def __init__(self, label: Tensor, *, train: bool = False) -> None:
        self.label = label.to(torch.float32 if label.is_floating_point() else torch.int64)
        self.train = train
        self.domain = 0  # the data module, which numbers the domains, sets it

    def fetch(self, rows: Tensor) -> Tensor:
        """Return float32 images [n, C, H, W] of int64 rows [n]."""
        raise TypeError(f"{type(self).__name__} must define fetch(rows)")

    def __len__(self) -> int:
        return len(self.label)

    @override
    def batch(self, rows: Tensor) -> ImageBatch:
        return ImageBatch(self.fetch(rows), self.label[rows], torch.full_like(rows, self.domain), rows)

    def unlabelled(self, rows: Tensor, *, measured: bool = False) -> ImageBatch:
        """Return the images of int64 rows [n] without reading a label: all are -1, or nan where a value is measured."""
        label = torch.full((len(rows),), torch.nan) if measured else torch.full_like(rows, -1)
        return ImageBatch(self.fetch(rows), label, torch.full_like(rows, self.domain), rows)


class PixelImages(ImageDataset):
    """Images in memory.

    Args:
        pixels: uint8 [N, C, H, W].
        label: int64 [N].
        train: mirror images at random where ``mirror`` says so.
        mirror: probability of a left-right mirror image in training.

    Raises:
        ValueError: another type or shape.
    """

    def __init__(self, pixels: Tensor, label: Tensor, *, train: bool = False, mirror: float = 0.0) -> None:
        super().__init__(label, train=train)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or len(pixels) != len(label):
            raise ValueError(
                f"images of type {pixels.dtype} and shape {list(pixels.shape)} with {len(label)} labels; "
                "give uint8 [N, C, H, W] and N labels"
            )
        self.pixels, self.mirror = pixels, mirror

    def fetch(self, rows: Tensor) -> Tensor:
        """Return pixels scaled from 0..255 to -1..1."""
        image = from_uint8(self.pixels[rows])
        if self.train and self.mirror > 0:
            flipped = torch.rand(len(rows)) < self.mirror
            image = torch.where(flipped[:, None, None, None], image.flip(-1), image)
        return image


def from_uint8(pixels: Tensor) -> Tensor:
    """Scale uint8 0..255 to float32 -1..1."""
    return pixels.float() / 127.5 - 1.0


def to_uint8(image: Tensor) -> Tensor:
    """Return clamp(127.5 x + 128, 0, 255) as uint8, the inverse of `from_uint8` on its values."""
    return (127.5 * image + 128.0).clamp(0, 255).to(torch.uint8)
