# SPDX-License-Identifier: Apache-2.0
"""Capacity: a ceiling on the rows of one expert; what overflows becomes "no work"."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.routing import Routing


class Capacity(nn.Module):
    r"""At most :math:`C = \max(c_{min}, \lceil f\,A / E \rceil)` assignments per expert; the others are dropped.

    A is the number of assignments that the rows ask for, null experts included: k N for top-k over N rows that are
    not masked, the sum of the sizes of the sets for top-p. A dropped assignment contributes exactly 0 and gets no
    gradient (the caller's residual carries the row). While no expert overflows nothing is dropped. Sentinels take
    no room.

    Args:
        factor: f in training, above 0.
        policy: who stays: ``position`` (all first choices before any second one, then by row, as in GShard) or
            ``probability`` (the largest weights).
        minimum: c_min.
        eval_factor: f in evaluation; None means the same.

    Raises:
        ValueError: for a factor or minimum that is too small, or a routing that is not k per row.

    Source: GShard and DeepSpeed (docs/papers/core.md, equation 9), with A in the place of k N: they know top-k without
        masks alone. Ranking is by the weights of what was selected, never by raw logits.

    Example:
        >>> weight = torch.tensor([0.2, 0.9, 0.5])
        >>> r = Routing(torch.arange(3), torch.zeros(3, dtype=torch.int64), weight, num_rows=3, num_experts=2, top_k=1)
        >>> Capacity(1.0, policy="probability", minimum=1)(r).expert_M.tolist()
        [2, 0, 0]
    """

    def __init__(
        self,
        factor: float,
        *,
        policy: Literal["position", "probability"] = "position",
        minimum: int = 4,
        eval_factor: float | None = None,
    ) -> None:
        super().__init__()
        if policy not in ("position", "probability"):
            raise ValueError(f"policy={policy!r}, but it must be 'position' or 'probability'.")
        if not factor > 0 or minimum < 1 or not (eval_factor is None or eval_factor > 0):
            raise ValueError(
                f"factor={factor}, eval_factor={eval_factor}, minimum={minimum}: use factors above 0, minimum >= 1."
            )
        self.factor, self.policy, self.minimum, self.eval_factor = factor, policy, minimum, eval_factor

    def forward(self, routing: Routing) -> Routing:
        """The routing with what overflows replaced by sentinels of weight 0."""
        if routing.top_k is None:
            raise ValueError(
                "Capacity needs k assignments per row (TopK, TopP); this chooser bounds its experts itself."
            )
        factor = self.factor if self.training or self.eval_factor is None else self.eval_factor
        if self.minimum >= routing.num_rows or factor >= routing.num_experts:
            return routing  # room for every row, or for every assignment there is
        asked_M = routing.expert_M < routing.num_experts
        asked_M = asked_M if routing.null_M is None else asked_M | routing.null_M
        wanted = asked_M.sum().double() * factor / routing.num_experts
        limit = wanted.ceil().long().clamp(min=self.minimum)
        kept_M = _rank(routing, self._priority(routing)) < limit
        expert_M = routing.expert_M.where(kept_M, routing.num_experts)
        return replace(routing, expert_M=expert_M, weight_M=routing.weight_M.where(kept_M, 0))

    def _priority(self, routing: Routing) -> Tensor:
        """Assignments in the order in which they are served."""
        if self.policy == "probability":
            return torch.sort(routing.weight_M.detach(), descending=True, stable=True).indices
        order_M = torch.arange(routing.weight_M.shape[0], device=routing.weight_M.device)
        return order_M.view(routing.num_rows, -1).T.reshape(-1)

    @override
    def extra_repr(self) -> str:
        return f"factor={self.factor}, eval_factor={self.eval_factor}, policy={self.policy!r}, minimum={self.minimum}"


def _rank(routing: Routing, priority_M: Tensor) -> Tensor:
    """How many assignments of the same expert are served before each one."""
    counts = torch.zeros(routing.num_experts + 1, dtype=torch.int64, device=priority_M.device)
    counts = counts.scatter_add(0, routing.expert_M, torch.ones_like(routing.expert_M))
    start_E = counts.cumsum(0) - counts
    by_expert = torch.sort(routing.expert_M[priority_M], stable=True)
    place_M = torch.arange(priority_M.shape[0], device=priority_M.device) - start_E[by_expert.values]
    return torch.empty_like(place_M).scatter(0, priority_M[by_expert.indices], place_M)
