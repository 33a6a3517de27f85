# SPDX-License-Identifier: Apache-2.0
"""Several processes as threads of one: what `moeapps.moe.ranks` sends is exchanged in memory, for laws that are quick.

Real processes are started in tests/test_ddp.py and tests/moe/test_ranks.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from torch import Tensor

from moeapps.moe import ranks

Result = TypeVar("Result")


class Threads:
    """Stands in for ``torch.distributed``; a rank that waits for one that never comes fails after some seconds."""

    def __init__(self, size: int) -> None:
        self.size, self.place = size, threading.local()
        self.barrier, self.held = threading.Barrier(size, timeout=20), [None] * size

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self, group: Any = None) -> int:
        return self.size

    def all_gather_object(self, found: list[Any], value: Any, group: Any = None) -> None:
        self.held[self.place.rank] = value
        self.barrier.wait()
        found[:] = self.held
        self.barrier.wait()

    def all_gather(self, found: list[Tensor], value: Tensor, group: Any = None) -> None:
        parts: list[Any] = [None] * self.size
        self.all_gather_object(parts, value)
        for place, part in zip(found, parts, strict=True):
            assert place.shape == part.shape
            assert place.dtype == part.dtype
            place.copy_(part)

    def all_reduce(self, value: Tensor) -> None:
        parts: list[Any] = [None] * self.size
        self.all_gather_object(parts, value.clone())
        value.copy_(sum(parts))


def in_processes(monkeypatch: pytest.MonkeyPatch, size: int, work: Callable[[int], Result]) -> list[Result]:
    """Return what ``work(rank)`` gives on each of ``size`` ranks, which run at once."""
    world = Threads(size)

    def one(rank: int) -> Result:
        world.place.rank = rank
        return work(rank)

    with monkeypatch.context() as patched, ThreadPoolExecutor(size) as pool:
        patched.setattr(ranks, "dist", world)
        return [future.result() for future in [pool.submit(one, rank) for rank in range(size)]]
