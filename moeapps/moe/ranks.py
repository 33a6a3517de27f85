# SPDX-License-Identifier: Apache-2.0
"""Communication of processes: sums, and the rows of all of them. Without a process group nothing is sent."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Key = TypeVar("Key", bound=Hashable)
_BY_ITSELF: ContextVar[bool] = ContextVar("by_itself", default=False)


def is_spread() -> bool:
    """Whether several processes train together (not within `alone`)."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not _BY_ITSELF.get()


@contextmanager
def alone() -> Iterator[None]:
    """Let this process compute by itself, as process 0 does for figures and costs: nothing within waits for others."""
    before = _BY_ITSELF.set(True)
    try:
        yield
    finally:
        _BY_ITSELF.reset(before)


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


def objects_of_all_ranks(value: Any) -> list[Any]:
    """Give what each rank holds, rank after rank; ``value`` must be picklable and on the CPU. All must call this."""
    if not is_spread():
        return [value]
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, value)
    return held


def sums_of_all_ranks(sums: Mapping[Key, Tensor], device: torch.device | str = "cpu") -> dict[Key, Tensor]:
    """Give the sum of each entry over all ranks; a rank may lack entries: one that had no batch has none.

    Args:
        sums: tensors by name; an entry has one shape and type on all ranks that have it.
        device: where those that this rank lacks are made.

    Returns:
        The entries of all ranks, in one order on all of them.
    """
    if not is_spread():
        return dict(sums)
    kinds: dict[Key, tuple[torch.Size, torch.dtype]] = {}
    for told in objects_of_all_ranks({name: (value.shape, value.dtype) for name, value in sums.items()}):
        kinds |= {name: kind for name, kind in told.items() if name not in kinds}
    found = {}
    for name, (shape, dtype) in kinds.items():
        own = sums.get(name)
        found[name] = sum_over_ranks(torch.zeros(shape, dtype=dtype, device=device) if own is None else own)
    return found


@torch.no_grad()
def rows_by_rank(values: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Give the values of each rank: what a metric that keeps rows gathers them by (torchmetrics' ``dist_sync_fn``).

    torchmetrics' own needs one number of dimensions and one type on all ranks, but stands an empty float vector in for
    the state of a rank without rows. Here such a rank takes shape and type from the others.

    Args:
        values: any shape; sizes may differ from rank to rank.
        group: processes that call this together; None for all.

    Raises:
        ValueError: on all ranks, if those with values differ in dimensions or type.
    """
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (tuple(values.shape), values.dtype), group)
    filled = [(shape, dtype) for shape, dtype in told if 0 not in shape]
    if not filled:
        return [values] * len(told)
    if len({(len(shape), dtype) for shape, dtype in filled}) > 1:
        raise ValueError(f"processes hold rows that cannot be joined: shapes and types {told}; all must be alike")
    padded = values.new_zeros([max(sizes) for sizes in zip(*(shape for shape, _ in filled), strict=True)])
    padded = padded.to(filled[0][1])
    if values.numel():
        padded[_corner(values.shape)] = values
    parts = [torch.empty_like(padded) for _ in told]
    dist.all_gather(parts, padded, group)
    return [part[:0] if 0 in shape else part[_corner(shape)] for part, (shape, _) in zip(parts, told, strict=True)]


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(map(slice, shape))
