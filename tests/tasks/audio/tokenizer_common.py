# SPDX-License-Identifier: Apache-2.0
"""Sounds and small tokenizers for the tests of tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from tasks.audio.nets.tokenizers import MelRVQ, Tokenizer

RATE = 8000


def sine(frequency: float, seconds: float = 1.0, amplitude: float = 0.2) -> Tensor:
    return amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(round(seconds * RATE)) / RATE)


def babble(seconds: float = 1.0, seed: int = 0) -> Tensor:
    """Noise whose loudness rises and falls four times a second, as that of speech does."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(round(seconds * RATE), generator=generator)
    return 0.2 * noise * (0.05 + sine(2.0, seconds, 1.0).square())


def small(**settings: Any) -> MelRVQ:
    return MelRVQ(**{"num_codebooks": 3, "num_codes": 16, "num_mels": 20, **settings})


def clips() -> list[Tensor]:
    return [babble(1.0, 1), babble(0.7, 2), sine(440.0), sine(1200.0, 0.5)]


class MuLaw(Tokenizer):
    """One code per sample, on 256 logarithmic steps: close to no loss."""

    def __init__(self, sample_rate: int = RATE) -> None:
        super().__init__(sample_rate=sample_rate, hop=1, num_codebooks=1, num_codes=256)
        self.fitted.fill_(True)

    @override
    def settings(self) -> dict[str, Any]:
        return {"tokenizer": "MuLaw"}

    @override
    def _fit(self, waves: Sequence[Tensor]) -> None:
        pass

    @override
    def _encode(self, wave_Bn: Tensor) -> Tensor:
        curved = wave_Bn.clamp(-1, 1).abs().mul(255).log1p() / torch.tensor(256.0).log() * wave_Bn.sign()
        return ((curved + 1) * 127.5).round().long()[:, None]

    @override
    def _decode(self, codes_BKT: Tensor) -> Tensor:
        curved = codes_BKT[:, 0] / 127.5 - 1
        return (curved.abs() * torch.tensor(256.0).log()).expm1() / 255 * curved.sign()
