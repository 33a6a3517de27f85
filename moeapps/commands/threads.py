# SPDX-License-Identifier: Apache-2.0
"""A word on threads where a machine has other work: those of torch wait for each other in each operation."""

from __future__ import annotations

import os


def busy_hint(threads: int) -> str:
    """Return what helps where more wants to run than there are cores, or nothing.

    An operation that two threads share ends with the slower one. Where that one has to wait for its core, steps of
    small networks, whose operations take microseconds, take many times as long; one thread waits for nobody.

    Args:
        threads: of torch in this process.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads < 2 or load <= cores or "OMP_NUM_THREADS" in os.environ:
        return ""
    return (
        f"{load:.0f} processes want these {cores} cores, and {threads} threads of a step would wait for each other: "
        "OMP_NUM_THREADS=1 before the command is faster then"
    )
