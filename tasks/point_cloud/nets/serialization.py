# SPDX-License-Identifier: Apache-2.0
"""Space-filling curves: turn voxel coordinates into one integer, so that sorting it walks through space.

N voxels. A code is an int64: the scan's number in the high bits (sorting never mixes scans), 3 bits per level below.
For both curves ``code >> 3`` is the code of the parent cell (``grid >> 1`` at ``depth - 1``), which makes pooling an
integer shift.

Source: Wu et al. 2024, Point Transformer V3, section 4.1; Pointcept/Pointcept
``pointcept/models/point_transformer_v3`` (bit positions, depth limit); Hilbert curve after Skilling 2004, "Programming
the Hilbert curve". Differs from that code in one point: the depth is a constant here and not the bit length of the
largest coordinate of the batch, because the Hilbert curve turns with the depth and a scan would otherwise be ordered
differently depending on its batch mates.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Order = Literal["z", "z-trans", "hilbert", "hilbert-trans"]
ORDERS: tuple[Order, ...] = get_args(Order)
MAX_DEPTH = 16
"""Levels of the octree: 16 bits per axis, so 3 * 16 = 48 bits of curve leave 15 bits for the scan's number."""


def _check(grid_N3: Tensor, depth: int) -> None:
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"depth={depth}: a curve has 1 to {MAX_DEPTH} levels")
    if grid_N3.numel() and (int(grid_N3.min()) < 0 or int(grid_N3.max()) >> depth):
        low, high = int(grid_N3.min()), int(grid_N3.max())
        raise ValueError(
            f"voxel coordinates span {low} to {high}, but depth {depth} holds 0 to {2**depth - 1}: "
            "subtract each scan's minimum, crop the scan, or use a larger voxel size"
        )


def _spread(x: Tensor) -> Tensor:
    """Put bit i of a 16-bit number at bit 3i."""
    for shift, mask in ((16, 0xFF0000FF), (8, 0x00F00F00F00F), (4, 0x0C30C30C30C3), (2, 0x249249249249)):
        x = (x | (x << shift)) & mask
    return x


def z_encode(grid_N3: Tensor, depth: int = MAX_DEPTH) -> Tensor:
    """Interleave the bits of x, y, z: bit i goes to bits 3i+2, 3i+1, 3i.

    Args:
        grid_N3: int64 voxel coordinates in [0, 2**depth).
        depth: levels of the octree, 1 to 16.

    Returns:
        int64 [N], in [0, 8**depth).

    Raises:
        ValueError: A coordinate is negative or needs more than ``depth`` bits.

    Example:
        >>> z_encode(torch.tensor([[1, 0, 1], [0, 2, 0]])).tolist()
        [5, 16]
    """
    _check(grid_N3, depth)
    x, y, z = grid_N3.unbind(1)
    return (_spread(x) << 2) | (_spread(y) << 1) | _spread(z)


def hilbert_encode(grid_N3: Tensor, depth: int = MAX_DEPTH) -> Tensor:
    """Position along the 3-D Hilbert curve; neighbours on the curve are neighbours in space (one unit step).

    Skilling's transposed form: from the top bit down, undo the excess work (invert or exchange the lower bits), then
    Gray-decode; the result, three "transposed" words, is interleaved like a z-code.

    Args:
        grid_N3: int64 voxel coordinates in [0, 2**depth).
        depth: levels of the octree, 1 to 16. Depths that differ by a multiple of 3 give the same curve.

    Returns:
        int64 [N], in [0, 8**depth).

    Raises:
        ValueError: As `z_encode`.
    """
    _check(grid_N3, depth)
    if grid_N3.numel():  # levels that all voxels share in threes change nothing
        depth -= max(depth - max(int(grid_N3.max()).bit_length(), 1), 0) // 3 * 3
    axes = list(grid_N3.to(torch.int32).unbind(1))  # 16 bits at most
    for level in range(depth - 1, 0, -1):
        low = (1 << level) - 1
        for i in range(3):
            bit = (axes[i] >> level) & 1
            swap = (axes[0] ^ axes[i]) & low & (bit - 1)  # bit 0: exchange the lower bits of axis 0 and axis i
            axes[0] = axes[0] ^ swap ^ (low & -bit)  # bit 1: invert the lower bits of axis 0
            if i:
                axes[i] = axes[i] ^ swap
    axes[1] = axes[1] ^ axes[0]
    axes[2] = axes[2] ^ axes[1]
    parity = torch.zeros_like(axes[2])
    for level in range(depth - 1, 0, -1):
        parity = parity ^ (-((axes[2] >> level) & 1) & ((1 << level) - 1))
    x, y, z = ((axis ^ parity).long() for axis in axes)
    return (_spread(x) << 2) | (_spread(y) << 1) | _spread(z)


def encode(grid_N3: Tensor, batch_N: Tensor, order: Order, depth: int = MAX_DEPTH) -> Tensor:
    """Code of each voxel along one of the four curves, with the scan's number above the curve's bits.

    Args:
        grid_N3: int64 voxel coordinates in [0, 2**depth), counted from each scan's own corner.
        batch_N: int64 number of the scan each voxel belongs to.
        order: ``z``, ``hilbert``, or either with x and y exchanged (``-trans``).
        depth: levels of the octree, 1 to 16.

    Returns:
        int64 [N]: ``(batch << 3 * depth) | curve(grid)``.

    Raises:
        ValueError: Unknown order, coordinates out of range, or too many scans for the 63 bits of a code.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r}: choose from {', '.join(ORDERS)}")
    if batch_N.numel() and int(batch_N.max()) >> (63 - 3 * depth):
        raise ValueError(f"{int(batch_N.max()) + 1} scans in one batch, at most {2 ** (63 - 3 * depth)} fit a code")
    if order.endswith("-trans"):
        grid_N3 = grid_N3[:, [1, 0, 2]]
    curve_N = z_encode(grid_N3, depth) if order.startswith("z") else hilbert_encode(grid_N3, depth)
    return (batch_N << (3 * depth)) | curve_N
