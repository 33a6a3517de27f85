# SPDX-License-Identifier: Apache-2.0
"""Generated clips: formant voices with transcripts, and music by rule with exact chords, tempo and mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.cache import config_hash
from moeapps.data.domain import SPLITS, Role, Split
from tasks.audio.data.chords import PROGRESSIONS, TEMPI, TIMBRES, draw_prompt, play
from tasks.audio.data.prompt import Kind, Prompt
from tasks.audio.data.source import Clip
from tasks.audio.data.store import KeptAudio
from tasks.audio.data.voices import RATE, VOICES, draw_text, speak

GENERATOR_VERSION = 2
_CHUNK = 64  # clips made at once: as much as fits the processor's cache


class GeneratedAudio(KeptAudio):
    """Voices (``low_voice``, ...) and instruments (``organ``, ...), clips of 1 to 2.5 s at 8 kHz.

    There is four times as much speech as music to train on, as real collections have it. No two clips are the same.

    Args:
        train_speech: training clips of each voice.
        train_music: training clips of each instrument.
        val: validation clips of each domain.
        test: test clips of each domain.
        seed: seed of all clips.

    Raises:
        ValueError: a count below 1.
    """

    default_roles: ClassVar[dict[Role, list[str]]] = {
        "seen": ["low_voice", "high_voice", "organ", "pluck"],
        "validation": ["soft_voice", "reed"],
        "unseen": ["child_voice", "bell"],
    }
    sample_rate = RATE
    domains = (*(f"{name}_voice" for name in VOICES), *TIMBRES)

    def __init__(
        self, *, train_speech: int = 600, train_music: int = 150, val: int = 32, test: int = 64, seed: int = 0
    ) -> None:
        counts = {"train_speech": train_speech, "train_music": train_music, "val": val, "test": test}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}={count} is not allowed; use 1 or more")
        self.train: dict[Kind, int] = {"speech": train_speech, "music": train_music}
        self.held: dict[Split, int] = {"val": val, "test": test}
        self.seed = seed

    @override
    def kind(self, domain: str) -> Kind:
        return "music" if domain in TIMBRES else "speech"

    @override
    def labels(self, domains: Sequence[str]) -> list[str]:
        found = [f"kind={kind}" for kind in dict.fromkeys(self.kind(domain) for domain in domains)]
        found += [f"voice={_voice(name)}" for name in domains if name not in TIMBRES]
        instruments = [name for name in domains if name in TIMBRES]
        found += [f"timbre={name}" for name in instruments]
        if instruments:
            found += [f"tempo={name}" for name in TEMPI] + [f"mode={name}" for name in PROGRESSIONS]
        return found

    @override
    def identity(self, domain: str) -> Any:
        return ["GeneratedAudio", GENERATOR_VERSION, domain, self.train[self.kind(domain)], self.held, self.seed]

    @override
    def describe(self, domain: str) -> str:
        count = self.train[self.kind(domain)]
        return f"generated, version {GENERATOR_VERSION}, seed {self.seed}, {count} training clips"

    @override
    def read(self, domain: str, cache: Path | None) -> dict[Split, list[Clip]]:
        return {split: self.render(domain, split) for split in SPLITS}

    def render(self, domain: str, split: Split) -> list[Clip]:
        """Make the clips of one domain and split anew."""
        generator = torch.Generator().manual_seed(int(config_hash([self.seed, domain, split]), 16))
        count = self.train[self.kind(domain)] if split == "train" else self.held[split]
        waves: list[Tensor] = []
        prompts: list[Prompt] = []
        for start in range(0, count, _CHUNK):
            number = min(_CHUNK, count - start)
            if domain in TIMBRES:
                drawn = [draw_prompt(domain, generator) for _ in range(number)]
                waves += play(drawn, TIMBRES[domain], generator)
            else:
                voice = _voice(domain)
                drawn = [Prompt("speech", {"voice": voice}, draw_text(generator)) for _ in range(number)]
                waves += speak([prompt.text for prompt in drawn], VOICES[voice], generator)
            prompts += drawn
        named = enumerate(zip(waves, prompts, strict=True))
        return [Clip(wave, prompt, f"{domain}-{split}-{i:04}") for i, (wave, prompt) in named]


def _voice(domain: str) -> str:
    return domain.removesuffix("_voice")
