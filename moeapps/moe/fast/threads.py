# SPDX-License-Identifier: Apache-2.0
"""Share the experts out among threads, instead of letting all threads share each small matrix product.

Used by ``segments`` where torch has two threads or more. With two of them, 64 experts take 1.09 x dense (core.json,
"2 threads": wall time on an idle machine).

A product of a hundred rows is too small for several threads: they wait at a barrier per product, and on a busy machine
they wait for each other's time slice. Experts are independent, so each thread takes some of them whole and meets the
others once, at the end. Every product runs on one thread, so results do not depend on the number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_MIN_ROWS = 256  # below this, handing work over costs more than the second thread brings
_MAX_UNEVENNESS = 1.25  # largest share over an even one, up to which whole experts are shared out

# One pool per process and size: a forked child has none of its parent's threads.
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def expert_shares(counts: Sequence[int], num_shares: int) -> list[range]:
    """Cut the experts into at most ``num_shares`` ranges with nearly the same number of rows.

    Args:
        counts: Rows of each expert.
        num_shares: How many ranges to aim for, at least 1.

    Returns:
        Ranges of expert ids that cover all experts in order; one range where no even cut exists or the rows are few.
    """
    whole = [range(len(counts))]
    total = sum(counts)
    if num_shares < 2 or total < _MIN_ROWS:
        return whole
    cuts, rows = [0], 0
    for expert, count in enumerate(counts):
        # An expert goes where most of its rows lie.
        if len(cuts) < num_shares and expert and rows + count / 2 > total * len(cuts) / num_shares:
            cuts.append(expert)
        rows += count
    shares = [range(start, stop) for start, stop in zip(cuts, [*cuts[1:], len(counts)], strict=True)]
    largest = max(sum(counts[share.start : share.stop]) for share in shares)
    return shares if largest <= _MAX_UNEVENNESS * total / num_shares else whole


def is_observed() -> bool:
    """Whether a dispatch mode watches this thread; it would not see the work of others."""
    return bool(torch._C._len_torch_dispatch_stack())


def run_shares(work: Callable[[range], None], shares: Sequence[range]) -> None:
    """Call ``work`` with every share at once: the first here, the others on threads of the pool.

    Gradients are off on all of them; each runs its matrix products on one thread. The first error is raised after all
    have finished.
    """
    if len(shares) == 1:
        work(shares[0])
        return
    inference = torch.is_inference_mode_enabled()

    def elsewhere(share: range) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(share)

    num_threads = torch.get_num_threads()
    pool = _pool(len(shares) - 1)
    torch.set_num_threads(1)
    try:
        futures = [pool.submit(elsewhere, share) for share in shares[1:]]
        try:
            work(shares[0])
        finally:
            errors = [future.exception() for future in futures]
    finally:
        torch.set_num_threads(num_threads)
    for error in errors:
        if error is not None:
            raise error


def _pool(size: int) -> ThreadPoolExecutor:
    key = (os.getpid(), size)
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(size, "moe-experts", initializer=torch.set_num_threads, initargs=(1,))
    return _pools[key]
