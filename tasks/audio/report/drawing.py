# SPDX-License-Identifier: Apache-2.0
"""Clips of a trained network: how codes are drawn, and their sound.

Shape legend: B clips, S symbols of a prompt, K codebooks, T frames, n samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.audio.data.batch import right_aligned
from tasks.audio.data.prompt import Prompt, PromptVocabulary
from tasks.audio.nets.delay import NO_CODE
from tasks.audio.nets.generation import generate
from tasks.audio.nets.language_model import CodecLM
from tasks.audio.nets.sampling import Sampling
from tasks.audio.nets.tokenizers.base import Tokenizer


@dataclass
class Drawing:
    """How clips are drawn.

    Args:
        cfg: s of classifier-free guidance, ``logits = c + s (c - u)``; 0 is none (UniMoE-Audio: 1 for speech, 3 to 10
            for music).
        temperature: divides the logits; 0 takes the likeliest code.
        top_k: likeliest codes that are drawn among (UniMoE-Audio: 45); None is all.
        top_p: smallest set of that probability that is drawn among; 1 is all.
        min_seconds: no clip ends before; each has one frame at least.
        max_seconds: every clip ends then.
        seed: seed of the draws.

    Raises:
        ValueError: a negative strength, temperature or duration, ``top_k`` below 1, ``top_p`` outside (0, 1].
    """

    cfg: float = 1.0
    temperature: float = 1.0
    top_k: int | None = 45
    top_p: float = 1.0
    min_seconds: float = 0.5
    max_seconds: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_k, self.top_p)
        if self.cfg < 0 or not 0 <= self.min_seconds <= self.max_seconds or self.max_seconds == 0:
            raise ValueError(
                f"cfg={self.cfg}, min_seconds={self.min_seconds}, max_seconds={self.max_seconds}: use cfg of 0 or more "
                "and 0 <= min_seconds <= max_seconds, which is above 0"
            )


def draw_codes(
    net: CodecLM,
    prompt_BS: Tensor,
    frame_rate: float,
    how: Drawing,
    *,
    domain: Tensor | None = None,
    keep: Tensor | None = None,
    place: Tensor | None = None,
    batch_size: int = 64,
) -> list[Tensor]:
    """Draw the codes of a clip for every prompt; what is drawn with a clip does not change it.

    Args:
        net: an `AudioLM` or a rival of it.
        prompt_BS: int64 [B, S], right-aligned.
        frame_rate: frames per second.
        how: how they are drawn.
        domain: int64 [B], for networks with parts of their own for each domain.
        keep: int64 [B, K, T], frames that the clips begin with, `NO_CODE` behind the last.
        place: int64 [B], number of each clip among all that share the seed; None counts the prompts.
        batch_size: clips at a time.

    Returns:
        int64 [K, T] of each clip on the CPU, the kept frames included; at least one frame.
    """
    place_B = torch.arange(len(prompt_BS), device=prompt_BS.device) if place is None else place
    kept_B = torch.zeros_like(place_B) if keep is None else (keep[:, 0] != NO_CODE).sum(1)
    longest, shortest = max(1, round(how.max_seconds * frame_rate)), max(1, round(how.min_seconds * frame_rate))
    new_B = (longest - kept_B).clamp(min=1)
    found: list[Tensor] = []
    for start in range(0, len(prompt_BS), batch_size):
        rows = slice(start, start + batch_size)
        found += generate(
            net,
            prompt_BS[rows],
            continue_codes=None if keep is None else keep[rows],
            domain=None if domain is None else domain[rows],
            cfg_scale=how.cfg,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            min_frames=(shortest - kept_B).clamp(min=0).minimum(new_B)[rows],
            max_frames=new_B[rows],
            seed=how.seed,
            place=place_B[rows],
        )
    return [codes[:, :longest].cpu() for codes in found]


def sounds(tokenizer: Tokenizer, codes: Sequence[Tensor]) -> list[Tensor]:
    """Waves float32 [n] of codes [K, T]; clips of one length are decoded together, one without frames is empty."""
    waves: list[Tensor] = [torch.zeros(0)] * len(codes)
    for length in sorted({part.shape[1] for part in codes} - {0}):
        rows = [row for row, part in enumerate(codes) if part.shape[1] == length]
        for row, wave in zip(rows, tokenizer.decode(torch.stack([codes[row] for row in rows])), strict=True):
            waves[row] = wave.cpu()
    return waves


def prompt_symbols(vocabulary: PromptVocabulary, prompts: Sequence[Prompt | None], num_symbols: int) -> Tensor:
    """Symbols int64 [B, S] of prompts, as a network reads them; a longer text is cut."""
    return right_aligned([vocabulary.encode(prompt) for prompt in prompts], num_symbols)
