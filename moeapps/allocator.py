# SPDX-License-Identifier: Apache-2.0
"""Memory that a training step frees is kept for the next one.

glibc gives every block above a threshold (at most 32 MiB) pages of its own and returns them to the system when it is
freed; memory freed at the end of the heap goes back as well. A step frees nearly all that it allocated, so the next one
pays a page fault, and the kernel a cleared page, for every 4 KiB of it. At 150,000 voxels that is a quarter of the CPU
time of a step of Point-MoE (benchmarks/results/point_moe_voxels.json, "allocator"). Here both are switched off: the
process keeps its peak until it ends. The training commands do this at their start; `moeapps.load` leaves the program
that calls it alone. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Mapping

# malloc.h of glibc; part of its binary interface
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory(environment: Mapping[str, str] | None = None) -> bool:
    """Have the C allocator keep what is freed; does nothing where that cannot be asked for.

    Args:
        environment: by default that of the process. Whoever sets the allocator himself, by a variable ``MALLOC_...``
            (such as ``MALLOC_TRIM_THRESHOLD_=131072``, glibc's own value) or by ``GLIBC_TUNABLES``, is left alone.

    Returns:
        Whether it was asked, and agreed: False on other C libraries than glibc (macOS, musl).
    """
    known = os.environ if environment is None else environment
    if any(name.startswith("MALLOC_") for name in known) or "glibc.malloc" in known.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def _mallopt() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    return function
