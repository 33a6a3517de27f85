# SPDX-License-Identifier: Apache-2.0
"""Episodes: a few images of a domain to adapt to, whose labels nobody sees, and others of it to be answered.

Shape legend: S support images, Q query images; B episodes of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from typing_extensions import override

from moeapps.data.gather import Rows
from moeapps.data.images.batch import ImageBatch, ImageDataset, PixelImages

__all__ = ["Episode", "EpisodeBatch", "ImageBatch", "ImageDataset", "PixelImages"]


@dataclass
class Episode(Rows):
    """Images of ONE domain in two disjoint parts (`EpisodeBatch` says where they may overlap).

    Attributes:
        support: S images to adapt to; every label is unknown (-1, or nan in regression).
        query: Q images to be answered, with their labels.
        domain: position of the domain among all configured ones.
        draw: which drawing of the support this is; 0 in training. Episodes of one domain and draw have the same
            support, so that a model adapted to it may be kept for the next part of the query images.
    """

    support: ImageBatch
    query: ImageBatch
    domain: int
    draw: int = 0


@dataclass
class EpisodeBatch(Rows):
    """The B episodes of one step.

    Support and query of an episode are disjoint, but for the evaluation of the published code
    (``protocol: official``), which counts the support images too.
    """

    episodes: tuple[Episode, ...]

    def __len__(self) -> int:
        """Return the number of query images: what scores and losses are means over."""
        return sum(len(episode.query) for episode in self.episodes)

    def __iter__(self) -> Iterator[Episode]:
        return iter(self.episodes)

    @property
    def query(self) -> ImageBatch:
        """All query images, episode by episode."""
        return ImageBatch.cat([episode.query for episode in self.episodes])

    @classmethod
    @override
    def cat(cls, parts: Sequence[EpisodeBatch]) -> EpisodeBatch:
        return EpisodeBatch(tuple(episode for part in parts for episode in part))
