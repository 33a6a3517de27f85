# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from tasks.point_cloud.nets.geometry import cut_patches, finest_level
from tasks.point_cloud.nets.serialization import MAX_DEPTH, ORDERS, encode, hilbert_encode, z_encode


def cube(side: int) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(side)] * 3)


@pytest.mark.parametrize("depth", [3, 4, 5, MAX_DEPTH])
@pytest.mark.parametrize("curve", [z_encode, hilbert_encode])
def test_codes_of_a_full_cube_are_a_permutation_of_its_cells(curve, depth) -> None:
    codes = curve(cube(8), depth)

    assert torch.equal(codes.sort().values, torch.arange(512))


def test_every_third_bit_of_a_z_code_is_a_coordinate_over_all_16_bits() -> None:
    grid = torch.randint(0, 2**16, (5000, 3))

    bits = z_encode(grid)[:, None] >> torch.arange(48) & 1
    powers = 1 << torch.arange(16)

    assert torch.equal(torch.stack([(bits[:, first::3] * powers).sum(1) for first in (2, 1, 0)], dim=1), grid)


def test_z_code_places_bit_i_of_x_y_z_at_3i_plus_2_1_0() -> None:
    for i in range(16):
        grid = torch.eye(3, dtype=torch.int64) << i

        assert z_encode(grid).tolist() == [1 << (3 * i + 2), 1 << (3 * i + 1), 1 << (3 * i)]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_hilbert_curve_moves_by_one_unit_step(depth) -> None:
    grid = cube(2**depth)

    steps = grid[hilbert_encode(grid, depth).argsort()].diff(dim=0).abs().sum(dim=1)

    assert steps.eq(1).all()


@pytest.mark.parametrize("curve", [z_encode, hilbert_encode])
def test_code_shifted_by_three_bits_is_the_code_of_the_parent_cell(curve) -> None:
    grid = torch.randint(0, 2**10, (2000, 3))

    assert torch.equal(curve(grid, 10) >> 3, curve(grid >> 1, 9))


def test_transposed_orders_exchange_x_and_y() -> None:
    grid, batch = torch.randint(0, 64, (200, 3)), torch.zeros(200, dtype=torch.int64)

    for order in ("z", "hilbert"):
        assert torch.equal(encode(grid[:, [1, 0, 2]], batch, order), encode(grid, batch, f"{order}-trans"))


@pytest.mark.parametrize("order", ORDERS)
def test_sorting_codes_never_mixes_scans(order) -> None:
    grid, batch = torch.randint(0, 2**16, (900, 3)), torch.randint(0, 5, (900,))

    sorted_batch = batch[encode(grid, batch, order).argsort()]

    assert sorted_batch.diff().ge(0).all()


def test_coordinates_beyond_sixteen_bits_and_negative_ones_are_errors() -> None:
    batch = torch.zeros(1, dtype=torch.int64)

    with pytest.raises(ValueError, match="larger voxel size"):
        encode(torch.tensor([[0, 2**16, 0]]), batch, "z")
    with pytest.raises(ValueError, match="subtract each scan's minimum"):
        encode(torch.tensor([[0, -1, 0]]), batch, "hilbert")
    with pytest.raises(ValueError, match="1 to 16"):
        encode(torch.zeros(1, 3, dtype=torch.int64), batch, "z", depth=17)
    with pytest.raises(ValueError, match="choose from"):
        encode(torch.zeros(1, 3, dtype=torch.int64), batch, "peano")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scans in one batch"):
        encode(torch.zeros(1, 3, dtype=torch.int64), batch + 2**15, "z")


@pytest.mark.parametrize("sizes", [[1], [7], [8], [9], [16, 3, 0, 8, 25], [1, 1, 1]])
def test_every_voxel_owns_one_slot_and_shares_no_run_with_another_scan(sizes) -> None:
    size = 8
    num = torch.tensor(sizes)
    scan = torch.repeat_interleave(num)
    order = torch.cat(
        [start + torch.randperm(n) for start, n in zip((num.cumsum(0) - num).tolist(), sizes, strict=True)]
    )

    patches = cut_patches(order, num, size)

    assert torch.equal(patches.index_PK.flatten()[patches.slot_N], torch.arange(len(order)))
    assert patches.slot_N.unique().numel() == len(order)
    assert scan[patches.index_PK].eq(scan[patches.index_PK[:, :1]]).all()
    assert len(patches.index_PK) == sum(-(-n // size) for n in sizes)


@pytest.mark.parametrize(
    ("num", "runs"),
    [(3, [[0, 1, 2]]), (4, [[0, 1, 2, 3]]), (5, [[0, 1, 2, 3], [1, 2, 3, 4]]), (8, [[0, 1, 2, 3], [4, 5, 6, 7]])],
)
def test_last_run_borrows_the_voxels_before_it(num, runs) -> None:
    patches = cut_patches(torch.arange(num), torch.tensor([num]), 4)

    assert patches.index_PK.tolist() == runs
    assert patches.mask_PK is None


def test_short_scans_are_masked_and_do_not_shrink_the_runs_of_others() -> None:
    patches = cut_patches(torch.arange(13), torch.tensor([3, 10]), 8)

    assert patches.mask_PK is not None
    assert patches.mask_PK.sum(dim=1).tolist() == [3, 8, 8]
    assert patches.index_PK[1:].tolist() == [list(range(3, 11)), list(range(5, 13))]


def test_coarser_level_equals_a_level_built_from_the_parent_cells(make_batch) -> None:
    batch = make_batch([150, 1, 90])
    level, _ = finest_level(batch.grid, batch.batch, 3, ORDERS)

    coarse = level.coarser()

    rows = torch.unique(torch.cat([batch.batch[:, None], batch.grid >> 1], dim=1), dim=0)
    built, row = finest_level(rows[:, 1:], rows[:, 0], 3, ORDERS)
    assert torch.equal(coarse.grid_N3[row], rows[:, 1:])
    assert torch.equal(coarse.batch_N, built.batch_N)
    assert torch.equal(coarse.num_B, built.num_B)
    assert torch.equal(level.grid_N3 >> 1, coarse.grid_N3[level.parent_N])
    for order in ORDERS:
        codes = encode(coarse.grid_N3, coarse.batch_N, order, MAX_DEPTH - 1)
        assert torch.equal(coarse.orders[order], codes.argsort())


def test_two_rows_in_one_voxel_are_an_error() -> None:
    grid = torch.zeros(2, 3, dtype=torch.int64)

    with pytest.raises(ValueError, match="share a voxel"):
        finest_level(grid, torch.zeros(2, dtype=torch.int64), 1, ORDERS)
