# SPDX-License-Identifier: Apache-2.0
"""Numbers of drawn clips, each beside the same number of real ones: loudness, Fréchet distance, code histograms.

Shape legend: N windows, n samples, d features, K codebooks, V codes, T frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.audio.report.judge import NUM_MELS, cut, log_mel

QUIET = -40.0
"""dBFS below which a clip counts as silent."""


def loudness(wave: Tensor) -> float:
    """Root mean square of a wave [n] in dB below full scale (a constant 1 has 0); -120 for silence or no sample."""
    power = float(wave.double().square().mean()) if len(wave) else 0.0
    return 10 * math.log10(max(power, 1e-12))


def mel_windows(waves: Sequence[Tensor], sample_rate: int) -> Tensor:
    """The embedding of the Fréchet distance: mean and standard deviation over time of each log-mel band of a window.

    Windows last one second and are brought to one loudness; bands are `log_mel`'s.

    Returns:
        float64 [N, 80].
    """
    pieces = [cut(wave, sample_rate) for wave in waves if len(wave)]
    if not pieces:
        return torch.empty(0, 2 * NUM_MELS, dtype=torch.float64)
    bands = log_mel(torch.cat(pieces), sample_rate).double()
    return torch.cat([bands.mean(2), bands.std(2, unbiased=False)], dim=1)


def frechet(real: Tensor, drawn: Tensor) -> float:
    """Fréchet distance of two clouds of features as normal distributions; not a number for fewer than two windows.

    Covariances of few windows are too small: compare distances of equal numbers, and beside their floor, the distance
    of as many other real windows.

    Args:
        real: float64 [N, d].
        drawn: float64 [M, d].
    """
    if min(len(real), len(drawn)) < 2:
        return math.nan
    from torchaudio.functional import frechet_distance

    distance = frechet_distance(real.mean(0), torch.cov(real.T), drawn.mean(0), torch.cov(drawn.T))
    return max(0.0, float(distance.real))


def histograms(codes: Sequence[Tensor], num_codes: int) -> Tensor:
    """How often each code of each book occurs in clips int64 [K, T], float64 [K, V]; other ids are left out."""
    joined = torch.cat(list(codes), dim=1)
    return torch.stack(
        [torch.bincount(book[(book >= 0) & (book < num_codes)], minlength=num_codes) for book in joined]
    ).double()


def jensen_shannon(a_KV: Tensor, b_KV: Tensor) -> float:
    """Divergence of code histograms in bits, the mean over the books: 0 for equal ones, 1 for disjoint ones."""
    p, q = (x / x.sum(1, keepdim=True).clamp(min=1) for x in (a_KV, b_KV))
    middle = (p + q) / 2
    nats = (torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)).nan_to_num(0.0)
    return float(nats.sum(1).mean()) / (2 * math.log(2))
