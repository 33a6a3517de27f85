# SPDX-License-Identifier: Apache-2.0
"""What the parts of `benchmarks.gpu` share: the device, its clock, its memory, and whether the host waits for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Work = Callable[[], object]
Report = dict[str, Any]
MOST_ERROR = 0.05
"""|got - want| / |want| that bfloat16 may cost: a router near a tie chooses differently, in few rows."""


@dataclass(frozen=True)
class Device:
    """Where a part runs; on the processor everything is small, and shows that the part runs and nothing else.

    Args:
        name: ``cuda`` or ``cpu``.
    """

    name: str

    @property
    def small(self) -> bool:
        """Whether sizes are small."""
        return self.name == "cpu"

    def size(self, whole: int, small: int) -> int:
        """One of two sizes."""
        return small if self.small else whole

    def wait(self) -> None:
        """Wait for all that was asked of the device."""
        if not self.small:
            torch.cuda.synchronize()

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 as ``trainer.precision: bf16-mixed`` has it."""
        return torch.autocast(self.name, torch.bfloat16)

    def milliseconds(self, *works: Work) -> list[float]:
        """Median milliseconds of several calls, alternated, after two rounds that warm up."""
        rounds = self.size(9, 1)
        times: list[list[float]] = [[] for _ in works]
        for turn in range(rounds + self.size(2, 0)):
            for work, found in zip(works, times, strict=True):
                self.wait()
                begun = time.perf_counter()
                work()
                self.wait()
                if turn >= self.size(2, 0):
                    found.append(1000 * (time.perf_counter() - begun))
        return [round(statistics.median(found), 3) for found in times]

    def peak(self, work: Work) -> int | None:
        """Bytes that a call needs beyond what is held before it; None on the processor."""
        if self.small:
            work()
            return None
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return int(torch.cuda.max_memory_allocated() - before)

    def wait_told(self, work: Work) -> str | None:
        """Where the second call of this takes a value of the device to the host, in torch's words; None: nowhere.

        The processor has nothing to wait for.
        """
        work()  # the first may initialise libraries
        if self.small:
            return None
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return None


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the Frobenius norm."""
    got, want = got.detach().float().cpu(), want.detach().float().cpu()
    return round(float((got - want).norm() / want.norm()), 5)


def learn(module: nn.Module, call: Callable[[], Tensor]) -> None:
    """One forward and backward pass with fresh gradients."""
    module.zero_grad(set_to_none=True)
    call().float().square().mean().backward()


def verdict(report: Report, *reasons: str | None) -> Report:
    """Add ``ok`` and, where it is false, ``reason``: what was found wrong, in a line."""
    wrong = [reason for reason in reasons if reason]
    return report | {"ok": not wrong} | ({"reason": "; ".join(wrong)} if wrong else {})


def too_far(error: float, what: str) -> str | None:
    """What to say of a relative error, if anything."""
    return None if error < MOST_ERROR else f"{what} differs by {error:.2%}, allowed are {MOST_ERROR:.0%}"
