# SPDX-License-Identifier: Apache-2.0
"""Sets of labelled images as domains."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.domain import Split
from moeapps.data.images.batch import ImageBatch, ImageDataset
from moeapps.data.mixing import DomainMixing
from moeapps.data.source import SourceDataModule
from moeapps.data.stream_writing import StreamPlan
from tasks.image_diffusion.data import streams
from tasks.image_diffusion.data.classes import class_numbers
from tasks.image_diffusion.data.glyph_shapes import GlyphShapes
from tasks.image_diffusion.data.source import ImageSource


class ImageData(SourceDataModule):
    """Labelled images or latents; labels count through the classes of all domains.

    Args:
        source: the images; None means the generated ones of `GlyphShapes`.
        batch_size: images per training step and process.
        mixing: how training batches mix domains: concat (in proportion to size), balanced (each domain equally often)
            or one_domain (each batch from one domain).
        options: further arguments of `SourceDataModule`.

    Raises:
        ValueError: a domain the source does not have, roles that overlap, or a source without classes.
    """

    eval_factor = 2
    source: ImageSource

    def __init__(
        self,
        *,
        source: ImageSource | None = None,
        batch_size: int = 64,
        mixing: DomainMixing = "balanced",
        **options: Any,
    ) -> None:
        super().__init__(source=source or GlyphShapes(), batch_size=batch_size, mixing=mixing, **options)
        if not self.source.class_names:
            raise ValueError(f"the domains {self.domain_names} have no class; give labelled images")

    @property
    def facts(self) -> dict[str, Any]:
        """Domain names per role; num_classes, class_names, superclass, channels, image_size, latent."""
        return {
            **super().facts,
            "num_classes": len(self.source.class_names),
            "class_names": self.source.class_names,
            "superclass": self.source.superclass,
            "channels": self.source.channels,
            "image_size": self.source.image_size,
            "latent": self.source.latent,
        }

    @override
    def dataset(self, domain: str, split: Split) -> ImageDataset:
        dataset = self.source.dataset(domain, split, self.cache_dir)
        dataset.domain = self.domain_names.index(domain)
        return dataset

    def images(self, domain: str, split: Split, rows: Tensor | None = None) -> ImageBatch:
        """Return images of one domain and split as one batch; all of them where ``rows`` (int64) are not named."""
        dataset = cast(ImageDataset, self.get_dataset(domain, split))
        return dataset.batch(torch.arange(len(dataset)) if rows is None else rows)

    def batches_of(self, inputs: Any, *, count: int = 1) -> list[ImageBatch]:
        """Return a batch of classes to draw.

        Args:
            inputs: a class, or a list of classes: names or numbers.
            count: images of each.

        Raises:
            ValueError: no such class, or a count below 1.
        """
        words: list[Any] = [inputs] if isinstance(inputs, str | int) else list(inputs)
        if not isinstance(count, int) or count < 1 or not words:
            raise ValueError(f"{len(words)} classes and count={count}; name a class or more, and a count of 1 or more")
        label = torch.tensor(class_numbers([str(word) for word in words], self.source.class_names))
        label = label.repeat_interleave(count)
        size, channels = self.source.image_size, self.source.channels
        image = torch.zeros(len(label), channels, size, size)
        return [ImageBatch(image, label, torch.zeros_like(label), torch.arange(len(label)))]

    def collate(self, items: ImageBatch | list[ImageBatch]) -> ImageBatch:
        """Return the batch: images come whole, except for single ones asked for one by one."""
        return items if isinstance(items, ImageBatch) else ImageBatch.cat(items)

    def stream_plan(self) -> StreamPlan:
        """Say what ``moeapps data optimize`` writes: latents, in blocks."""
        return streams.plan(self, self.source)
