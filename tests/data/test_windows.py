# SPDX-License-Identifier: Apache-2.0
"""Rows of files too large for memory: shuffled in windows of blocks, shared without overlap."""

from __future__ import annotations

import numpy as np
import pytest

from moeapps.data.windows import WindowSampler

BLOCKS = [7, 30, 1, 12, 25, 25, 9, 40, 3, 18]
ENDS = np.cumsum(BLOCKS)


def block_of(rows: list[int]) -> list[int]:
    return np.searchsorted(ENDS, rows, side="right").tolist()


def test_one_share_gives_every_row_once_but_for_the_last_incomplete_batch() -> None:
    sampler = WindowSampler(BLOCKS, 8, window=3)
    batches = list(sampler)

    rows = [row for batch in batches for row in batch]
    assert len(batches) == len(sampler) == sum(BLOCKS) // 8
    assert {len(batch) for batch in batches} == {8}
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(sum(BLOCKS)))


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (1, 3), (2, 2), (3, 1)])
def test_shares_are_disjoint_and_equally_long(world: int, workers: int) -> None:
    made = [
        list(WindowSampler(BLOCKS, 5, window=2, rank=rank, world_size=world, num_workers=workers))
        for rank in range(world)
    ]

    rows = [row for batches in made for batch in batches for row in batch]
    assert len({len(batches) for batches in made}) == 1
    assert len(set(rows)) == len(rows)
    shares = world * max(1, workers)
    assert len(rows) >= sum(BLOCKS) - shares * 5


def test_a_worker_reads_few_blocks_at_a_time_and_only_blocks_of_its_own() -> None:
    window, workers, blocks = 2, 2, [16] * 20
    batches = list(WindowSampler(blocks, 8, window=window, num_workers=workers))
    seen_by = []
    for worker in range(workers):
        of_worker = [sorted({row // 16 for row in batch}) for batch in batches[worker::workers]]
        # 2 blocks of 16 rows are 4 batches of 8: those touch no third block.
        for first in range(0, len(of_worker), 4):
            assert len({block for touched in of_worker[first : first + 4] for block in touched}) <= window
        seen_by.append({block for touched in of_worker for block in touched})
    assert not seen_by[0] & seen_by[1]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, **options: bool) -> list[list[int]]:
        sampler = WindowSampler(BLOCKS, 8, seed=seed, **options)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) != order(1, 2)
    assert order(0, 1, repeat=True) == order(0, 5, repeat=True) == order(0, 0)


def test_rows_are_shuffled_inside_a_window_and_blocks_among_windows() -> None:
    batches = list(WindowSampler([50] * 10, 50, window=2, seed=3))

    assert all(batch != sorted(batch) for batch in batches)
    assert [batch[0] // 50 for batch in batches] != list(range(10))


@pytest.mark.parametrize("workers", [0, 3])
def test_a_resumed_run_continues_with_the_steps_it_would_have_seen(workers: int) -> None:
    whole = WindowSampler(BLOCKS, 6, seed=2, num_workers=workers)
    whole.set_epoch(4)
    resumed = WindowSampler(BLOCKS, 6, seed=2, num_workers=workers)
    resumed.load_state_dict({"epoch": 4, "start": 5})

    assert list(resumed) == list(whole)[5:]


def test_fewer_rows_than_a_batch_make_one_short_batch() -> None:
    assert [sorted(batch) for batch in WindowSampler([2, 3], 8)] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("options", "text"),
    [({"window": 0}, "window=0"), ({"world_size": 4, "num_workers": 2}, "5 rows cannot be shared by 4 processes")],
)
def test_wrong_numbers_are_told(options: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        WindowSampler([2, 3], 1, **options)
