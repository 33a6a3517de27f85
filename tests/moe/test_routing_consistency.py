# SPDX-License-Identifier: Apache-2.0
"""Routing consistency by hand: how well experts of a segment are foretold, and how often a cache holds them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeapps.moe.metrics import segment_cache_hits, segment_routing_performance


def uses(*rows: str, experts: int = 4) -> Tensor:
    """A table [N, E] from the experts that each row names."""
    table = torch.zeros(len(rows), experts)
    for n, row in enumerate(rows):
        for expert in row:
            table[n, int(expert)] = 1
    return table


def test_segments_that_keep_their_experts_are_covered_fully() -> None:
    assert float(segment_routing_performance(uses(*["02"] * 9), 4)) == 1
    assert float(segment_routing_performance(torch.ones(9, 3), 9)) == 1
    assert float(segment_routing_performance(uses(*"012301230"), 1)) == 1  # one row is always covered


def test_coverage_by_hand() -> None:
    """Rows 0 0 1: segments of two hold (2, 0) and (1, 1) uses. t=1: 4 of 3x2 said and 4 used; t=2: 2 of 2, 4 used."""
    table = uses("0", "0", "1", experts=3)
    assert float(segment_routing_performance(table, 2)) == pytest.approx(2 * 4 / (6 + 4))

    each = segment_routing_performance(table, 2, per_expert=True)
    assert each[:2].tolist() == pytest.approx([2 * 3 / (4 + 3), 2 * 1 / (2 + 1)])
    assert bool(each[2].isnan())  # never used: not defined, not 0


def test_coverage_falls_to_the_share_of_an_expert_where_routing_forgets() -> None:
    forgetful = torch.zeros(4000, 8).scatter(1, torch.randint(0, 8, (4000, 1)), 1)
    sticky = torch.zeros(4000, 8).scatter(1, torch.randint(0, 8, (40, 1)).repeat_interleave(100, 0), 1)

    assert float(segment_routing_performance(forgetful, 256)) == pytest.approx(2 * 0.125 / 1.125, abs=0.06)
    assert float(segment_routing_performance(sticky, 16)) > 0.9


def test_segments_stay_within_a_sequence() -> None:
    apart = torch.stack([uses(*["0"] * 4), uses(*["1"] * 4)])
    assert float(segment_routing_performance(apart, 4)) == 1
    assert float(segment_routing_performance(apart.flatten(0, 1), 4)) < 1


def test_cache_hits_by_hand() -> None:
    """0 1 0 2 0, the present and the next row known. One place: only the filling (0) is no miss, and nothing returns.

    Two places: 0 and 1 fill them; 0 hits; 2 goes in for 1, as 0 is needed next; 0 hits. Miss: 2.
    """
    table = uses(*"01020", experts=3)
    assert segment_cache_hits(table, 2, [1, 2, 3]).tolist() == pytest.approx([1 / 5, 4 / 5, 1])


def test_a_cache_that_knows_nothing_is_least_recently_used_and_one_that_knows_the_next_row_does_better() -> None:
    """Three experts in turn, two places: the oldest is always the next. Knowing the next saves every second use."""
    table = uses(*["0", "1", "2"] * 10, experts=3)
    blind = float(segment_cache_hits(table, 0, [2]))
    seeing = float(segment_cache_hits(table, 2, [2]))

    assert blind == pytest.approx(2 / 30)
    assert seeing == pytest.approx(1 - 14 / 30)


def test_all_experts_of_a_row_are_looked_up_before_any_is_loaded() -> None:
    """Two places, rows of two: 01 fills them; 02 finds 0, loads 2 for 1; 12 finds 2 only, whatever was loaded first."""
    table = uses("01", "02", "12", experts=3)
    assert float(segment_cache_hits(table, 0, [2])) == pytest.approx(4 / 6)


def test_consistency_refuses_what_it_cannot_measure_and_is_nan_without_uses() -> None:
    for length in (0, 6):
        with pytest.raises(ValueError, match=f"length={length}, but it must be from 1 to the 5 rows"):
            segment_routing_performance(uses(*"01230"), length)
    with pytest.raises(ValueError, match=r"shape \(4,\): give \[N, E\]"):
        segment_routing_performance(torch.ones(4), 2)
    for sizes in ([], [0], [5]):
        with pytest.raises(ValueError, match="from 1 to the 4 experts"):
            segment_cache_hits(uses(*"012"), 2, sizes)
    nothing = torch.zeros(6, 4)
    assert bool(segment_routing_performance(nothing, 2).isnan())
    assert bool(segment_cache_hits(nothing, 2, [1, 2]).isnan().all())
