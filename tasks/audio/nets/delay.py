# SPDX-License-Identifier: Apache-2.0
"""Delay patterns: how K codebooks of a clip become one sequence of steps, each book some steps behind the first.

A step holds one token per book. Ids 0 .. V-1 are codes, then come ``end``, ``pad`` and ``begin``. Book c holds
``begin`` at steps 0 .. D_c, the code of frame t at step t + D_c + 1, ``end`` after its last code, if the clip ends
there, and ``pad`` from there on.

Shape legend: B clips, K books, V codes of a book, T frames, L steps, D_c delay of book c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NO_CODE = -1
"""Stands in codes [B, K, T] beyond the end of a clip."""


def unimoe(num_codebooks: int) -> list[int]:
    """Delays of UniMoE-Audio (and of Dia): 0, 8, 9, 10, ...; the first book leads by eight steps.

    Source: docs/papers/unimoe_audio.md, equation 7.

    Example:
        >>> unimoe(4)
        [0, 8, 9, 10]
    """
    return [0, *range(8, 7 + num_codebooks)]


def audiocraft(num_codebooks: int) -> list[int]:
    """Delays of MusicGen (audiocraft): 0, 1, 2, 3, ...

    Example:
        >>> audiocraft(4)
        [0, 1, 2, 3]
    """
    return list(range(num_codebooks))


@dataclass(frozen=True)
class DelayPattern:
    """Between codes [B, K, T] and steps [B, K, L].

    Args:
        delays: D_c of each book, in steps; 0 for the first, which alone says where a clip ends.
        num_codes: V.

    Raises:
        ValueError: no book, a delay below 0, or a first book with a delay; fewer than 1 code.

    Source: UniMoE-Audio (docs/papers/unimoe_audio.md, equation 7); the order begin, codes, end, pad is Dia's.

    Example:
        >>> pattern = DelayPattern([0, 1], num_codes=8)
        >>> pattern.apply(torch.tensor([[[3, 4], [5, 6]]]), torch.tensor([True])).tolist()
        [[[10, 3, 4, 8], [10, 10, 5, 6]]]
    """

    delays: Sequence[int]
    num_codes: int

    def __post_init__(self) -> None:
        if not self.delays or self.delays[0] != 0 or min(self.delays) < 0 or self.num_codes < 1:
            raise ValueError(
                f"delays={list(self.delays)}, num_codes={self.num_codes}: give one delay of 0 or more per codebook, 0 "
                "for the first, e.g. [0, 1, 2, 3], and at least one code"
            )

    @property
    def end(self) -> int:
        """V, the id after a clip's last code."""
        return self.num_codes

    @property
    def pad(self) -> int:
        """V + 1, the id of no token."""
        return self.num_codes + 1

    @property
    def begin(self) -> int:
        """V + 2, the id before a clip's first code."""
        return self.num_codes + 2

    @property
    def num_tokens(self) -> int:
        """V + 3, codes and the three ids beside them."""
        return self.num_codes + 3

    @property
    def longest(self) -> int:
        """The largest delay."""
        return max(self.delays)

    def num_steps(self, num_frames: int) -> int:
        """L, steps of so many frames: all books' codes, and the end of the first."""
        return num_frames + max(self.longest, 1) + 1

    def frames(self, num_steps: int, device: torch.device | None = None) -> Tensor:
        """Which frame a book holds at a step, int64 [K, L]: below 0 before the first, unbounded after the last."""
        delay_K = torch.tensor(list(self.delays), device=device)
        return torch.arange(num_steps, device=device) - delay_K.unsqueeze(-1) - 1

    def apply(self, codes_BKT: Tensor, ends_B: Tensor) -> Tensor:
        """Steps [B, K, L] of clips.

        Args:
            codes_BKT: int64; `NO_CODE` beyond a clip's end, in all books alike.
            ends_B: bool, whether the clip ends after its last code (and was not cut there).

        Raises:
            ValueError: for another number of books.
        """
        if codes_BKT.shape[1] != len(self.delays):
            raise ValueError(
                f"the codes have {codes_BKT.shape[1]} codebooks, but there are {len(self.delays)} delays; give one each"
            )
        num_frames = codes_BKT.shape[-1]
        frame_KL = self.frames(self.num_steps(num_frames), codes_BKT.device)
        length_B11 = (codes_BKT[:, :1] != NO_CODE).sum(-1, keepdim=True)
        padded_BKT = F.pad(codes_BKT, (0, 1), value=NO_CODE)
        index_BKL = frame_KL.clamp(0, num_frames).expand(len(codes_BKT), -1, -1)
        step_BKL = padded_BKT.gather(-1, index_BKL)
        last_BKL = (frame_KL == length_B11) & ends_B[:, None, None]
        step_BKL = step_BKL.where(frame_KL < length_B11, self.pad).masked_fill(last_BKL, self.end)
        return step_BKL.masked_fill(frame_KL < 0, self.begin)

    def revert(self, steps_BKL: Tensor) -> Tensor:
        """Codes [B, K, T] of steps; a frame that lacks the code of a book, and all after it, are `NO_CODE`."""
        num_frames = steps_BKL.shape[-1] - max(self.longest, 1) - 1
        delay_K1 = torch.tensor(list(self.delays), device=steps_BKL.device).unsqueeze(-1)
        index_KT = torch.arange(max(num_frames, 0), device=steps_BKL.device) + delay_K1 + 1
        codes_BKT = steps_BKL.gather(-1, index_KT.expand(len(steps_BKL), -1, -1))
        whole_B1T = (codes_BKT < self.num_codes).all(1, keepdim=True).cumprod(-1).bool()
        return codes_BKT.where(whole_B1T, NO_CODE)
