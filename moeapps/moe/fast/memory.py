# SPDX-License-Identifier: Apache-2.0
"""Buffers without the page faults: small ones are kept from call to call, large ones are put on huge pages.

Used by ``segments`` for its scratch, and for gradients of banks of 32 MiB and more. With 64 experts, whose first layers
alone are that large, a step takes 1.36 times the one with 8 (core.json, "scaling E=64/E=8").

A first write to fresh memory costs a fault per 4 KiB, often as much as the arithmetic of the layer that writes there.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # linux/mman.h
# Above this size the C allocator maps fresh pages at every allocation and unmaps them at every release, so that a
# gradient of the whole bank pays one fault per 4 KiB in each step. Smaller blocks come back warm from the heap.
_MIN_BYTES = 32 << 20


_MAX_SCRATCH_BYTES = 32 << 20  # per thread and use; what is larger is allocated anew


class _Scratch(threading.local):
    """Memory of one thread by use and dtype; it holds nothing that outlives a call."""

    def __init__(self) -> None:
        self.flat: dict[tuple[str, torch.dtype], Tensor] = {}


_scratch = _Scratch()


def scratch(use: str, like: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Uninitialised matrices for use until the next call with the same ``use`` on this thread.

    They must not be returned or saved for backward, and no other work of the same use may begin meanwhile.

    Args:
        use: Which memory to take.
        like: Gives dtype and device.
        shapes: Rows and columns of each matrix.
    """
    line = 64 // like.element_size()  # matrices start at cache lines
    sizes = [-(-rows * columns // line) * line for rows, columns in shapes]
    total = sum(sizes)
    if like.device.type != "cpu" or total * like.element_size() > _MAX_SCRATCH_BYTES:
        return [empty(like, shape) for shape in shapes]
    flat = _scratch.flat.get((use, like.dtype))
    if flat is None or flat.numel() < total:
        with torch.inference_mode(False):  # an inference tensor could not be written to in training later
            flat = torch.empty(total, dtype=like.dtype)
        _scratch.flat[use, like.dtype] = flat
    pieces = flat[:total].split(sizes)
    return [p[: rows * columns].view(rows, columns) for p, (rows, columns) in zip(pieces, shapes, strict=True)]


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
