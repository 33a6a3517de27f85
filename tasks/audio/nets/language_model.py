# SPDX-License-Identifier: Apache-2.0
"""What training and generation ask of a network over the steps of a delay pattern, and what is to be predicted.

Shape legend: B clips, K codebooks, V codes of a book, X = V + 3 tokens, T frames, L steps, S symbols of a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tasks.audio.data.prompt import EMPTY, PADDING
from tasks.audio.nets.delay import DelayPattern

if TYPE_CHECKING:
    from tasks.audio.data.batch import AudioBatch

IGNORED = -100
"""Stands in targets where nothing is to be predicted."""


class CodecLM(nn.Module):
    """Base of networks that predict every book's next token from a prompt and the steps so far.

    A subclass defines ``forward``, ``prefill`` and ``step``.

    Args:
        delay: between codes and steps.
    """

    def __init__(self, delay: DelayPattern) -> None:
        super().__init__()
        self.delay = delay

    def targets(self, batch: AudioBatch) -> tuple[Tensor, Tensor]:
        """Inputs [B, K, L] of a batch, and what is to be predicted from each step, [B, L, K]; see `step_targets`."""
        return step_targets(self.delay, batch.codes, batch.ends)

    def forward(self, prompt_BS: Tensor, inputs_BKL: Tensor, domain: Tensor | None = None) -> Tensor:
        """Logits [B, L, K, X] of the steps after those given.

        Args:
            prompt_BS: int64, symbols, 0 at the left of a shorter prompt.
            inputs_BKL: int64, tokens.
            domain: int64 [B], place of the domain among all; for networks that have something of their own for each.
        """
        raise NotImplementedError

    def prefill(
        self, prompt_BS: Tensor, inputs_BKL: Tensor, *, room: int, domain: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Logits [B, K, X] of the step after those given, and what so many further calls of `step` need."""
        raise NotImplementedError

    def step(self, token_BK: Tensor, cache: Any, domain: Tensor | None = None) -> Tensor:
        """Logits [B, K, X] of the step after this one, which is added to the cache."""
        raise NotImplementedError


def step_targets(delay: DelayPattern, codes_BKT: Tensor, ends_B: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [B, K, L], and what is to be predicted from each step, [B, L, K], with `IGNORED` where nothing is.

    Every code is a target; so is the end of the first book, where the clip ends. No other id ever is.

    Source: UniMoE-Audio (docs/papers/unimoe_audio.md, equation 11).
    """
    step_BKL = delay.apply(codes_BKT, ends_B)
    target_BLK = step_BKL[..., 1:].transpose(1, 2)
    wanted_BLK = target_BLK < delay.num_codes
    wanted_BLK[..., 0] |= target_BLK[..., 0] == delay.end
    return step_BKL[..., :-1], target_BLK.where(wanted_BLK, IGNORED)


def empty_prompts(prompt_BS: Tensor) -> Tensor:
    """Prompts of the same shape that say nothing: padding, then `EMPTY`."""
    empty_BS = torch.full_like(prompt_BS, PADDING)
    empty_BS[:, -1:] = EMPTY
    return empty_BS
