# SPDX-License-Identifier: Apache-2.0
"""Domains in blocks are mixed as others are, and read block by block."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from moeapps.data.mixed_windows import MixedWindows, _counts, sampler_of
from moeapps.data.mixing import DomainMixing, MixingSampler

DOMAINS = [[7, 30, 1, 12], [5, 5, 5], [40, 3, 18, 22, 9]]
SIZES = [50, 15, 92]
MODES: tuple[DomainMixing, ...] = ("concat", "balanced", "one_domain")


def domain_of(rows: list[int]) -> list[int]:
    return np.searchsorted(np.cumsum(SIZES), rows, side="right").tolist()


def test_concat_gives_every_row_once_but_for_the_last_incomplete_batch() -> None:
    batches = list(MixedWindows(DOMAINS, 8, window=2))

    rows = [row for batch in batches for row in batch]
    assert len(batches) == 157 // 8
    assert {len(batch) for batch in batches} == {8}
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(157))


def test_concat_mixes_domains_in_proportion_from_the_first_batches_on() -> None:
    large = [[100] * 60, [100] * 20]
    rows = [row for batch in list(MixedWindows(large, 50))[:40] for row in batch]

    assert 1500 - 150 < sum(row < 6000 for row in rows) < 1500 + 150  # 2000 rows, 3 of 4; 150 are ten deviations


def test_rows_beyond_what_numpy_draws_at_once_are_drawn_in_proportion() -> None:
    left, drawn = np.array([900_000_000, 300_000_000, 3]), np.random.default_rng(0)
    counts = sum(_counts(left, 60_000, drawn) for _ in range(20))
    assert counts.sum() == 1_200_000
    assert counts[0] == pytest.approx(900_000, abs=5 * 475)  # five deviations of a binomial
    assert len(next(iter(MixedWindows([[10**6] * 700] * 2, 8, window=1)))) == 8


def test_balanced_holds_each_domain_once_in_every_run_of_rows() -> None:
    rows = [row for batch in MixedWindows(DOMAINS, 9, window=2, mode="balanced") for row in batch]

    assert len(rows) == 157 // 9 * 9
    of = domain_of(rows)
    assert all(sorted(of[i : i + 3]) == [0, 1, 2] for i in range(0, len(of) - 2, 3))
    small = Counter(row for row in rows if 50 <= row < 65)
    assert max(small.values()) - min(small.values()) <= 1  # pass after pass
    assert len({row for row in rows if row < 50}) >= 49


def test_one_domain_has_whole_batches_of_one_domain_each_row_once() -> None:
    batches = list(MixedWindows(DOMAINS, 8, window=2, mode="one_domain"))

    assert all(len(set(domain_of(batch))) == 1 for batch in batches)
    assert Counter(domain_of(batch)[0] for batch in batches) == {0: 6, 1: 1, 2: 11}
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("mode", MODES)
def test_processes_see_what_one_with_the_joint_batch_sees(mode: DomainMixing) -> None:
    whole = list(MixedWindows(DOMAINS, 6, window=2, mode=mode, seed=3))
    parts = [list(MixedWindows(DOMAINS, 2, window=2, mode=mode, seed=3, rank=r, world_size=3)) for r in range(3)]

    assert [sorted(a + b + c) for a, b, c in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]
    assert len(MixedWindows(DOMAINS, 6, window=2, mode=mode)) == len(whole)


@pytest.mark.parametrize("mode", MODES)
def test_order_is_a_function_of_seed_and_epoch_and_goes_on_at_any_step(mode: DomainMixing) -> None:
    def order(seed: int, epoch: int, start: int = 0, **options: bool) -> list[list[int]]:
        sampler = MixedWindows(DOMAINS, 4, window=2, seed=seed, mode=mode, **options)
        sampler.load_state_dict({"epoch": epoch, "start": start})
        return list(sampler)

    assert order(1, 2) == order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert order(1, 2, start=5) == order(1, 2)[5:]
    assert order(1, 2, repeat=True) == order(1, 0, repeat=True) == order(1, 0)


def test_few_blocks_are_touched_at_a_time() -> None:
    window, blocks = 3, [16] * 30
    batches = list(MixedWindows([blocks, blocks], 8, window=window))
    for domain in range(2):
        rows = [row for batch in batches for row in batch if row // 480 == domain]
        for first in range(0, len(rows) - 47, 48):  # a window has 48 rows
            assert len({row // 16 for row in rows[first : first + 48]}) == window


def test_fewer_rows_than_a_batch_are_one_batch_of_equal_shares() -> None:
    shares = [list(MixedWindows([[3], [2]], 8, rank=r, world_size=2)) for r in range(2)]

    assert [len(batches) for batches in shares] == [1, 1]
    assert [len(batches[0]) for batches in shares] == [2, 2]


def test_only_data_in_blocks_is_read_in_windows() -> None:
    class Blocks(list[int]):
        sizes, window = (3, 4), 2

    assert type(sampler_of([[0] * 5, [0] * 6], 2, mode="concat")) is MixingSampler
    mixed = sampler_of([Blocks([0] * 7), [0] * 6], 2, mode="concat")
    assert isinstance(mixed, MixedWindows)
    assert (mixed.sizes, mixed.window) == ([7, 6], 2)
    with pytest.raises(ValueError, match="window=0 is not allowed; use 1 or more blocks"):
        MixedWindows([[3]], 1, window=0)
