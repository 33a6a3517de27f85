# SPDX-License-Identifier: Apache-2.0
"""How good drawn images are, as numbers: Fréchet distance, precision and recall, distance to training images.

Shape legend: N images, d features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features.

    Attributes:
        mean: float64 [d].
        cov: float64 [d, d], unbiased.
        num: how many images they were made of.
    """

    mean: Tensor
    cov: Tensor
    num: int

    @staticmethod
    def of(features: Tensor, label: Tensor | None = None) -> Gaussian:
        """Return the statistics of features [N, d].

        Args:
            features: at least two rows.
            label: int64 [N]; given, every class weighs the same however many images it has.

        Raises:
            ValueError: fewer than two images.
        """
        if len(features) < 2:
            raise ValueError(f"{len(features)} images have no covariance; give at least 2")
        x = features.double()
        if label is None:
            weight = torch.full((len(x),), 1 / len(x), dtype=torch.float64)
        else:
            _, inverse, count = label.unique(return_inverse=True, return_counts=True)
            weight = 1 / (count[inverse].double() * len(count))
        mean = weight @ x
        centred = x - mean
        # Unbiased for weights w that sum to 1: divide by 1 - sum w^2, which is (N - 1) / N for equal ones.
        cov = (centred * weight[:, None]).T @ centred / (1 - weight.square().sum()).clamp(min=1e-12)
        return Gaussian(mean, cov, len(x))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    r"""Fréchet distance of two Gaussians.

    :math:`|\mu_1 - \mu_2|^2 + \mathrm{Tr}(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})`, the trace of whose last term
    equals that of :math:`(S_1 S_2)^{1/2}`. It is the FID where features are Inception's (Heusel et al. 2017).

    Raises:
        ValueError: features of different width.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of width {len(a.mean)} and {len(b.mean)} cannot be compared; use one extractor")
    value, vector = torch.linalg.eigh(a.cov)
    root = vector * value.clamp(min=0).sqrt() @ vector.T
    middle = torch.linalg.eigvalsh(root @ b.cov @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * middle
    return max(float(distance), 0.0)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Precision is the share of ``fake`` within the ball of some real image, whose radius is the distance to its k-th
    nearest real neighbour; recall is the share of ``real`` within such balls about fake images. Numbers of images
    matter: compare results of equal ones only.

    Args:
        real: features [N, d].
        fake: features [M, d].
        k: neighbour.

    Raises:
        ValueError: no more than k images on a side.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"{len(real)} real and {len(fake)} drawn images; precision and recall need more than k={k}")
    real, fake = real.double(), fake.double()
    return _covered(fake, real, _radii(real, k)), _covered(real, fake, _radii(fake, k))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Exact: the product form loses the zero between equal images, and with it the balls of repeated ones.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(x: Tensor, k: int) -> Tensor:
    parts = [
        _distances(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(512)
    ]  # the nearest is the image itself
    return torch.cat(parts)


def _covered(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(_distances(rows, centres) <= radii).any(1) for rows in x.split(512)]
    return float(torch.cat(inside).double().mean())


def nearest_distance(x: Tensor, train: Tensor) -> Tensor:
    """Distance of each image to the nearest training image, root mean square over pixels.

    Args:
        x: [N, ...].
        train: [M, ...], images of the same shape.

    Returns:
        [N]; 0 for a copy.
    """
    a, b = x.flatten(1).float(), train.flatten(1).float()
    # The product form errs by some 1e-3 of the norm: enough to find the neighbour; its distance is then exact.
    nearest = torch.cat([torch.cdist(rows, b).argmin(1) for rows in a.split(512)])
    return (a - b[nearest]).square().mean(1).sqrt()


def balanced_rows(label: Tensor, count: int, seed: int) -> Tensor:
    """Return up to ``count`` different rows with classes as even as their numbers of images allow, in random order.

    Args:
        label: int64 [N].
        count: rows wanted.
        seed: seed of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(label), generator=generator)
    rank = torch.empty_like(order)
    for value in label.unique().tolist():
        rows = order[label[order] == value]
        rank[rows] = torch.arange(len(rows))
    # All first images of the classes, then all second ones, ...; a stable sort keeps the random order within a round.
    return order[rank[order].argsort(stable=True)][:count]
