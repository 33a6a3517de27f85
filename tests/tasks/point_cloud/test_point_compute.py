# SPDX-License-Identifier: Apache-2.0
"""Point-MoE's compute by hand, from its equations; neighbours and runs are counted here, pair by pair."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import Tensor

from moeapps.training.cost import count_flops
from tests.tasks.point_cloud.test_point_system import network

RUN, HEADS_TOGETHER = 128, 4  # voxels of a run; two products forward


def pairs(grids: list[Tensor], reach: int) -> int:
    """Ordered pairs of voxels of one scan at most ``reach`` apart along every axis, each voxel with itself included."""
    return sum(int(((g[:, None] - g[None]).abs().amax(2) <= reach).sum()) for g in grids)


def coarser(grids: list[Tensor]) -> list[Tensor]:
    return [(grid // 2).unique(dim=0) for grid in grids]


def block(grids: list[Tensor], dim: int) -> int:
    rows = sum(map(len, grids))
    runs = sum(math.ceil(len(grid) / RUN) for grid in grids)
    size = min(RUN, max(map(len, grids)))
    position = 2 * pairs(grids, 1) * dim * dim + 2 * rows * dim * dim
    attention = 2 * runs * size * dim * 3 * dim + HEADS_TOGETHER * runs * size * size * dim
    experts = 2 * rows * dim * 4 + 2 * (2 * rows * 3 * dim * dim)  # router of 4; two gated experts as wide as the block
    return position + attention + experts + 2 * rows * 2 * dim * 4 * dim


def by_hand(finest: list[Tensor]) -> int:
    """Encoder 32 - 64 - 96 of 1, 1, 2 blocks; decoder 64, 32 of one block each."""
    levels = [finest, coarser(finest), coarser(coarser(finest))]
    rows = [sum(map(len, level)) for level in levels]
    total = 2 * pairs(finest, 2) * 6 * 32
    total += block(levels[0], 32) + block(levels[1], 64) + 2 * block(levels[2], 96)
    total += 2 * rows[0] * 32 * 64 + 2 * rows[1] * 64 * 96  # pooling: projected before the maximum
    total += 2 * rows[2] * 96 * 64 + 2 * rows[1] * 64 * 64 + block(levels[1], 64)
    total += 2 * rows[1] * 64 * 32 + 2 * rows[0] * 32 * 32 + block(levels[0], 32)
    return total


@pytest.mark.parametrize("train", [False, True])
def test_point_moe_costs_what_its_equations_say(train: bool, make_batch: Any) -> None:
    batch = make_batch([900, 700], side=24)
    grids = [batch.grid[batch.batch == scan] for scan in (0, 1)]

    counted = count_flops(network().train(train), batch)
    assert counted == pytest.approx(by_hand(grids), rel=0.01)
