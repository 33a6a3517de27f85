# SPDX-License-Identifier: Apache-2.0
"""What arithmetic alone would cost: products counted as they run, and how fast this machine multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from benchmarks.core_cases import median_ms
from moeapps.training.flops import counting

Work = Callable[[], object]
PEAK_SIZES = ((2048, 2048, 2048), (4096, 256, 1024), (512, 512, 512))
"""Rows, inner width and columns of the products that the peak is taken of."""
SLACK = 1.001
"""Rounding only: the counts are whole numbers of the same operators."""


def product_flops(work: Work) -> int:
    """Floating-point operations of the matrix products of one call; a multiply-add counts two."""
    with counting() as counter:
        work()
    return int(counter.get_total_flops())


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
