# SPDX-License-Identifier: Apache-2.0
"""Spectra, waves of spectra, and the mel distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizer_common import RATE, babble, sine

from tasks.audio.nets.tokenizers.spectrum import inverse_stft, magnitude, mel_bands, mel_distance, wave_of


@pytest.mark.parametrize(("n_fft", "hop"), [(64, 16), (512, 256), (512, 160), (64, 15)])
def test_a_spectrum_is_that_of_numpy(n_fft: int, hop: int) -> None:
    """Frame t by hand: n_fft samples around the middle of its hop, times Hann's window, zeros outside the clip."""
    wave = babble(0.2)
    found = magnitude(wave[None], n_fft, hop)[0]

    frames = -(-len(wave) // hop)
    assert found.shape == (n_fft // 2 + 1, frames)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    around = np.concatenate([np.zeros(n_fft), wave.double().numpy(), np.zeros(2 * n_fft)])
    for t in range(frames):
        first = n_fft + t * hop - (n_fft - hop) // 2
        expected = np.abs(np.fft.rfft(around[first : first + n_fft] * window))
        assert np.allclose(found[:, t].numpy(), expected, atol=1e-4)


def spectrum(wave: torch.Tensor, n_fft: int, hop: int) -> torch.Tensor:
    """The complex numbers whose amounts `magnitude` gives, for a clip of whole hops."""
    left = (n_fft - hop) // 2
    padded = torch.nn.functional.pad(wave, (left, n_fft - hop - left))
    return torch.stft(padded, n_fft, hop, window=torch.hann_window(n_fft), center=False, return_complex=True)


@pytest.mark.parametrize(("n_fft", "hop"), [(512, 256), (512, 128), (512, 80), (64, 15)])
def test_the_inverse_gives_the_wave_back(n_fft: int, hop: int) -> None:
    """But for the ends, where a window has neighbours that are made up."""
    wave = babble(1.0)[: 30 * hop][None]

    back = inverse_stft(spectrum(wave, n_fft, hop), n_fft, hop)

    assert back.shape == wave.shape
    inner = slice(n_fft, -n_fft)
    assert torch.allclose(back[:, inner], wave[:, inner], atol=1e-5)


def test_a_wave_of_magnitudes_has_these_magnitudes() -> None:
    """Griffin and Lim's iterations come closer to the wanted spectrum than phase zero, and quite close."""
    wanted = magnitude(babble()[None], 512, 128)

    def off(iterations: int) -> float:
        found = magnitude(wave_of(wanted, 512, 128, iterations), 512, 128)
        return float((found - wanted).norm() / wanted.norm())

    assert off(32) < 0.5 * off(0)
    assert off(32) < 0.25


def test_mel_bands_cover_all_but_the_ends() -> None:
    """Triangles that overlap by half sum to one between the first and the last peak."""
    total = mel_bands(RATE, 512, 20).sum(1)

    assert torch.allclose(total[10:230], torch.ones(220), atol=1e-5)
    assert total[0] == 0


@pytest.mark.parametrize("decibel", [1.0, 2.0, 6.0])
def test_the_mel_distance_of_a_louder_copy_is_its_decibels(decibel: float) -> None:
    wave = 0.02 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))

    assert float(mel_distance(10 ** (decibel / 20) * wave, wave, RATE)) == pytest.approx(decibel / 20, rel=1e-3)


def test_the_mel_distance_of_equal_waves_is_zero_and_has_no_side() -> None:
    one, other = babble()[None], sine(500.0)[None]

    assert mel_distance(one, one, RATE) == 0
    assert mel_distance(one, other, RATE) == mel_distance(other, one, RATE)
    assert mel_distance(one, other, RATE) > 0.3
