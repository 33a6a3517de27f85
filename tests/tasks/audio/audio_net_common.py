# SPDX-License-Identifier: Apache-2.0
"""Small networks and batches for tests of the audio network, its generation and its rivals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeapps.moe import LayerFactory
from moeapps.moe.presets import dense_twin, unimoe_audio
from tasks.audio.data.batch import NO_CODE, AudioBatch
from tasks.audio.model import AudioLM

K, V, SYMBOLS = 3, 11, 20
FACTS: dict[str, Any] = {
    "num_codebooks": K,
    "num_codes": V,
    "num_symbols": SYMBOLS,
    "domains": {"seen": ["voice", "piano", "voice_b"], "validation": ["voice_c"], "unseen": ["harp"]},
    "kinds": {"voice": "speech", "piano": "music", "voice_b": "speech", "voice_c": "speech", "harp": "music"},
}
MOE = unimoe_audio(num_experts=4, jitter=0.0)
DENSE = dense_twin(moe=unimoe_audio(num_experts=4, budget=2.0))


def scattered(module: nn.Module, scale: float = 0.5) -> None:
    """Parameters far from their start, so that no term vanishes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)


def network(moe: LayerFactory = MOE, **options: Any) -> AudioLM:
    """A small network in evaluation mode and double precision."""
    net = AudioLM(FACTS, moe=moe, **{"dim": 16, "depth": 2, "num_heads": 2, **options})
    scattered(net)
    return net.double().eval()


def prompts(lengths: list[int], longest: int) -> Tensor:
    """Right-aligned prompts without special symbols."""
    found = torch.zeros(len(lengths), longest, dtype=torch.int64)
    for row, length in zip(found, lengths, strict=True):
        if length:
            row[-length:] = torch.randint(3, SYMBOLS, (length,))
    return found


def batch_of(lengths: list[int], ends: list[bool], domain: list[int] | None = None, seed: int = 0) -> AudioBatch:
    """Clips of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, V, (len(lengths), K, max(lengths)), generator=generator)
    for clip, length in zip(codes, lengths, strict=True):
        clip[:, length:] = NO_CODE
    places = torch.zeros(len(lengths), dtype=torch.int64) if domain is None else torch.tensor(domain)
    return AudioBatch(codes, prompts([2] * len(lengths), 3), torch.tensor(ends), places, torch.arange(len(lengths)))
