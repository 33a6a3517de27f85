# SPDX-License-Identifier: Apache-2.0
"""Delay patterns by their definition, written step by step; what is to be predicted, counted by hand."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tasks.audio.nets.delay import NO_CODE, DelayPattern, audiocraft, unimoe
from tasks.audio.nets.language_model import IGNORED, step_targets

V = 7


def by_definition(delays: list[int], codes_KT: list[list[int]], ends: bool, num_steps: int) -> list[list[int]]:
    """One token after the other, as the text says: begin, codes, end, pad."""
    end, pad, begin = V, V + 1, V + 2
    books = []
    for delay, codes in zip(delays, codes_KT, strict=True):
        tokens = [begin] * (delay + 1) + list(codes) + ([end] if ends else [])
        books.append((tokens + [pad] * num_steps)[:num_steps])
    return books


def test_published_patterns() -> None:
    assert unimoe(12) == [0, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]  # HITsz-TMG/Uni-MoE, codec_delay_pattern
    assert audiocraft(4) == [0, 1, 2, 3]  # facebookresearch/audiocraft, the default of DelayedPatternProvider
    assert unimoe(1) == audiocraft(1) == [0]


@pytest.mark.parametrize("delays", [[0], [0, 0], [0, 1, 2], [0, 3, 1], unimoe(3)])
@pytest.mark.parametrize("num_frames", [0, 1, 2, 5])
def test_steps_are_those_of_the_definition_and_codes_come_back(delays: list[int], num_frames: int) -> None:
    pattern = DelayPattern(delays, V)
    codes = torch.randint(0, V, (2, len(delays), num_frames))
    length = pattern.num_steps(num_frames)
    for ends in (False, True):
        steps = pattern.apply(codes, torch.tensor([ends, ends]))
        assert steps.tolist() == [by_definition(delays, clip, ends, length) for clip in codes.tolist()]
        assert torch.equal(pattern.revert(steps), codes)
    assert length == num_frames + max(max(delays), 1) + 1


def test_shorter_clips_end_where_they_end() -> None:
    pattern = DelayPattern([0, 2], V)
    codes = torch.full((2, 2, 4), NO_CODE)
    codes[0, :, :4], codes[1, :, :1] = 3, 5
    steps = pattern.apply(codes, torch.tensor([True, True]))
    assert steps[1].tolist() == by_definition([0, 2], [[5], [5]], True, 7)
    assert torch.equal(pattern.revert(steps), codes)


def test_a_frame_that_lacks_a_book_is_no_frame_and_nothing_after_it_is() -> None:
    pattern = DelayPattern([0, 1], V)
    steps = pattern.apply(torch.randint(0, V, (1, 2, 4)), torch.tensor([True]))
    steps[0, 1, 3] = pattern.pad  # the second book of frame 1
    codes = pattern.revert(steps)
    assert (codes[0, :, 0] < V).all()
    assert (codes[0, :, 1:] == NO_CODE).all()


@pytest.mark.parametrize("delays", [[0, 1, 2], [0, 3, 4]])
def test_targets_are_all_codes_once_and_the_end_of_the_first_book(delays: list[int]) -> None:
    pattern = DelayPattern(delays, V)
    codes = torch.randint(0, V, (3, 3, 6))
    codes[1, :, 2:] = NO_CODE
    inputs, target = step_targets(pattern, codes, torch.tensor([True, True, False]))
    for clip, frames, ends in ((0, 6, True), (1, 2, True), (2, 6, False)):
        for book in range(3):
            wanted = codes[clip, book, :frames].tolist() + ([V] if ends and book == 0 else [])
            named = target[clip, :, book]
            assert named[named != IGNORED].tolist() == wanted
    # What is predicted from a step is what is read at the next one.
    for clip, step, book in product(range(3), range(inputs.shape[-1] - 1), range(3)):
        assert target[clip, step, book] in (IGNORED, inputs[clip, book, step + 1])


def test_patterns_that_mean_nothing_are_refused() -> None:
    for delays in ([], [1, 2], [0, -1]):
        with pytest.raises(ValueError, match="0 for the first"):
            DelayPattern(delays, V)
    with pytest.raises(ValueError, match="2 codebooks, but there are 3 delays"):
        DelayPattern([0, 1, 2], V).apply(torch.zeros(1, 2, 4, dtype=torch.int64), torch.tensor([True]))
