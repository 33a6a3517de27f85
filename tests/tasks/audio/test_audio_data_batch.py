# SPDX-License-Identifier: Apache-2.0
"""Batches of codes: where clips are cut, when they end, and what is left of their prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeapps.data.gather import GatherConcat
from tasks.audio.data.batch import NO_CODE, AudioBatch, CodeClips, mix, right_aligned
from tasks.audio.data.prompt import PADDING, UNKNOWN

LENGTHS = [3, 20, 5, 11, 8]
NUM_LABELS = 4


def clips(**options: Any) -> CodeClips:
    """Five clips of two books; the codes of a clip count up from 100 times its row, so that every place is known."""
    rows = [torch.arange(length) + 100 * row for row, length in enumerate(LENGTHS)]
    codes = torch.cat([torch.stack([row, row + 50]) for row in rows], 1).to(torch.int32)
    prompts = right_aligned([[3, 4, 5, 100 + row] for row in range(len(LENGTHS))], 6)
    ends = torch.tensor([True, True, False, True, True])
    settings = {"max_frames": 8, "num_labels": NUM_LABELS, **options}
    return CodeClips(codes, torch.tensor(LENGTHS), prompts, ends, **settings)


@pytest.mark.parametrize("train", [False, True])
def test_an_item_is_a_window_of_its_clip(train: bool) -> None:
    data = clips(train=train)
    for rows in ([0, 1, 2, 3, 4], [4, 4, 1], [0]):
        batch = data.batch(torch.tensor(rows))
        for place, row in enumerate(rows):
            length = min(LENGTHS[row], 8)
            item = batch.codes[place]
            start = int(item[0, 0]) - 100 * row
            assert 0 <= start <= LENGTHS[row] - length
            assert item[0, :length].tolist() == [100 * row + start + t for t in range(length)]
            assert torch.equal(item[1, :length], item[0, :length] + 50)
            assert (item[:, length:] == NO_CODE).all()
            assert bool(batch.ends[place]) == (start + length == LENGTHS[row] and row != 2)
        assert batch.lengths.tolist() == [min(LENGTHS[row], 8) for row in rows]
        assert batch.codes.shape[2] == max(batch.lengths.tolist())
        assert batch.index.tolist() == rows


def test_evaluation_cuts_a_clip_at_one_place_whatever_is_beside_it() -> None:
    data = clips()
    data.clock = SimpleNamespace(epoch=0)  # type: ignore[assignment]
    alone = {row: data.batch(torch.tensor([row])).codes[0] for row in range(5)}
    data.clock.epoch = 9  # type: ignore[union-attr]
    batch = data.batch(torch.tensor([3, 1, 4, 1, 0]))

    for item, row in zip(batch.codes, [3, 1, 4, 1, 0], strict=True):
        assert torch.equal(item[:, : alone[row].shape[1]], alone[row])


def test_training_cuts_follow_seed_and_epoch_and_nothing_else() -> None:
    def starts(seed: int, epoch: int) -> list[int]:
        data = clips(train=True, seed=seed, max_frames=2)
        data.clock = SimpleNamespace(epoch=epoch)  # type: ignore[assignment]
        torch.rand(3)  # a draw from the global stream changes nothing
        return data.batch(torch.ones(64, dtype=torch.int64)).codes[:, 0, 0].tolist()

    assert starts(0, 3) == starts(0, 3)
    assert starts(0, 3) != starts(0, 4)
    assert starts(0, 3) != starts(1, 3)


def test_training_cuts_are_spread_evenly() -> None:
    data = clips(train=True, max_frames=8)
    data.clock = SimpleNamespace(epoch=0)  # type: ignore[assignment]
    counts = torch.zeros(13)
    for epoch in range(40):
        data.clock.epoch = epoch  # type: ignore[union-attr]
        counts += (data.batch(torch.ones(65, dtype=torch.int64)).codes[:, 0, 0] - 100).bincount(minlength=13)

    # 2600 draws of 13 starts: 200 each; five standard deviations are 68
    assert ((counts - 200).abs() < 68).all(), counts


def test_numbers_are_those_of_splitmix64() -> None:
    # First outputs of the public generator for the seeds 0 and 1234567 (S. Vigna's splitmix64.c).
    known = {0: 0xE220A8397B1DCDAF, 1234567: 6457827717110365317}
    for seed, expected in known.items():
        assert int(mix(torch.tensor(seed))) % (1 << 64) == expected


def test_labels_are_dropped_in_training_alone_and_nothing_else_is() -> None:
    rows = torch.zeros(4000, dtype=torch.int64)
    kept = clips(label_dropout=0.25).batch(rows).prompt
    dropped = clips(label_dropout=0.25, train=True).batch(rows).prompt

    assert (kept == right_aligned([[3, 4, 5, 100]], 6)).all()
    assert torch.equal(dropped[:, [0, 1, 5]], kept[:, [0, 1, 5]])
    share = (dropped[:, 2:5] == UNKNOWN).double().mean(0)
    assert ((share - 0.25).abs() < 5 * (0.25 * 0.75 / 4000) ** 0.5).all()
    both = (dropped[:, 2:4] == UNKNOWN).all(1).double().mean()
    assert abs(both - 0.0625) < 5 * (0.0625 * 0.9375 / 4000) ** 0.5  # one does not depend on the other


def test_a_share_of_the_clips_keeps_them_as_they_are_and_is_part_of_a_larger_share() -> None:
    whole = clips()
    some, more = whole.part(0.4), whole.part(0.8)

    assert (len(some), len(more), len(whole.part(0.01))) == (2, 4, 1)
    assert set(some.rows.tolist()) < set(more.rows.tolist())
    for place, row in enumerate(more.rows.tolist()):
        assert int(more.batch(torch.tensor([place])).codes[0, 0, 0]) // 100 == row
    assert len(whole) == 5


def test_batches_of_several_domains_keep_the_order_that_was_asked_for() -> None:
    first, second = clips(domain=0, max_frames=4), clips(domain=3, max_frames=9)
    batch = GatherConcat([first, second]).__getitems__([6, 0, 9, 4])

    assert batch.domain.tolist() == [3, 0, 3, 0]
    assert batch.index.tolist() == [1, 0, 4, 4]
    assert batch.lengths.tolist() == [9, 3, 8, 4]
    assert (batch.codes[:, 0, 0] // 100).tolist() == [1, 0, 4, 4]


def test_a_batch_is_taken_apart_and_put_together() -> None:
    batch = clips().batch(torch.arange(5))
    again = AudioBatch.cat([batch.take(torch.tensor([i])) for i in range(5)])

    assert len(again) == 5
    for name in ("codes", "prompt", "ends", "domain", "index"):
        assert torch.equal(getattr(again, name), getattr(batch, name))
    assert again.to("cpu").device == torch.device("cpu")


def test_prompts_end_at_the_right_and_long_ones_lose_their_end() -> None:
    assert right_aligned([[7], [], [1, 2, 3, 4]], 3).tolist() == [[PADDING, PADDING, 7], [PADDING] * 3, [1, 2, 3]]
