# SPDX-License-Identifier: Apache-2.0
"""The numbers reported for a set of drawn images, each beside the same number for real images.

Shape legend: N drawn images.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moeapps.data.images.batch import ImageBatch
from tasks.image_diffusion.report.judge import Judge
from tasks.image_diffusion.report.quality import (
    Gaussian,
    balanced_rows,
    frechet_distance,
    nearest_distance,
    precision_recall,
)

log = logging.getLogger("moeapps")

NEIGHBOUR = 3


class Extractor(Protocol):
    """What a Fréchet distance needs: `Judge` and `InceptionFeatures` are such."""

    key: str

    def features(self, image: Tensor, batch_size: int = ...) -> Tensor:
        """Return features [N, d] of images."""


@dataclass(frozen=True)
class RealImages:
    """What drawn images are compared with.

    Attributes:
        train: training images of the seen domains.
        test: their test images.
        domains: names of all configured domains, as ``domain`` of the batches counts them.
    """

    train: ImageBatch
    test: ImageBatch
    domains: list[str]

    def classes(self) -> Tensor:
        """Labels that are trained on, sorted."""
        found: Tensor = self.train.label.unique()
        return found

    def domain_of(self) -> dict[int, int]:
        """The domain of each label: the first that has training images of it."""
        order = self.train.domain.argsort(stable=True).flip(0).tolist()
        label, domain = self.train.label.tolist(), self.train.domain.tolist()
        return {label[row]: domain[row] for row in order}

    def labels(self, count: int) -> Tensor:
        """``count`` labels that go round the trained classes."""
        known: Tensor = self.classes()
        return known[torch.arange(count) % len(known)]


def judge_images(image: Tensor, label: Tensor, real: RealImages, judge: Judge, seed: int = 0) -> dict[str, Any]:
    """Judge drawn images.

    Args:
        image: [N, C, H, W].
        label: the classes that were asked for, int64 [N].
        real: real images.
        judge: trained on them.
        seed: seed of the choice of real images.

    Returns:
        ``generation``: numbers over all; ``generation.<domain>``: over the classes of one domain. In each:

        - ``class_accuracy``, ``real_class_accuracy``: the judge's, of drawn and of real test images; left out, with a
          warning, where the training or the test images are all of one class, which any judge gets right.
        - ``domain_accuracy``: share whose judged class belongs to the domain asked for; left out likewise where one
          domain is trained on.
        - ``frechet``: to all training images, classes weighed alike; ``frechet_floor``: the same of ``floor_images``
          real test images, as many as were drawn if there are so many.
        - ``precision``, ``recall`` (k = 3) against those test images.
        - ``nearest_ratio``: median distance to the nearest training image, over that of those test images; far below 1
          is copying.
        - ``images``: N.
    """
    drawn, trained, tested = (judge.features(x) for x in (image, real.train.image, real.test.image))
    judged, judged_test = judge.classes(drawn), judge.classes(tested)
    domain_of = real.domain_of()
    table = torch.full((int(max(domain_of)) + 1 + judge.head.out_features,), -1)
    for value, domain in domain_of.items():
        table[value] = domain
    asked = table[label]
    # The judged class of an untrained label has domain -1, which no image was asked for.
    right_domain = table[judged] == asked
    near = nearest_distance(image, real.train.image)
    several_classes = min(len(part.label.unique()) for part in (real.train, real.test)) > 1
    several_domains = len(real.train.domain.unique()) > 1
    if not several_classes:
        log.warning(
            "training or test images are all of one class: no class accuracy is reported, it would mean nothing"
        )

    def numbers(fake: Tensor, train: Tensor, test: Tensor) -> dict[str, float]:
        """The numbers of some drawn, training and test images, given as rows."""
        floor = test[balanced_rows(real.test.label[test], len(fake), seed)]
        reference = Gaussian.of(trained[train], real.train.label[train])
        found: dict[str, float] = {}
        if several_classes:
            found["class_accuracy"] = _mean(judged[fake] == label[fake])
            found["real_class_accuracy"] = _mean(judged_test[test] == real.test.label[test])
        if several_domains:
            found["domain_accuracy"] = _mean(right_domain[fake])
        found |= {
            "nearest_ratio": float(near[fake].median())
            / max(float(nearest_distance(real.test.image[floor], real.train.image).median()), 1e-12),
            "images": float(len(fake)),
            "floor_images": float(len(floor)),
        }
        if min(len(fake), len(floor)) > NEIGHBOUR:
            found["frechet"] = frechet_distance(reference, Gaussian.of(drawn[fake]))
            found["frechet_floor"] = frechet_distance(reference, Gaussian.of(tested[floor]))
            found["precision"], found["recall"] = precision_recall(tested[floor], drawn[fake], NEIGHBOUR)
        return found

    every = [torch.arange(len(x)) for x in (label, real.train, real.test)]
    groups: dict[str, Any] = {"generation": numbers(*every)}
    present = sorted(set(asked.tolist()))
    for domain in present:
        rows = [torch.nonzero(x == domain).flatten() for x in (asked, real.train.domain, real.test.domain)]
        groups[f"generation.{real.domains[domain]}"] = numbers(*rows)
    return groups


def class_table(image: Tensor, label: Tensor, judge: Judge, names: list[str]) -> dict[str, float]:
    """Accuracy of each class that was asked for, by name."""
    judged = judge.classes(judge.features(image))
    return {names[c]: _mean((judged == label)[label == c]) for c in label.unique().tolist()}


def distance_to_real(image: Tensor, real: RealImages, extractor: Extractor, seed: int = 0) -> tuple[float, float]:
    """Fréchet distance of drawn images to the training images in any features, and the floor of as many test images."""
    reference = Gaussian.of(extractor.features(real.train.image), real.train.label)
    floor = balanced_rows(real.test.label, len(image), seed)
    return tuple(  # type: ignore[return-value]
        frechet_distance(reference, Gaussian.of(extractor.features(x))) for x in (image, real.test.image[floor])
    )


def _mean(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else float("nan")
