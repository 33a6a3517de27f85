# SPDX-License-Identifier: Apache-2.0
"""A batch of clips as codes with their prompts, and the data set that makes such batches.

Shape legend: B clips, K codebooks, T frames of the longest clip, S symbols of a prompt, N clips of a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from moeapps.data.gather import BatchDataset, Rows
from moeapps.data.mixing import MixingSampler
from tasks.audio.data.prompt import PADDING, UNKNOWN
from tasks.audio.nets.delay import NO_CODE as NO_CODE


@dataclass
class AudioBatch(Rows):
    """Clips as codes, with their prompts.

    Attributes:
        codes: int64 [B, K, T], 0 to V - 1; `NO_CODE` behind the last frame of a shorter clip.
        prompt: int64 [B, S], right-aligned, 0 is padding at the left.
        ends: bool [B], the recording ends with the last frame: the end is to be predicted, too.
        domain: int64 [B], position of the domain among all configured ones.
        index: int64 [B], row in the data set of its domain and split.
    """

    codes: Tensor
    prompt: Tensor
    ends: Tensor
    domain: Tensor
    index: Tensor

    @property
    def lengths(self) -> Tensor:
        """Frames of each clip, int64 [B]."""
        return (self.codes[:, 0] != NO_CODE).sum(1)

    @property
    def device(self) -> torch.device:
        """Where the batch lies."""
        return self.codes.device

    @classmethod
    @override
    def cat(cls, parts: Sequence[AudioBatch]) -> AudioBatch:
        """Join batches; shorter ones are padded to the longest clip."""
        longest = max(part.codes.shape[2] for part in parts)
        wide = [F.pad(part.codes, (0, longest - part.codes.shape[2]), value=NO_CODE) for part in parts]
        return super().cat([replace(part, codes=codes) for part, codes in zip(parts, wide, strict=True)])


class CodeClips(BatchDataset):
    """The clips of one domain and split as codes, cut to a number of frames.

    Training cuts anew in every epoch; evaluation cuts each clip at a place of its own that never changes. The place
    depends on seed, epoch, row and place in the batch alone, so that every model sees the same cuts.

    Args:
        codes: int16 or int64 [K, frames of all clips laid end to end].
        lengths: int64 [N], frames of each clip, 1 or more.
        prompts: int64 [N, S], right-aligned.
        ends: bool [N], the recording ends with the clip.
        max_frames: most frames of an item.
        seed: seed of the cuts.
        num_labels: ids below ``3 + num_labels`` that are no special symbol are labels.
        label_dropout: probability with which training replaces a label by the unknown one; 0 in evaluation.
        train: cut anew in every epoch.
        domain: number of the domain.
    """

    def __init__(
        self,
        codes: Tensor,
        lengths: Tensor,
        prompts: Tensor,
        ends: Tensor,
        *,
        max_frames: int,
        seed: int = 0,
        num_labels: int = 0,
        label_dropout: float = 0.0,
        train: bool = False,
        domain: int = 0,
    ) -> None:
        self.codes, self.lengths, self.prompts, self.ends = codes, lengths, prompts, ends
        self.max_frames, self.seed, self.train, self.domain = max_frames, seed, train, domain
        self.num_labels, self.label_dropout = num_labels, label_dropout if train else 0.0
        self.starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)[:-1]])
        self.rows = torch.arange(len(lengths))  # clip of each row, where `part` left some out
        self.clock: MixingSampler | None = None  # the sampler of the run, which knows the epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def part(self, share: float) -> CodeClips:
        """Return a data set of a share of the clips, at least one, drawn by the seed; a larger share has them, too."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed))
        kept = order[: max(1, round(share * len(self)))].sort().values
        other = copy(self)
        for name in ("lengths", "prompts", "ends", "starts", "rows"):
            setattr(other, name, getattr(self, name)[kept])
        return other

    @override
    def batch(self, rows: Tensor) -> AudioBatch:
        spare = (self.lengths[rows] - self.max_frames).clamp(min=0)
        first = (self._chance(rows, 1)[:, 0] * (spare + 1)).long().clamp(max=spare)
        length = self.lengths[rows].clamp(max=self.max_frames)
        time = torch.arange(int(length.max()))
        inside = time < length[:, None]
        place = (self.starts[rows] + first)[:, None] + torch.where(inside, time, 0)
        codes = torch.where(inside, self.codes[:, place].long(), NO_CODE).transpose(0, 1).contiguous()
        prompt = self.prompts[rows]
        if self.label_dropout > 0:
            is_label = (prompt > UNKNOWN) & (prompt <= UNKNOWN + self.num_labels)
            dropped = self._chance(rows, prompt.shape[1] + 1)[:, 1:] < self.label_dropout
            prompt = torch.where(is_label & dropped, UNKNOWN, prompt)
        return AudioBatch(codes, prompt, self.ends[rows] & (first == spare), torch.full_like(rows, self.domain), rows)

    def _chance(self, rows: Tensor, count: int) -> Tensor:
        """Numbers in [0, 1), float64 [n, count], of seed, epoch, row and (in training) place in the batch."""
        epoch, place = (self.clock.epoch if self.clock is not None else 0, torch.arange(len(rows)))
        word = mix(rows + mix(torch.tensor(self.seed)))
        if self.train:
            word = mix(word + mix(epoch + mix(place)))
        return (mix(word[:, None] + mix(torch.arange(count))) >> 11 & (1 << 52) - 1).double() / (1 << 52)


def mix(word: Tensor) -> Tensor:
    """Scramble int64 numbers (the finaliser of SplitMix64, in wrapping arithmetic)."""
    word = word + _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        word = (word ^ _shifted(word, shift)) * factor
    return word ^ _shifted(word, 31)


def _shifted(word: Tensor, by: int) -> Tensor:
    """Shift right without the sign."""
    return (word >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_GOLDEN, _FIRST, _SECOND = (_signed(w) for w in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def right_aligned(prompts: Sequence[Sequence[int]], num_symbols: int) -> Tensor:
    """Return int64 [N, S]: the first S symbols of each prompt at the right, padding at the left."""
    out = torch.full((len(prompts), num_symbols), PADDING, dtype=torch.int64)
    for row, prompt in zip(out, prompts, strict=True):
        kept = list(prompt)[:num_symbols]
        if kept:
            row[num_symbols - len(kept) :] = torch.tensor(kept)
    return out
