# SPDX-License-Identifier: Apache-2.0
"""The geometry of a batch at one resolution: curve orders, attention runs, neighbour tables, parents.

Everything here is integer arithmetic on voxel coordinates, done once per level and forward pass and shared by all
blocks of that level, encoder and decoder alike.

Shape legend: N voxels, P attention runs, K voxels in a run, B scans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tasks.point_cloud.nets.serialization import MAX_DEPTH, Order, encode
from tasks.point_cloud.nets.sparse_conv import NeighbourTable, neighbour_table


@dataclass(frozen=True)
class Patches:
    """Runs of at most K voxels along a curve, cut within each scan.

    The last run of a scan with n > K voxels is filled up with the voxels just before it, so it is the window of the
    scan's last K voxels; only its own voxels answer from it. A scan with n <= K voxels is one run.

    Attributes:
        index_PK: int64 voxel in each slot of each run.
        mask_PK: bool, False in the unused slots of short scans; None when every slot is used.
        slot_N: int64 flat slot (run * K + place) in which each voxel's own answer is found.
    """

    index_PK: Tensor
    mask_PK: Tensor | None
    slot_N: Tensor


def cut_patches(order_N: Tensor, num_B: Tensor, patch_size: int) -> Patches:
    """Cut an order into attention runs.

    Args:
        order_N: int64 voxels along the curve, scan after scan.
        num_B: int64 voxels of each scan (zero is allowed).
        patch_size: K >= 1, voxels in a run; the same for every scan, whatever the others hold.

    Source: Pointcept/Pointcept ``point_transformer_v3`` (padding by the previous run). There, without the flash
    kernel, the size shrinks to the smallest scan of the batch; here it does not.
    """
    start_B = num_B.cumsum(0) - num_B
    runs_B = (num_B + patch_size - 1) // patch_size
    scan_P = torch.repeat_interleave(runs_B)
    place_P = torch.arange(len(scan_P), device=order_N.device) - (runs_B.cumsum(0) - runs_B)[scan_P]
    first_P = torch.minimum(place_P * patch_size, (num_B[scan_P] - patch_size).clamp(min=0))
    width = min(patch_size, int(num_B.max())) if len(num_B) else 0
    slot_PK = first_P[:, None] + torch.arange(width, device=order_N.device)
    mask_PK = slot_PK < num_B[scan_P, None]
    slot_PK = torch.minimum(slot_PK, num_B[scan_P, None] - 1) + start_B[scan_P, None]

    scan_N = torch.repeat_interleave(num_B)
    rank_N = torch.arange(len(order_N), device=order_N.device) - start_B[scan_N]
    run_N = (runs_B.cumsum(0) - runs_B)[scan_N] + rank_N // patch_size
    slot_N = torch.empty_like(order_N)
    slot_N[order_N] = run_N * width + rank_N - first_P[run_N]
    return Patches(order_N[slot_PK], None if bool(mask_PK.all()) else mask_PK, slot_N)


@dataclass(eq=False)
class Level:
    """One resolution of a batch of voxelised scans; rows are in z-order, scan after scan.

    Attributes:
        grid_N3: int64 voxel coordinates, each scan from its own corner.
        batch_N: int64 scan of each voxel, ascending.
        code_N: int64 z-codes, ascending; the scan's number above ``3 * depth`` bits.
        depth: levels of the octree left.
        orders: for each curve the int64 [N] rows in its order.
        num_B: int64 voxels of each scan.
        group_N: int64 domain of each voxel for tables and metrics, or None. The network itself never reads it.
        parent_N: int64 row of the voxel that holds each one at the next coarser level; set by `coarser`.
        count_parent: int64 voxels in each parent; set by `coarser`.
    """

    grid_N3: Tensor
    batch_N: Tensor
    code_N: Tensor
    depth: int
    orders: dict[Order, Tensor]
    num_B: Tensor
    group_N: Tensor | None = None
    parent_N: Tensor | None = None
    count_parent: Tensor | None = None
    _patches: dict[tuple[Order, int], Patches] = field(default_factory=dict)
    _tables: dict[int, NeighbourTable] = field(default_factory=dict)

    def patches(self, order: Order, patch_size: int) -> Patches:
        """Attention runs along ``order``, cut on first use."""
        key = (order, patch_size)
        if key not in self._patches:
            self._patches[key] = cut_patches(self.orders[order], self.num_B, patch_size)
        return self._patches[key]

    def neighbours(self, kernel_size: int) -> NeighbourTable:
        """Pairs of adjacent voxels, found on first use; a table of a larger kernel is reused by taking its centre."""
        if kernel_size not in self._tables:
            wider = [size for size in self._tables if size > kernel_size]
            self._tables[kernel_size] = (
                self._tables[min(wider)].centre(kernel_size)
                if wider
                else neighbour_table(self.grid_N3, self.batch_N, kernel_size)
            )
        return self._tables[kernel_size]

    def coarser(self) -> Level:
        """The level of half the resolution: voxels with equal ``code >> 3`` become one. Needs no sorting."""
        code, parent_N, count = torch.unique_consecutive(self.code_N >> 3, return_inverse=True, return_counts=True)
        first = count.cumsum(0) - count
        self.parent_N, self.count_parent = parent_N, count
        batch = self.batch_N[first]
        return Level(
            grid_N3=self.grid_N3[first] >> 1,
            batch_N=batch,
            code_N=code,
            depth=self.depth - 1,
            # Children of one voxel are consecutive along every curve, so dropping repeats keeps the curve's order.
            orders={name: torch.unique_consecutive(parent_N[order]) for name, order in self.orders.items()},
            num_B=torch.bincount(batch, minlength=len(self.num_B)),
            group_N=None if self.group_N is None else self.group_N[first],
        )


@torch.no_grad()
def finest_level(
    grid_N3: Tensor,
    batch_N: Tensor,
    num_scans: int,
    orders: Sequence[Order],
    group_N: Tensor | None = None,
    depth: int = MAX_DEPTH,
) -> tuple[Level, Tensor]:
    """Put a batch of scans in z-order.

    Args:
        grid_N3: int64 voxel coordinates in [0, 2**depth), each scan from its own corner, one row per occupied voxel.
        batch_N: int64 scan of each row.
        num_scans: B.
        orders: the curves that attention will follow.
        group_N: int64 domain of each row, or None.
        depth: levels of the curves, at most 16.

    Returns:
        The level, and ``row_N``: row i of the input is row ``row_N[i]`` of the level.

    Raises:
        ValueError: Coordinates out of range, or two rows in one voxel.
    """
    code_N, permutation_N = torch.sort(encode(grid_N3, batch_N, "z", depth))
    if bool((code_N[1:] == code_N[:-1]).any()):
        raise ValueError("two rows share a voxel: keep one row per voxel and point `inverse` at it")
    grid_N3, batch_N = grid_N3[permutation_N], batch_N[permutation_N]
    level = Level(
        grid_N3=grid_N3,
        batch_N=batch_N,
        code_N=code_N,
        depth=depth,
        orders={
            name: torch.arange(len(code_N), device=code_N.device)
            if name == "z"
            else torch.argsort(encode(grid_N3, batch_N, name, depth))
            for name in orders
        },
        num_B=torch.bincount(batch_N, minlength=num_scans),
        group_N=None if group_N is None else group_N[permutation_N],
    )
    row_N = torch.empty_like(permutation_N)
    row_N[permutation_N] = torch.arange(len(row_N), device=row_N.device)
    return level, row_N
