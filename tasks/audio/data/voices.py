# SPDX-License-Identifier: Apache-2.0
"""Formant voices: syllables spoken by a source (pulses and noise) through a moving filter.

The source-filter model of speech (Fant 1960). Formants of the vowels are round values near those that Peterson and
Barney (1952) measured.

Shape legend: N clips, M sounds of a clip, F frames of 10 ms, n samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

RATE = 8000
_HOP, _WINDOW = 80, 256
_BANDWIDTHS = (90.0, 120.0, 180.0)  # Hz, of the three formants


@dataclass(frozen=True)
class Voice:
    """How a speaker sounds.

    Attributes:
        pitch: mean fundamental frequency in Hz.
        scale: formants relative to those of an adult man; a shorter throat has higher ones.
        breath: noise in voiced sounds, relative to the pulses.
        pace: speed relative to 1.
    """

    pitch: float
    scale: float
    breath: float
    pace: float


VOICES: dict[str, Voice] = {
    "low": Voice(pitch=105.0, scale=1.0, breath=0.02, pace=1.0),
    "high": Voice(pitch=205.0, scale=1.16, breath=0.05, pace=1.15),
    "soft": Voice(pitch=160.0, scale=1.08, breath=0.30, pace=0.95),
    "child": Voice(pitch=290.0, scale=1.30, breath=0.05, pace=0.9),
}


@dataclass(frozen=True)
class Sound:
    """One sound: formants in Hz, how much of it is pulses and noise, and where the noise lies (Hz)."""

    formants: tuple[float, float, float]
    voiced: float
    noise: float = 0.0
    noise_at: float = 2000.0
    seconds: float = 0.08


VOWELS: dict[str, Sound] = {
    "a": Sound((730, 1090, 2440), 1.0, seconds=0.17),
    "e": Sound((530, 1840, 2480), 1.0, seconds=0.15),
    "i": Sound((280, 2250, 2900), 1.0, seconds=0.14),
    "o": Sound((500, 850, 2410), 1.0, seconds=0.16),
    "u": Sound((310, 780, 2240), 1.0, seconds=0.14),
}
CONSONANTS: dict[str, Sound] = {
    "m": Sound((250, 900, 2200), 0.35),
    "n": Sound((250, 1500, 2500), 0.35),
    "l": Sound((360, 1200, 2700), 0.5, seconds=0.06),
    "s": Sound((500, 1800, 2600), 0.0, noise=0.5, noise_at=3500, seconds=0.1),
    "f": Sound((500, 1200, 2400), 0.0, noise=0.18, noise_at=2600, seconds=0.09),
    "t": Sound((500, 1800, 2600), 0.0, noise=0.0, seconds=0.05),
    "k": Sound((500, 1500, 2300), 0.0, noise=0.0, seconds=0.06),
    "b": Sound((200, 800, 2200), 0.12, seconds=0.06),
}
_BURSTS = {"t": Sound((500, 1800, 2600), 0.0, 0.6, 3000, 0.02), "k": Sound((500, 1500, 2300), 0.0, 0.6, 1600, 0.025)}
SYLLABLES: tuple[str, ...] = tuple(c + v for c in CONSONANTS for v in VOWELS)


def syllables(text: str) -> list[str]:
    """Return the syllables of a transcript such as ``mata so``.

    Raises:
        ValueError: a pair of letters that is no syllable.
    """
    letters = text.replace(" ", "")
    found = [letters[i : i + 2] for i in range(0, len(letters), 2)]
    for syllable in found:
        if syllable not in SYLLABLES:
            raise ValueError(f"{syllable!r} in {text!r} is no syllable of a formant voice; one is {SYLLABLES[0]!r}")
    return found


def sounds_of(text: str) -> list[Sound]:
    """Return the sounds of a transcript; a stop is a silence and a burst."""
    sounds = []
    for syllable in syllables(text):
        consonant, vowel = syllable[0], syllable[1]
        sounds.append(CONSONANTS[consonant])
        sounds.extend([_BURSTS[consonant]] if consonant in _BURSTS else [])
        sounds.append(VOWELS[vowel])
    return sounds


def draw_text(generator: torch.Generator) -> str:
    """Draw a transcript of 5 to 9 syllables in words of 1 to 3."""
    count = int(torch.randint(5, 10, (), generator=generator))
    chosen = torch.randint(len(SYLLABLES), (count,), generator=generator).tolist()
    lengths = torch.randint(1, 4, (count,), generator=generator).tolist()
    words, start = [], 0
    for length in lengths:
        words.append("".join(SYLLABLES[i] for i in chosen[start : start + length]))
        start += length
        if start >= count:
            break
    return " ".join(words)


def speak(texts: list[str], voice: Voice, generator: torch.Generator) -> list[Tensor]:
    """Speak transcripts, each at a pitch and pace a little of its own.

    Args:
        texts: transcripts of syllables.
        voice: who speaks.
        generator: source of the noise and of the differences.

    Returns:
        float32 waves [n] at 8 kHz, RMS 0.1.
    """
    sounds = [sounds_of(text) for text in texts]
    count, most = len(texts), max(len(s) for s in sounds)
    pace = voice.pace * (1 + 0.1 * (torch.rand(count, generator=generator) - 0.5))
    seconds = _table([[s.seconds for s in row] for row in sounds], most) / pace[:, None]
    seconds = seconds * (1 + 0.3 * (torch.rand(count, most, generator=generator) - 0.5))
    ends = seconds.cumsum(1)
    samples = (ends[:, -1] * RATE).long()
    frames = int(samples.max()) // _HOP + 1
    time = torch.arange(frames) * _HOP / RATE
    at = torch.searchsorted(ends, time.expand(count, -1).contiguous(), right=True).clamp(max=most - 1)  # [N, F]

    def track(values: list[list[float]]) -> Tensor:
        """One value per frame, smoothed over 40 ms: sounds run into each other."""
        return _smooth(_table(values, most).gather(1, at))

    pulses, hiss = _sources(count, frames, voice, generator)
    formants = [track([[s.formants[k] for s in row] for row in sounds]) * voice.scale for k in range(3)]
    voiced = track([[s.voiced for s in row] for row in sounds])
    noise, noise_at = (track([[getattr(s, f) for s in row] for row in sounds]) for f in ("noise", "noise_at"))
    hertz = torch.fft.rfftfreq(_WINDOW, 1 / RATE)
    throat = _resonance(hertz, formants)  # [N, bins, F]
    teeth = torch.exp(-(((hertz[:, None] - noise_at[:, None]) / 700.0) ** 2))
    spectrum = (pulses + voice.breath * hiss) * throat * voiced[:, None] + hiss * teeth * noise[:, None]
    wave = torch.istft(spectrum, _WINDOW, _HOP, window=torch.hann_window(_WINDOW))
    return [level(row[:length]) for row, length in zip(wave, samples.clamp(max=wave.shape[1]).tolist(), strict=True)]


def level(wave: Tensor, rms: float = 0.1) -> Tensor:
    """Return a wave [n] of this RMS, faded in and out over 5 ms; peaks are kept within 1."""
    fade = torch.linspace(0, 1, RATE // 200)
    wave = wave.clone()
    wave[: len(fade)] *= fade
    wave[-len(fade) :] *= fade.flip(0)
    wave = wave * (rms / wave.square().mean().sqrt().clamp(min=1e-8))
    return wave / wave.abs().max().clamp(min=1.0)


def _table(rows: list[list[float]], width: int) -> Tensor:
    """Rows of unequal length, filled up with zeros, float32 [N, M]."""
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows])


def _smooth(track: Tensor, width: int = 5) -> Tensor:
    edges = F.pad(track[:, None], (width // 2, width // 2), mode="replicate")
    return F.avg_pool1d(edges, width, stride=1)[:, 0]


def _sources(count: int, frames: int, voice: Voice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spectra of pulses at the voice's pitch, and of white noise, complex [N, bins, F]."""
    num_samples = (frames - 1) * _HOP + 1
    time = torch.arange(num_samples) / RATE
    own, turn = (torch.rand(count, 1, generator=generator) for _ in range(2))
    pitch = voice.pitch * (0.93 + 0.14 * own) * (1.08 - 0.08 * time)
    pitch = pitch * (1 + 0.02 * torch.sin(2 * torch.pi * (4.5 * time + turn)))
    phase = 2 * torch.pi * ((pitch.double() / RATE).cumsum(1) + turn)
    highest = float(int(0.45 * RATE / (1.2 * voice.pitch)))  # partials that 8 kHz can hold
    half = (0.5 * phase).float()
    # A sum of `highest` cosines in closed form (Dirichlet's kernel); where the sine is 0 it has its largest value.
    low = torch.sin(half)
    kernel = torch.where(low.abs() < 1e-3, 2 * highest, torch.sin((2 * highest + 1) * half) / low - 1)
    pulses = kernel / highest**0.5
    hiss = torch.randn(count, num_samples, generator=generator)
    window = torch.hann_window(_WINDOW)
    return tuple(  # type: ignore[return-value]
        torch.stft(source, _WINDOW, _HOP, window=window, return_complex=True) for source in (pulses, hiss)
    )


def _resonance(hertz: Tensor, formants: list[Tensor]) -> Tensor:
    """Gain of resonances in a row over a falling source, float32 [N, bins, F]."""
    gain = 1 / (1 + (hertz / 500.0) ** 2).sqrt()[:, None]
    for centre, width in zip(formants, _BANDWIDTHS, strict=True):
        place = (hertz[:, None] / centre[:, None].clamp(min=50.0)) ** 2
        gain = gain / ((1 - place) ** 2 + place * (width / centre[:, None].clamp(min=50.0)) ** 2).sqrt()
    return gain
