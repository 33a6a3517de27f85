# SPDX-License-Identifier: Apache-2.0
"""What every set of image domains provides: its domains, its classes, and the images of a domain and split."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Literal

from moeapps.data.domain import SPLITS_OF, Role, Split
from moeapps.data.images.batch import ImageDataset
from moeapps.data.source import DomainSource

Target = Literal["classification", "regression"]


class AdaptationSource(DomainSource):
    """Base class of the sets of images that `AdaptationData` can read.

    A seen domain has images in all three splits; a validation domain in ``val`` and ``test``; an unseen one in
    ``test`` alone: nothing of it is ever trained on.

    Attributes:
        target: whether a label is a class or a measured value.
        class_names: one name per label, known once the roles are bound; none in regression.
        channels: C.
        image_size: H = W.
        augmented: training images differ from one reading to the next, so that features of them cannot be kept.
    """

    target: Target = "classification"
    class_names: list[str]
    channels: int
    image_size: int
    augmented: bool = False

    @abstractmethod
    def dataset(self, domain: str, split: Split, cache: Path | None) -> ImageDataset:
        """Return the images of one domain and split."""


def check_split(domain: str, split: Split, role: Role) -> None:
    """Raise ValueError where a split is asked for that a domain of this role must not have."""
    if split not in SPLITS_OF[role]:
        raise ValueError(
            f"domain {domain!r} is {role}: it has no {split} images, only {', '.join(SPLITS_OF[role])}; "
            "training uses seen domains alone"
        )
