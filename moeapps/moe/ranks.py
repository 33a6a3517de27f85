# SPDX-License-Identifier: Apache-2.0
"""Communication of processes: sums, and the rows of all of them. Without a process group nothing is sent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def is_spread() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(counts_E: Tensor) -> Tensor:
    """Give the sum of ``counts_E`` over all ranks of the default process group; without one, the counts themselves."""
    if is_spread():
        counts_E = counts_E.clone()
        dist.all_reduce(counts_E)
    return counts_E


@torch.no_grad()
def rows_of_all_ranks(values_NX: Tensor) -> Tensor:
    """Give the rows of all ranks, rank after rank; without a process group the very same tensor.

    The k-th best score of the joint batch cannot be made of those of its parts, so the rows travel.

    Args:
        values_NX: [N, X]; N may differ from rank to rank and may be 0. All ranks must call this together.
    """
    if not is_spread():
        return values_NX
    own = torch.tensor([values_NX.shape[0]], device=values_NX.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    rows = [int(size) for size in sizes]
    padded = values_NX.new_zeros(max(rows), *values_NX.shape[1:])
    padded[: values_NX.shape[0]] = values_NX
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    return torch.cat([part[:num] for part, num in zip(parts, rows, strict=True)])
