# SPDX-License-Identifier: Apache-2.0
"""Contextual self-modulation: train a field through its Taylor expansion about the contexts of neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Neighbours = Literal["nearest", "nearest_other", "random", "smallest"]


def taylor(f: Callable[[Tensor], Tensor], context: Tensor, anchor: Tensor, order: int) -> Tensor:
    r"""Expand f about ``anchor`` to the given order and evaluate at ``context``.

    :math:`f(a) + J(a)(c - a) + \tfrac12 (c - a)^T H(a) (c - a)`, by forward-mode products. Exact for f affine (order 1)
    or quadratic (order 2) in the context, and for any f where ``context == anchor``.

    Args:
        f: contexts -> anything.
        context: where to evaluate.
        anchor: where to expand; contexts shaped like ``context``.
        order: 0, 1 or 2.

    Source: NCF and MixER (docs/papers/mixer.md, equation 5); the published 1.5 JVP + 0.5 JVP of JVP is the same number.
    """
    if order == 0:
        return f(anchor)
    step = context - anchor

    def first(c: Tensor) -> tuple[Tensor, Tensor]:
        pair: Any = torch.func.jvp(f, (c,), (step,))
        return pair[0], pair[1]

    if order == 1:
        value, slope = first(anchor)
        return value + slope
    # The derivative of the slope along the same step; step itself is held constant.
    pairs: Any = torch.func.jvp(first, (anchor,), (step,))
    (value, slope), (_, curvature) = pairs
    total: Tensor = value + slope + 0.5 * curvature
    return total


class SelfModulation:
    """Which neighbours the field of an environment is expanded about, and to which order.

    Args:
        order: of the expansion, 0 to 2. Order 0 takes the neighbour's field as it is.
        pool: neighbours per environment; each gives one candidate trajectory, and the loss is their mean.
        neighbours: ``nearest`` (by mean absolute distance, the environment itself first), ``nearest_other``, ``random``
            or ``smallest`` (smallest mean absolute context).

    Raises:
        ValueError: an order or pool outside its range, or an unknown strategy.
    """

    def __init__(self, order: int = 2, pool: int = 2, neighbours: Neighbours = "nearest") -> None:
        if order not in (0, 1, 2) or pool < 1 or neighbours not in get_args(Neighbours):
            raise ValueError(
                f"order={order}, pool={pool}, neighbours={neighbours!r}: use order 0, 1 or 2, a pool of 1 or more, and "
                f"one of {', '.join(get_args(Neighbours))}"
            )
        self.order, self.pool, self.neighbours = order, pool, neighbours

    @torch.no_grad()
    def choose(self, context_Sc: Tensor) -> Tensor:
        """Rows of the neighbours of each environment, int64 [S, p]; p is at most what there is."""
        S = context_Sc.shape[0]
        if self.neighbours == "random":
            return torch.rand(S, S, device=context_Sc.device).argsort(1)[:, : self.pool]
        if self.neighbours == "smallest":
            return context_Sc.abs().mean(1).argsort(dim=0, stable=True)[: self.pool].expand(S, -1)
        distance_SS = (context_Sc[:, None] - context_Sc[None]).abs().mean(-1)
        # Contexts may coincide (all are 0 at first): the environment itself still comes first, or last.
        distance_SS.fill_diagonal_(-1.0 if self.neighbours == "nearest" else torch.inf)
        available = S if self.neighbours == "nearest" else max(1, S - 1)
        return distance_SS.argsort(dim=1, stable=True)[:, : min(self.pool, available)]
