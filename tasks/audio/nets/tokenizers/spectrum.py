# SPDX-License-Identifier: Apache-2.0
"""Mel spectra of waves, waves of magnitudes, and the distance of two waves on several mel scales.

Letters: B clips, n samples, T frames, M mel bands, F = n_fft / 2 + 1 frequencies.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.functional import griffinlim, melscale_fbanks


def mel_bands(sample_rate: int, n_fft: int, num_mels: int) -> Tensor:
    """Triangular mel filters [F, M] from 0 to half the sample rate."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="At least one mel filterbank"
        )  # narrow low bands may lie between bins
        bands: Tensor = melscale_fbanks(n_fft // 2 + 1, 0.0, sample_rate / 2, num_mels, sample_rate)
    return bands


def magnitude(wave_Bn: Tensor, n_fft: int, hop: int) -> Tensor:
    """Amplitude spectra [B, F, ceil(n / hop)]; frame t is centred on the middle of samples t * hop to (t + 1) * hop."""
    samples = wave_Bn.shape[-1]
    frames = -(-samples // hop)
    left = (n_fft - hop) // 2
    padded = F.pad(wave_Bn, (left, frames * hop - samples + n_fft - hop - left))
    window = torch.hann_window(n_fft, device=wave_Bn.device)
    return torch.stft(padded, n_fft, hop, window=window, center=False, return_complex=True).abs()


def wave_of(magnitude_BFT: Tensor, n_fft: int, hop: int, iterations: int) -> Tensor:
    """Waves [B, T * hop] whose `magnitude` comes close to the given one: Griffin and Lim's method from phase zero."""
    around = F.pad(magnitude_BFT, (1, 1), mode="replicate")  # a frame at each side, for the first and last half hop
    window = torch.hann_window(n_fft, device=magnitude_BFT.device)
    wave: Tensor = griffinlim(
        around,
        window,
        n_fft=n_fft,
        hop_length=hop,
        win_length=n_fft,
        power=1.0,
        n_iter=iterations,
        momentum=0.99,
        length=None,
        rand_init=False,
    )
    return _without_sides(wave, n_fft, hop)


def inverse_stft(spectrum_BFT: Tensor, n_fft: int, hop: int) -> Tensor:
    """Waves [B, T * hop] of complex spectra at the frames of `magnitude`; differentiable."""
    sides = spectrum_BFT[..., :1], spectrum_BFT, spectrum_BFT[..., -1:]
    window = torch.hann_window(n_fft, device=spectrum_BFT.device)
    return _without_sides(torch.istft(torch.cat(sides, -1), n_fft, hop, window=window), n_fft, hop)


def _without_sides(wave: Tensor, n_fft: int, hop: int) -> Tensor:
    """Cut what the two frames at the sides added: `istft` centres frame 0 on sample 0."""
    start = hop - (n_fft // 2 - (n_fft - hop) // 2)
    return wave[..., start : wave.shape[-1] - hop + start]


def mel_distance(wave_Bn: Tensor, other_Bn: Tensor, sample_rate: int) -> Tensor:
    """Mean over five windows (64 to 1024 samples) of the mean absolute difference of log10 mel amplitudes.

    A quarter of the window is the hop; 5 to 80 mel bands; amplitudes below 1e-5 count as 1e-5. A difference of 0.1 is
    2 dB. Differentiable, with the shape [].
    """
    found = []
    for place, n_fft in enumerate((64, 128, 256, 512, 1024)):
        bands_FM = mel_bands(sample_rate, n_fft, 5 << place).to(wave_Bn.device)
        logs = [
            (magnitude(wave, n_fft, n_fft // 4).mT @ bands_FM).clamp_min(1e-5).log10() for wave in (wave_Bn, other_Bn)
        ]
        found.append((logs[0] - logs[1]).abs().mean())
    return torch.stack(found).mean()
