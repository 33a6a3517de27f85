# SPDX-License-Identifier: Apache-2.0
"""The dispatch plan of a routing: its assignments sorted by expert, without those that need no work.

Shape legend: N rows, M assignments, E experts, K chosen per row; M of a plan counts real assignments alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moeapps.moe.derivatives import is_transformed
from moeapps.moe.eager import runs_eagerly
from moeapps.moe.routing import Routing


@dataclass(frozen=True)
class Plan:
    """A dispatch plan: assignments sorted by expert, in routing order within an expert; sentinels are left out.

    Attributes:
        order_M: int64, place in the routing of each sorted assignment.
        row_M: int64, row of the input that each sorted assignment reads.
        target_M: int64, row of the output that it adds to.
        weight_M: Its weight, differentiable with respect to the routing's weight.
        counts: Assignments of each expert, E integers on the host; they sum to M.
        num_rows: N, rows of the input.
        num_targets: Rows of the output.
        top_k: K when every row has exactly K real assignments that return to it, else None.

    Example:
        >>> from moeapps.moe import LinearScore, Router, TopK
        >>> routing = Router(LinearScore(8, 4), TopK(2))(torch.randn(5, 8))
        >>> sort_assignments(routing).num_assignments
        10
    """

    order_M: Tensor
    row_M: Tensor
    target_M: Tensor
    weight_M: Tensor
    counts: list[int]
    num_rows: int
    num_targets: int
    top_k: int | None = None

    @cached_property
    def inverse_NK(self) -> Tensor | None:
        """int64 (N, K), where row n's j-th assignment went in the sorted order; None where ``top_k`` is."""
        if self.top_k is None:
            return None
        inverse = torch.empty_like(self.order_M)
        inverse[self.order_M] = torch.arange(self.num_assignments, device=self.order_M.device)
        return inverse.view(-1, self.top_k)

    def weighed(self, weight_M: Tensor) -> Plan:
        """The same plan with other weights, in the order of the routing; what was derived of the order is kept."""
        same = object.__new__(Plan)
        vars(same).update(vars(self), weight_M=weight_M.index_select(0, self.order_M))
        return same

    @property
    def num_experts(self) -> int:
        """E, experts of the bank, busy or not."""
        return len(self.counts)

    @property
    def num_assignments(self) -> int:
        """M, assignments that are computed."""
        return self.row_M.shape[0]

    def expert_M(self) -> Tensor:
        """Expert of each sorted assignment, int64 (M,)."""
        ids = torch.arange(self.num_experts, device=self.row_M.device)
        return torch.repeat_interleave(ids, self.counts_E(), output_size=self.num_assignments)

    def counts_E(self) -> Tensor:
        """The counts as an int64 tensor (E,) on the device of the plan."""
        return torch.tensor(self.counts, device=self.row_M.device)


@runs_eagerly
def sort_assignments(routing: Routing) -> Plan:
    """Sort a sparse routing by expert and drop its sentinels before anything is gathered.

    The sort is stable, and its keys are the smallest integers that hold E + 1 values: radix sort of uint8 takes a fifth
    of the time of int64. The counts cross to the host once.

    Args:
        routing: Sparse routing; expert id ``num_experts`` marks "no work".

    Returns:
        The plan, with the same weights in the new order.

    Raises:
        ValueError: If an expert id lies outside ``0 .. num_experts``.
    """
    num_experts = routing.num_experts
    counts = _counts(routing.expert_M, num_experts)
    num_real = sum(counts)
    total = routing.expert_M.shape[0]
    top_k = routing.top_k
    if num_experts == 1 and num_real == total:
        order_M = torch.arange(total, device=routing.expert_M.device)
    else:
        order_M = torch.sort(routing.expert_M.to(key_dtype(num_experts)), stable=True).indices[:num_real]
    row_M = order_M.div(top_k, rounding_mode="floor") if top_k else routing.row_M.index_select(0, order_M)
    target_M = row_M if routing.target_M is None else routing.target_M.index_select(0, order_M)
    return Plan(
        order_M=order_M,
        row_M=row_M,
        target_M=target_M,
        weight_M=routing.weight_M.index_select(0, order_M),
        counts=counts,
        num_rows=routing.num_rows,
        num_targets=routing.num_rows if routing.num_targets is None else routing.num_targets,
        top_k=top_k if routing.target_M is None and num_real == total else None,
    )


_plans: WeakKeyDictionary[Routing, tuple[Plan, int | None]] = WeakKeyDictionary()


@runs_eagerly
def plan_of(routing: Routing) -> Plan:
    """The plan of a routing: made once, however often the routing is applied (each step of a solve).

    It is kept as long as the routing lives, whose ids must not change; its weights may, by an optimizer for instance,
    and are then gathered anew. Nothing is kept while a function transform is under way, whose tensors must not outlive
    it.
    """
    kept, version = _plans.get(routing, (None, None))
    if kept is None or (torch.is_grad_enabled() and kept.order_M.is_inference()):
        plan = sort_assignments(routing)
    elif version is not None and version == _version(routing.weight_M) and _serves(kept.weight_M, routing.weight_M):
        return kept
    else:
        plan = kept.weighed(routing.weight_M)
    if not is_transformed():
        _plans[routing] = plan, _version(routing.weight_M)
    return plan


def _version(weight_M: Tensor) -> int | None:
    """What every change in place raises; inference tensors do not tell."""
    return None if weight_M.is_inference() else weight_M._version


def _serves(kept_M: Tensor, weight_M: Tensor) -> bool:
    """Whether gathered weights may be used again: not where gradients are wanted, a backward pass frees their graph."""
    return not torch.is_grad_enabled() or not (kept_M.is_inference() or weight_M.requires_grad)


def _counts(expert_M: Tensor, num_experts: int) -> list[int]:
    """Assignments per expert on the host, without the sentinel."""
    counts: list[int] = torch.bincount(expert_M, minlength=num_experts + 1).tolist()
    if len(counts) > num_experts + 1:
        raise ValueError(
            f"the routing names expert {len(counts) - 1}, but there are {num_experts} experts; ids run from 0 to "
            f"{num_experts - 1}, and {num_experts} means 'no work'."
        )
    return counts[:num_experts]


def weigh(rows_M: Tensor, weight_M: Tensor) -> Tensor:
    """Multiply row m, of any shape, by ``weight_M[m]`` in the dtype of the rows."""
    return rows_M * weight_M.to(rows_M.dtype).view(-1, *[1] * (rows_M.dim() - 1))


def combine(y_MO: Tensor, plan: Plan) -> Tensor:
    """Add the outputs of the sorted assignments up in their target rows."""
    return y_MO.new_zeros(plan.num_targets, *y_MO.shape[1:]).index_add(0, plan.target_M, y_MO)


def key_dtype(num_experts: int) -> torch.dtype:
    """Smallest integer type that holds the ids 0 .. num_experts (the sentinel included)."""
    if num_experts <= torch.iinfo(torch.uint8).max:
        return torch.uint8
    return torch.int16 if num_experts <= torch.iinfo(torch.int16).max else torch.int32
