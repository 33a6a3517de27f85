# SPDX-License-Identifier: Apache-2.0
"""Music by rule: chord progressions struck beat by beat in several timbres, so that chords, tempo and mode are known.

Shape legend: N clips, n samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.audio.data.prompt import Prompt
from tasks.audio.data.voices import RATE, level

NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
TRIADS = {"": (0, 4, 7), "m": (0, 3, 7)}
# Chords of a key as semitones above its first note, with their kind; four bars that are common in songs.
PROGRESSIONS: dict[str, tuple[tuple[tuple[int, str], ...], ...]] = {
    "major": (
        ((0, ""), (5, ""), (7, ""), (0, "")),
        ((0, ""), (7, ""), (9, "m"), (5, "")),
        ((0, ""), (9, "m"), (5, ""), (7, "")),
        ((9, "m"), (5, ""), (0, ""), (7, "")),
    ),
    "minor": (
        ((0, "m"), (5, "m"), (7, "m"), (0, "m")),
        ((0, "m"), (8, ""), (3, ""), (10, "")),
        ((0, "m"), (10, ""), (8, ""), (10, "")),
        ((0, "m"), (3, ""), (10, ""), (5, "m")),
    ),
}


@dataclass(frozen=True)
class Tempo:
    """How fast chords are struck: seconds from beat to beat, and strokes of one chord."""

    beat: float
    strokes: int


TEMPI = {"slow": Tempo(0.6, 1), "medium": Tempo(0.42, 1), "fast": Tempo(0.26, 2)}


@dataclass(frozen=True)
class Timbre:
    """How a note sounds.

    Attributes:
        ratios: frequencies of the partials over the fundamental's.
        gains: their amplitudes.
        attack: seconds until a note is at its loudest.
        decay: 1/s at which the fundamental fades; partial k fades ``1 + k / 2`` times as fast.
        tremolo: depth of a wobble of 6 Hz.
    """

    ratios: tuple[float, ...]
    gains: tuple[float, ...]
    attack: float
    decay: float
    tremolo: float = 0.0


TIMBRES: dict[str, Timbre] = {
    "organ": Timbre((1, 2, 3, 4, 6), (1.0, 0.6, 0.4, 0.3, 0.15), attack=0.03, decay=0.0),
    "pluck": Timbre((1, 2, 3, 4, 5, 6), (1.0, 0.7, 0.5, 0.35, 0.25, 0.2), attack=0.004, decay=5.0),
    "reed": Timbre((1, 3, 5, 7), (1.0, 0.5, 0.35, 0.25), attack=0.05, decay=0.5, tremolo=0.1),
    "bell": Timbre((1, 2, 2.98, 4.2, 5.4), (1.0, 0.5, 0.4, 0.3, 0.2), attack=0.004, decay=2.5),
}
_RELEASE = 0.03  # seconds of silence, faded, before the next stroke


def draw_prompt(timbre: str, generator: torch.Generator) -> Prompt:
    """Draw tempo, mode, key and four chords."""
    tempo = list(TEMPI)[int(torch.randint(len(TEMPI), (), generator=generator))]
    mode = list(PROGRESSIONS)[int(torch.randint(len(PROGRESSIONS), (), generator=generator))]
    key = int(torch.randint(12, (), generator=generator))
    steps = PROGRESSIONS[mode][int(torch.randint(len(PROGRESSIONS[mode]), (), generator=generator))]
    names = " ".join(NOTES[(key + semitones) % 12] + quality for semitones, quality in steps)
    return Prompt("music", {"timbre": timbre, "tempo": tempo, "mode": mode}, names)


def chord_notes(name: str) -> list[int]:
    """Return the pitch classes of a chord such as ``C#m``, root first; C is 0.

    Raises:
        ValueError: no such chord.
    """
    root, kind = (name[:-1], "m") if name.endswith("m") else (name, "")
    if root not in NOTES:
        raise ValueError(f"{name!r} is no chord; write a note out of {', '.join(NOTES)}, then m for minor")
    return [(NOTES.index(root) + semitones) % 12 for semitones in TRIADS[kind]]


def strokes_of(prompt: Prompt) -> list[list[int]]:
    """Return the pitch classes that sound from beat to beat of a piece made from such a prompt."""
    tempo = TEMPI[prompt.labels["tempo"]]
    return [chord_notes(name) for name in prompt.text.split() for _ in range(tempo.strokes)]


def beat_seconds(prompt: Prompt) -> float:
    """Return the time from stroke to stroke."""
    return TEMPI[prompt.labels["tempo"]].beat


def play(prompts: list[Prompt], timbre: Timbre, generator: torch.Generator) -> list[Tensor]:
    """Play pieces, each a little out of tune in a way of its own (up to a sixth of a semitone).

    Args:
        prompts: pieces, as `draw_prompt` makes them.
        timbre: how the notes sound.
        generator: source of phases, loudness of the voices, and tuning.

    Returns:
        float32 waves [n] at 8 kHz, RMS 0.1.
    """
    pieces = [strokes_of(prompt) for prompt in prompts]
    beat = torch.tensor([round(beat_seconds(prompt) * RATE) for prompt in prompts])
    lengths = beat * torch.tensor([len(piece) for piece in pieces])
    place = torch.arange(int(lengths.max()))
    stroke = torch.minimum(place // beat[:, None], (lengths // beat - 1)[:, None])  # [N, n]
    since = (place % beat[:, None]) / RATE
    left = (beat[:, None] / RATE - since).clamp(min=0)
    shape = (since / timbre.attack).clamp(max=1) * (left / _RELEASE).clamp(max=1)
    turn = torch.rand(len(prompts), 1, generator=generator)
    shape = shape * (1 + timbre.tremolo * torch.sin(2 * torch.pi * (6 * place / RATE + turn)))
    tuning = 2 ** ((torch.rand(len(prompts), 1, generator=generator) - 0.5) / 36)
    wave = torch.zeros(len(prompts), len(place))
    for midi in _voices(pieces):  # [N, strokes]
        hertz = 440 * 2 ** ((midi - 69) / 12) * tuning
        loudness = 0.7 + 0.6 * torch.rand(len(prompts), 1, generator=generator)
        phase = hertz.gather(1, stroke) * since + torch.rand(len(prompts), 1, generator=generator)
        wave += loudness * _note(phase, hertz.gather(1, stroke), since, timbre)
    return [level(row[:length]) for row, length in zip(wave * shape, lengths.tolist(), strict=True)]


def _voices(pieces: list[list[list[int]]]) -> list[Tensor]:
    """Notes of the bass (from C3) and of three upper voices (from C4) as MIDI numbers, float32 [N, strokes] each."""
    most = max(len(piece) for piece in pieces)
    full = torch.tensor([piece + [piece[-1]] * (most - len(piece)) for piece in pieces], dtype=torch.float32)
    return [48 + full[:, :, 0], *(60 + full[:, :, k] for k in range(3))]


def _note(phase: Tensor, hertz: Tensor, since: Tensor, timbre: Timbre) -> Tensor:
    """Partials of a note; those that 8 kHz cannot hold are left out."""
    out = torch.zeros_like(phase)
    for k, (ratio, gain) in enumerate(zip(timbre.ratios, timbre.gains, strict=True)):
        fade = torch.exp(-timbre.decay * (1 + k / 2) * since) if timbre.decay else 1.0
        out += gain * fade * torch.where(hertz * ratio < 0.45 * RATE, torch.sin(2 * torch.pi * ratio * phase), 0.0)
    return out
