# SPDX-License-Identifier: Apache-2.0
"""Distances between sets of images: closed forms, an independent implementation, limiting cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tasks.image_diffusion.report.quality import (
    Gaussian,
    balanced_rows,
    frechet_distance,
    nearest_distance,
    precision_recall,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distance_of_equal_statistics_is_zero_and_of_a_shift_its_square() -> None:
    x, d = randn(200, 6), randn(6, seed=1)
    a = Gaussian.of(x)

    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, Gaussian.of(x + d)) == pytest.approx(float(d.square().sum()))


@pytest.mark.parametrize(("s1", "s2"), [(1.0, 1.0), (0.5, 2.0), (3.0, 0.0)])
def test_distance_of_isotropic_gaussians_is_the_closed_form(s1: float, s2: float) -> None:
    n = 7
    a, b = (Gaussian(torch.zeros(n).double(), s**2 * torch.eye(n).double(), 9) for s in (s1, s2))

    assert frechet_distance(a, b) == pytest.approx(n * (s1 - s2) ** 2)


def test_distance_of_commuting_covariances_is_that_of_their_roots_and_it_is_symmetric() -> None:
    q, _ = torch.linalg.qr(randn(5, 5))
    u, v = randn(2, 5, seed=3).abs()
    a, b = (Gaussian(torch.zeros(5).double(), q @ torch.diag(w) @ q.T, 9) for w in (u, v))
    c, d = Gaussian.of(randn(50, 5, seed=4) @ randn(5, 5, seed=5)), Gaussian.of(2 + randn(50, 5, seed=6))

    assert frechet_distance(a, b) == pytest.approx(float((u.sqrt() - v.sqrt()).square().sum()))
    assert frechet_distance(c, d) == pytest.approx(frechet_distance(d, c))


class Pixels(nn.Module):
    """Images are their own features."""

    num_features = 12

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_distance_agrees_with_torchmetrics_on_the_same_features() -> None:
    real, fake = torch.rand(60, 3, 2, 2), torch.rand(40, 3, 2, 2).square()
    metric = FrechetInceptionDistance(feature=Pixels(), normalize=True).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)

    ours = frechet_distance(Gaussian.of(real.flatten(1)), Gaussian.of(fake.flatten(1)))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def test_statistics_are_those_of_torch_and_classes_can_weigh_alike() -> None:
    x = randn(30, 4)
    plain = Gaussian.of(x)
    label = torch.arange(30) % 3

    torch.testing.assert_close(plain.mean, x.mean(0))
    torch.testing.assert_close(plain.cov, x.T.cov())
    even = Gaussian.of(x, label)
    torch.testing.assert_close(even.mean, plain.mean)
    torch.testing.assert_close(even.cov, plain.cov)
    # A class that comes five times as often counts no more than the others.
    often = torch.cat([x, *[x[label == 1]] * 4])
    weighed = Gaussian.of(often, torch.cat([label, torch.ones(40).long()]))
    torch.testing.assert_close(weighed.mean, plain.mean)
    assert not torch.allclose(Gaussian.of(often).mean, plain.mean)


def test_too_few_images_and_other_features_are_told() -> None:
    with pytest.raises(ValueError, match="give at least 2"):
        Gaussian.of(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="width 3 and 4"):
        frechet_distance(Gaussian.of(randn(5, 3)), Gaussian.of(randn(5, 4)))
    with pytest.raises(ValueError, match="more than k=3"):
        precision_recall(randn(3, 2), randn(9, 2))


def test_precision_and_recall_of_equal_far_and_repeated_sets() -> None:
    real = randn(80, 5)

    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    precision, recall = precision_recall(real, real[:1].expand(80, -1))
    assert precision == 1.0
    assert recall <= 1 / 80 + 1e-9


def test_precision_and_recall_are_those_of_a_loop_and_swap_with_the_sets() -> None:
    real, fake = randn(20, 3), 0.7 + randn(15, 3, seed=1)

    def share(points: Tensor, centres: Tensor) -> float:
        hits = 0
        for p in points:
            for i, c in enumerate(centres):
                others = sorted(float((c - o).norm()) for j, o in enumerate(centres) if j != i)
                if float((p - c).norm()) <= others[2]:
                    hits += 1
                    break
        return hits / len(points)

    precision, recall = precision_recall(real, fake)
    assert (precision, recall) == pytest.approx((share(fake, real), share(real, fake)))
    assert precision_recall(fake, real) == (recall, precision)


def test_nearest_distance_is_the_least_root_mean_square_and_zero_for_a_copy() -> None:
    train, x = randn(50, 1, 4, 4), randn(7, 1, 4, 4, seed=1)
    x[3] = train[20]

    found = nearest_distance(x, train)
    slow = torch.stack([(train - image).square().flatten(1).mean(1).sqrt().min() for image in x])
    torch.testing.assert_close(found.double(), slow, rtol=1e-5, atol=1e-7)
    assert found[3] == 0


def test_balanced_rows_are_even_over_classes_and_never_repeat() -> None:
    label = torch.tensor([0] * 50 + [1] * 5 + [2] * 30)
    rows = balanced_rows(label, 35, seed=0)

    assert len(rows.unique()) == 35
    assert label[rows].bincount().tolist() == [15, 5, 15]
    assert label[balanced_rows(label, 6, seed=3)].bincount().tolist() == [2, 2, 2]
    assert torch.equal(balanced_rows(label, 35, seed=0), rows)
    assert not torch.equal(balanced_rows(label, 35, seed=1), rows)
    assert sorted(balanced_rows(label, 999, seed=0).tolist()) == list(range(85))
