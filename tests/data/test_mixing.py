# SPDX-License-Identifier: Apache-2.0
"""Laws of the batch samplers."""

from __future__ import annotations

import pytest

from moeapps.data.mixing import MixingSampler, ShardedBatches

SIZES = [5, 12, 7]
MODES = ["concat", "balanced", "one_domain"]


def domain_of(row: int) -> int:
    return sum(row >= bound for bound in (5, 17))


@pytest.mark.parametrize("mode", MODES)
def test_order_is_a_function_of_seed_and_epoch(mode: str) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = MixingSampler(SIZES, 4, mode=mode, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 3) == order(1, 3)
    assert order(1, 3) != order(1, 4)
    assert order(1, 3) != order(2, 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_length_is_the_number_of_batches(mode: str, batch_size: int) -> None:
    sampler = MixingSampler(SIZES, batch_size, mode=mode)

    assert len(sampler) == len(list(sampler))


@pytest.mark.parametrize("mode", ["concat", "one_domain"])
def test_no_row_comes_twice_in_an_epoch(mode: str) -> None:
    rows = [row for batch in MixingSampler(SIZES, 2, mode=mode) for row in batch]

    assert len(rows) == len(set(rows))
    assert set(rows) <= set(range(24))


def test_concat_with_fitting_batch_size_covers_every_row() -> None:
    assert sorted(row for batch in MixingSampler(SIZES, 4) for row in batch) == list(range(24))


def test_one_domain_batches_hold_one_domain() -> None:
    for batch in MixingSampler(SIZES, 3, mode="one_domain"):
        assert len({domain_of(row) for row in batch}) == 1


def test_balanced_batches_hold_every_domain_equally_often() -> None:
    for batch in MixingSampler(SIZES, 6, mode="balanced"):
        assert [sum(domain_of(row) == d for row in batch) for d in range(3)] == [2, 2, 2]


def test_balanced_repeats_a_small_domain_only_after_all_its_rows() -> None:
    rows = [row for batch in MixingSampler(SIZES, 24, mode="balanced") for row in batch if row < 5]

    assert len(rows) == 8
    assert set(rows[:5]) == set(range(5))


@pytest.mark.parametrize("mode", MODES)
def test_processes_share_exactly_the_rows_of_one_process(mode: str) -> None:
    alone = list(MixingSampler(SIZES, 4, mode=mode, seed=7))
    shared = [list(MixingSampler(SIZES, 2, mode=mode, seed=7, rank=rank, world_size=2)) for rank in range(2)]

    assert len(shared[0]) == len(shared[1]) == len(alone)
    for whole, left, right in zip(alone, *shared, strict=True):
        assert len(left) == len(right)
        assert sorted(whole) == sorted(left + right)


@pytest.mark.parametrize("mode", MODES)
def test_resumed_epoch_gives_the_remaining_batches_and_the_next_epoch_all(mode: str) -> None:
    whole = MixingSampler(SIZES, 2, mode=mode)
    whole.set_epoch(3)
    resumed = MixingSampler(SIZES, 2, mode=mode)
    resumed.load_state_dict({"epoch": 3, "start": 4})
    resumed.set_epoch(3)

    assert list(resumed) == list(whole)[4:]
    resumed.set_epoch(4)
    whole.set_epoch(4)
    assert list(resumed) == list(whole)


def test_repeating_gives_the_same_batches_in_every_epoch() -> None:
    sampler = MixingSampler(SIZES, 2, repeat=True)
    first = list(sampler)
    sampler.set_epoch(1)

    assert list(sampler) == first


def test_state_survives_a_round_trip() -> None:
    sampler = MixingSampler(SIZES, 2)
    sampler.load_state_dict({"epoch": 5, "start": 2})
    other = MixingSampler(SIZES, 2)
    other.load_state_dict(sampler.state_dict())

    assert list(other) == list(sampler)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"mode": "stirred"}, "concat, balanced, one_domain"),
        ({"sizes": [3, 0]}, "empty domain"),
        ({"sizes": []}, "empty domain"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"sizes": [1], "world_size": 2}, "fewer devices"),
    ],
)
def test_wrong_options_are_told(kwargs: dict[str, object], text: str) -> None:
    options: dict[str, object] = {"sizes": SIZES, "batch_size": 2, **kwargs}
    with pytest.raises(ValueError, match=text):
        MixingSampler(options.pop("sizes"), options.pop("batch_size"), **options)


@pytest.mark.parametrize("size", [1, 5, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_each_row_once_and_keeps_processes_in_step(size: int, world_size: int) -> None:
    shards = [ShardedBatches(size, 2, rank=rank, world_size=world_size) for rank in range(world_size)]
    counted = [row for shard in shards for i, batch in enumerate(shard) if not shard.is_padding(i) for row in batch]

    assert sorted(counted) == list(range(size))
    assert len({len(list(shard)) for shard in shards}) == 1
    assert all(len(list(shard)) == len(shard) for shard in shards)
