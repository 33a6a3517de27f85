# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tasks.point_cloud.nets import tap_blocks
from tasks.point_cloud.nets.sparse_conv import SubmanifoldConv3d, neighbour_table, submanifold_conv
from tests.moe.derivatives_common import apart, derivatives


def sparse_grid(side: int = 6, num: int = 60) -> torch.Tensor:
    cells = torch.cartesian_prod(*[torch.arange(side)] * 3)
    return cells[torch.randperm(len(cells))[:num]]


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_equals_conv3d_with_zero_padding_at_occupied_cells(kernel_size) -> None:
    grid = sparse_grid()
    x = torch.randn(len(grid), 3, dtype=torch.float64)
    conv = SubmanifoldConv3d(3, 4, kernel_size).double()
    dense = x.new_zeros(3, 6, 6, 6)
    dense[:, grid[:, 0], grid[:, 1], grid[:, 2]] = x.T
    weight = conv.weight.view(kernel_size, kernel_size, kernel_size, 3, 4).permute(4, 3, 0, 1, 2)

    y = conv(x, neighbour_table(grid, torch.zeros(len(grid), dtype=torch.int64), kernel_size))

    expected = F.conv3d(dense[None], weight, conv.bias, padding=kernel_size // 2)[0]
    torch.testing.assert_close(y, expected[:, grid[:, 0], grid[:, 1], grid[:, 2]].T)


def test_with_only_the_centre_weight_it_is_a_linear_map() -> None:
    grid = sparse_grid()
    conv = SubmanifoldConv3d(3, 5).double()
    torch.nn.init.zeros_(conv.weight)
    torch.nn.init.normal_(conv.weight[13])
    x = torch.randn(len(grid), 3, dtype=torch.float64)

    y = conv(x, neighbour_table(grid, torch.zeros(len(grid), dtype=torch.int64), 3))

    torch.testing.assert_close(y, x @ conv.weight[13] + conv.bias)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_neighbours_are_all_pairs_at_the_offset_within_a_scan(kernel_size) -> None:
    grid, batch = torch.cat([sparse_grid(), sparse_grid(4, 30)]), torch.arange(90).ge(60).long()
    reach = kernel_size // 2

    table = neighbour_table(grid, batch, kernel_size)

    offset = (grid[None] - grid[:, None]).where(batch[None, :, None] == batch[:, None, None], 99)
    for tap in range(kernel_size**3):
        wanted = torch.tensor([tap // kernel_size**2, tap // kernel_size % kernel_size, tap % kernel_size]) - reach
        expected = (offset == wanted).all(dim=2).nonzero().tolist()
        if tap != kernel_size**3 // 2:
            assert sorted(torch.stack(table.taps[tap], dim=1).tolist()) == expected


def test_centre_of_a_table_equals_the_smaller_table() -> None:
    grid, batch = sparse_grid(), torch.zeros(60, dtype=torch.int64)

    cut, built = neighbour_table(grid, batch, 5).centre(3), neighbour_table(grid, batch, 3)

    assert cut.taps.keys() == built.taps.keys()
    for tap, pair in built.taps.items():
        assert torch.equal(torch.stack(cut.taps[tap]), torch.stack(pair))


def test_scans_never_convolve_with_one_another_and_gradients_are_exact() -> None:
    grid, batch = sparse_grid(3, 20).repeat(2, 1), torch.arange(40).ge(20).long()
    x = torch.randn(40, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(27, 2, 3, dtype=torch.float64, requires_grad=True)
    table = neighbour_table(grid, batch, 3)

    assert torch.autograd.gradcheck(lambda a, b: submanifold_conv(a, b, table), (x, weight))
    (grad,) = torch.autograd.grad(submanifold_conv(x, weight, table)[:20].sum(), x)
    assert grad[20:].eq(0).all()


def test_derivatives_of_a_kernel_used_twice_are_those_of_conv3d_to_second_order() -> None:
    side = 3
    grid = torch.cartesian_prod(*[torch.arange(side)] * 3)
    table = neighbour_table(grid, torch.zeros(len(grid), dtype=torch.int64), 3)
    x = torch.randn(len(grid), 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(27, 2, 2, dtype=torch.float64, requires_grad=True)

    def dense(x: torch.Tensor) -> torch.Tensor:
        kernel = (weight * x.mean()).permute(2, 1, 0).reshape(2, 2, 3, 3, 3)
        y = F.conv3d(x.T.reshape(1, 2, side, side, side), kernel, padding=1)
        return y.reshape(2, -1).T

    def ours(x: torch.Tensor) -> torch.Tensor:
        return submanifold_conv(x, weight * x.mean(), table)

    found = derivatives(ours(ours(x).tanh()), [x, weight])
    wanted = derivatives(dense(dense(x).tanh()), [x, weight])

    for some, expected in zip(found, wanted, strict=True):
        assert apart(some, expected) < 1e-9
    t = torch.ones_like(x)
    tangents = [torch.func.jvp(way, (x.detach(),), (t,))[1] for way in (ours, dense)]
    assert apart(tangents[:1], tangents[1:]) < 1e-12


def test_the_edge_of_one_axis_does_not_touch_the_next() -> None:
    grid = torch.tensor([[0, 0, 65535], [0, 1, 0], [0, 65535, 65535], [1, 0, 0]])

    table = neighbour_table(grid, torch.zeros(4, dtype=torch.int64), 5)

    assert all(len(out) == 0 for tap, (out, _) in table.taps.items() if tap not in (42, 82))
    assert sum(len(out) for out, _ in table.taps.values()) == 2  # (0,1,0) and (1,0,0) are diagonal neighbours


def test_frozen_weights_or_inputs_get_no_gradient_and_the_other_is_unchanged() -> None:
    grid, batch = sparse_grid(), torch.zeros(60, dtype=torch.int64)
    table = neighbour_table(grid, batch, 3)
    x, weight = torch.randn(60, 2, dtype=torch.float64), torch.randn(27, 2, 3, dtype=torch.float64)
    full = torch.autograd.grad(
        submanifold_conv(x.requires_grad_(), weight.requires_grad_(), table).square().sum(), (x, weight)
    )

    (only_x,) = torch.autograd.grad(submanifold_conv(x, weight.detach(), table).square().sum(), x)
    (only_weight,) = torch.autograd.grad(submanifold_conv(x.detach(), weight, table).square().sum(), weight)

    torch.testing.assert_close((only_x, only_weight), full)


def test_autocast_runs_in_half_precision_and_keeps_the_answer() -> None:
    grid, batch = sparse_grid(), torch.zeros(60, dtype=torch.int64)
    table, conv = neighbour_table(grid, batch, 3), SubmanifoldConv3d(4, 4)
    x = torch.randn(60, 4)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x, table)
    y.sum().backward()

    torch.testing.assert_close(y.float(), conv(x, table), rtol=0.05, atol=0.05)
    assert conv.weight.grad is not None
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kernel_size", [0, 2, 4])
def test_even_kernels_are_an_error(kernel_size) -> None:
    with pytest.raises(ValueError, match="odd"):
        SubmanifoldConv3d(1, 1, kernel_size)


def three_scans() -> tuple[torch.Tensor, torch.Tensor]:
    """Cells of three scans, the last of a single voxel without neighbours, in an order of no meaning."""
    grid = torch.cat([sparse_grid(5, 60), sparse_grid(4, 30), torch.full((1, 3), 9)])
    return grid, torch.tensor([0] * 60 + [1] * 30 + [2])


@pytest.mark.parametrize("bits", [2, 4, 12])  # blocks of 4 and 16 voxels, and one of them all
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_blocks_of_any_size_convolve_as_a_loop_over_all_pairs(
    monkeypatch: pytest.MonkeyPatch, kernel_size: int, bits: int
) -> None:
    monkeypatch.setattr(tap_blocks, "_BLOCK_BITS", bits)
    grid, batch = three_scans()
    taps = kernel_size**3
    x = torch.randn(91, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(taps, 16, 17, dtype=torch.float64, requires_grad=True)
    offsets = torch.cartesian_prod(*[torch.arange(kernel_size) - kernel_size // 2] * 3)
    apart_NN3 = (grid[None] - grid[:, None]).where(batch[None, :, None] == batch[:, None, None], 99)
    adjacency_TNN = (apart_NN3[None] == offsets[:, None, None]).all(dim=3).double()

    found = submanifold_conv(x, weight, neighbour_table(grid, batch, kernel_size))
    expected = torch.einsum("tij,jc,tco->io", adjacency_TNN, x, weight)

    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for wanted in ([x, weight], [x], [weight]):
        torch.testing.assert_close(
            torch.autograd.grad(found, wanted, grad, retain_graph=True),
            torch.autograd.grad(expected, wanted, grad, retain_graph=True),
        )


def test_gradients_of_blocks_are_exact_and_so_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap_blocks, "_BLOCK_BITS", 2)
    grid = sparse_grid(3, 9)
    table = neighbour_table(grid, torch.zeros(9, dtype=torch.int64), 3)
    x = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(27, 16, 16, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda a, b: submanifold_conv(a, b, table), (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda a, b: submanifold_conv(a, b, table), (x, weight), fast_mode=True)


@pytest.mark.parametrize("num", [0, 1])
def test_wide_features_without_a_neighbour_meet_the_centre_alone(num: int) -> None:
    conv = SubmanifoldConv3d(16, 16).double()
    x = torch.randn(num, 16, dtype=torch.float64, requires_grad=True)

    y = conv(x, neighbour_table(torch.zeros(num, 3, dtype=torch.int64), torch.zeros(num, dtype=torch.int64), 3))
    y.sum().backward()

    torch.testing.assert_close(y, x @ conv.weight[13] + conv.bias)
    assert conv.weight.grad is not None
    assert conv.weight.grad[[t for t in range(27) if t != 13]].eq(0).all()


def test_wide_features_in_half_precision_keep_the_answer() -> None:
    grid, batch = sparse_grid(), torch.zeros(60, dtype=torch.int64)
    table, conv = neighbour_table(grid, batch, 3), SubmanifoldConv3d(16, 16)
    x = torch.randn(60, 16)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x, table)
    y.sum().backward()

    torch.testing.assert_close(y.float(), conv(x, table), rtol=0.05, atol=0.05)
    assert conv.weight.grad is not None
    assert conv.weight.grad.isfinite().all()
