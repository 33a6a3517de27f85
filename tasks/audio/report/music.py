# SPDX-License-Identifier: Apache-2.0
"""Does drawn music keep to its prompt? Chords by chroma, tempo by the rhythm of its strokes.

For prompts that name chords and one of the generator's tempi; others are left out.

Shape legend: n samples, F frames of 16 ms, P = 12 pitch classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.audio.data.chords import TEMPI, beat_seconds, strokes_of
from tasks.audio.data.prompt import Prompt

HOP = 0.016
"""Seconds from frame to frame."""


def has_score(prompt: Prompt) -> bool:
    """Whether a prompt says which chords sound when."""
    if prompt.kind != "music" or prompt.labels.get("tempo") not in TEMPI or not prompt.text:
        return False
    try:
        strokes_of(prompt)
    except ValueError:
        return False
    return True


def spectrum(wave: Tensor, sample_rate: int, seconds: float) -> Tensor:
    """Magnitudes [bins, F] of windows of some length, one every `HOP` seconds, centred there."""
    size = 2 * round(seconds * sample_rate / 2)
    padded = torch.nn.functional.pad(wave, (size // 2, size // 2))
    window = torch.hann_window(size)
    return torch.stft(padded, size, round(HOP * sample_rate), window=window, center=False, return_complex=True).abs()


def chroma(wave: Tensor, sample_rate: int) -> Tensor:
    """Energy of the pitch classes C, C#, ... from 110 to 1200 Hz, float32 [12, F].

    Only peaks of the spectrum count, so that what leaks from a note into its neighbours does not.
    """
    magnitude = spectrum(wave, sample_rate, 0.256)
    inner = magnitude[1:-1]
    peak = (inner >= magnitude[:-2]) & (inner > magnitude[2:])
    hertz = torch.arange(1, len(magnitude) - 1) * sample_rate / (2 * (len(magnitude) - 1))
    heard = (hertz >= 110) & (hertz <= 1200)
    pitch = (12 * torch.log2(hertz[heard] / 440) + 69).round().long() % 12
    energy = (inner * peak)[heard].square()
    return torch.zeros(12, magnitude.shape[1]).index_add_(0, pitch, energy)


def chroma_cosine(wave: Tensor, sample_rate: int, prompt: Prompt) -> float:
    """Mean over the strokes of a piece of the cosine between what sounds and the pitch classes of its chord.

    1 is nothing but the chord; three of twelve classes with equal energy everywhere have 0.5. A piece that ends early
    is scored on what it has; not a number where that is less than a stroke.
    """
    found = chroma(wave, sample_rate).sqrt()  # loud partials should not decide alone
    beat, cosines = beat_seconds(prompt), []
    for number, notes in enumerate(strokes_of(prompt)):
        first, last = (round((number + edge) * beat / HOP) for edge in (0, 1))
        if last > found.shape[1]:
            break
        wanted = torch.zeros(12)
        wanted[notes] = 1.0
        cosines.append(float(torch.cosine_similarity(found[:, first:last].mean(1), wanted, dim=0)))
    return sum(cosines) / len(cosines) if cosines else math.nan


def tempo_of(wave: Tensor, sample_rate: int) -> str:
    """The tempo whose beat the rises of loudness repeat at best, one of `TEMPI`."""
    magnitude = spectrum(wave, sample_rate, 0.032)
    level = magnitude.square().mean(0).sqrt().clamp(min=1e-4).log()
    rise = level.diff().clamp(min=0)
    rise = rise - rise.mean()
    power = float(rise.square().sum())
    best, name = -math.inf, ""
    for candidate, tempo in TEMPI.items():
        lag = round(tempo.beat / HOP)
        around = [float((rise[k:] * rise[:-k]).sum()) for k in (lag - 1, lag, lag + 1) if 0 < k < len(rise)]
        likeness = max(around, default=0.0) / max(power, 1e-9)
        if likeness > best:
            best, name = likeness, candidate
    return name


def adherence(waves: Sequence[Tensor], prompts: Sequence[Prompt], sample_rate: int) -> dict[str, float]:
    """Scores of pieces against their prompts.

    Returns:
        ``chroma``, mean of `chroma_cosine`; ``chroma_shuffled``, against the prompts of other pieces, which is what
        music that ignores its prompt has; ``tempo``, share of the pieces with the tempo of their prompt. Empty where
        no prompt has a score.
    """
    rows = [row for row, prompt in enumerate(prompts) if has_score(prompt) and len(waves[row])]
    if not rows:
        return {}
    own = [chroma_cosine(waves[row], sample_rate, prompts[row]) for row in rows]
    other = [chroma_cosine(waves[row], sample_rate, prompts[rows[place - 1]]) for place, row in enumerate(rows)]
    right = [tempo_of(waves[row], sample_rate) == prompts[row].labels["tempo"] for row in rows]
    return {
        "chroma": _mean(own),
        "chroma_shuffled": _mean(other),
        "tempo": sum(right) / len(right),
    }


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
