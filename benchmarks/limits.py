# SPDX-License-Identifier: Apache-2.0
"""What arithmetic alone would cost: products counted as they run, and how fast this machine multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.core_cases import median_ms

Work = Callable[[], object]
PEAK_SIZES = ((2048, 2048, 2048), (4096, 256, 1024), (512, 512, 512))
"""Rows, inner width and columns of the products that the peak is taken of."""
SLACK = 1.001
"""Rounding only: the counts are whole numbers of the same operators."""


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Groups of rows by a matrix each, or, as for gradients of the matrices, groups of columns by groups of rows."""
    rows = a.shape[-2] if a.ndim == 3 and b.ndim == 2 else a.numel() // a.shape[-1]
    return int(2 * rows * a.shape[-1] * b.shape[-1])


_COUNTS = {**flop_registry, torch.ops.aten._grouped_mm: _grouped}  # which torch does not count


class _Counter(TorchDispatchMode):
    """Adds up the floating-point operations of matrix products, attention and convolutions.

    torch's own counter follows modules by hooks that do not allow gradients of leaves; this one needs no hook.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = OPDEFS.get(func._schema.name)
        if own is not None:  # an operator of our own: count what it is made of
            with self:
                return own._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        count = _COUNTS.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=out))
        return out


def product_flops(work: Work) -> int:
    """Floating-point operations of the matrix products of one call; a multiply-add counts two."""
    with _Counter() as counter:
        work()
    return int(counter.flops)


def peak_gflops(*, samples: int = 7) -> float:
    """Fastest matrix product of this process on one thread, float32, in 1e9 operations per CPU second."""
    found = []
    for rows, inner, columns in PEAK_SIZES:
        a, b, y = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
        ms = median_ms(partial(torch.mm, a, b, out=y), samples=samples)
        found.append(2e-6 * rows * inner * columns / ms)
    return max(found)


def check_parts(step: Work, parts: Mapping[str, Sequence[Work]]) -> None:
    """Refuse parts of a step that together multiply more than the step does: one of them holds another.

    Args:
        step: the whole step.
        parts: name -> calls that repeat what the step did there.

    Raises:
        ValueError: more products than the step has; the text says how many each part has.
    """
    whole = product_flops(step)
    each = {name: sum(product_flops(work) for work in calls) for name, calls in parts.items()}
    if sum(each.values()) > SLACK * whole:
        told = ", ".join(f"{name} {flops:,}" for name, flops in each.items())
        raise ValueError(
            f"the parts multiply more than the step, which has {whole:,} operations: {told}; one of them runs what "
            "belongs to another, or what the step never does"
        )
