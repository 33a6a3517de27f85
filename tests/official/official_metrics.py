# SPDX-License-Identifier: Apache-2.0
"""Routing consistency as ljcleo/moe-lrc defines it: ``30_srp_calc.py``, ``31_srp_refine.py``, ``41_sch_calc.py``."""

from __future__ import annotations

import torch
from official_common import part
from torch import Tensor

from moeapps.moe.metrics import segment_cache_hits, segment_routing_performance


def choices(rows: int, experts: int, k: int) -> Tensor:
    """Uses [N, E] of k experts a row, some of them favourites."""
    scores = 2 * torch.randn(experts) + torch.randn(rows, experts)
    return torch.zeros(rows, experts).scatter(1, scores.topk(k).indices, 1)


def f1(windows: list[Tensor], length: int) -> float:
    """The best over thresholds of 2 matches / (predictions + uses)."""
    best = 0.0
    for threshold in range(length + 1):
        matches = sum(int(c) for window in windows for c in window if c >= threshold)
        predictions = sum(length for window in windows for c in window if c >= threshold)
        uses = sum(int(c) for window in windows for c in window)
        best = max(best, 2 * matches / max(1, predictions + uses))
    return best


@part("segment routing best performance (SRP)")
def srp() -> float:
    errors = []
    for rows, experts, k, length in ((40, 6, 2, 8), (23, 5, 1, 4), (16, 4, 4, 16), (30, 8, 3, 1)):
        used = torch.stack([choices(rows, experts, k) for _ in range(2)])
        windows = [one[n : n + length].sum(0) for one in used for n in range(rows - length + 1)]
        errors.append(abs(float(segment_routing_performance(used, length)) - f1(windows, length)))
        ours = segment_routing_performance(used, length, per_expert=True)
        for e in range(experts):
            if used[..., e].any():
                errors.append(abs(float(ours[e]) - f1([window[e : e + 1] for window in windows], length)))
    return max(errors)


def hit_rates(used: Tensor, length: int) -> list[float]:
    """All sizes at once by a stack: a cache of size C is its first C places.

    The expert that is used goes on top. The one that it pushes down meets each place in turn: the one of the two that
    the known rows need more often, or that was used last, stays, and the other goes on; it rests where the used one
    was.
    """
    rows = [row.nonzero()[:, 0].tolist() for row in used]
    num_experts, known = used.shape[1], [[float(v) for v in row] for row in used]
    ahead = [sum(row[e] for row in known[:length]) for e in range(num_experts)]
    last, stack, at, clock = [0] * num_experts, [], [0] * num_experts, 0
    for n, row in enumerate(rows):
        places, found = list(stack), len(stack)
        for e in row:
            if e in places:
                at[places.index(e)] += 1
            else:  # a first use hits where a place is still empty
                at[found] += 1
                found += 1
        for e in row:
            below = stack.index(e) if e in stack else len(stack)
            carried, kept = None, []
            for other in stack[:below]:
                if carried is None:
                    carried = other
                else:
                    more, less = sorted((carried, other), key=lambda x: (-ahead[x], -last[x]))
                    kept.append(more)
                    carried = less
            rest = stack[below + 1 :] if e in stack else []
            stack = [e, *kept, *([] if carried is None else [carried]), *rest]
            clock += 1
            ahead[e], last[e] = ahead[e] - 1, clock
        if n + length < len(rows):
            for e in rows[n + length]:
                ahead[e] += 1
    total = float(used.sum())
    return [sum(at[: size + 1]) / total for size in range(num_experts)]


@part("segment cache best hit rate (SCH)")
def sch() -> float:
    errors = []
    for rows, experts, k, length in ((40, 6, 2, 8), (60, 9, 3, 4), (25, 5, 1, 25), (50, 12, 4, 1)):
        used = choices(rows, experts, k)
        ours = segment_cache_hits(used, length, range(1, experts + 1)).tolist()
        errors += [abs(a - b) for a, b in zip(ours, hit_rates(used, length), strict=True)]
    return max(errors)
