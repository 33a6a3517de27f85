# SPDX-License-Identifier: Apache-2.0
"""What all choosers share.

A chooser turns logits into a routing. ``Chooser.bind`` is called once by the router and says how many of the logit
columns are routed experts; the columns after them are null experts (an output of exactly 0) and gated shared experts.
Ties go to the lowest index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.routing import AnyRouting, Routing
from moeapps.moe.wide import WideBuffers

NullMass = Literal["lost", "redistributed"]
Pool = Literal["row", "group", "batch"]


def widest(*pools: Pool) -> Pool:
    """What a choice depends on that is made of several, each of which depends on its own."""
    return max(pools, key=get_args(Pool).index)


class Chooser(nn.Module):
    """Base of all choosers: ``choose(logits, token_mask=..., group=...) -> routing``.

    Attributes:
        sparse: whether rows go to some experts only; a bank without ``grouped`` needs a dense chooser.
        by_row: whether each row takes its own k experts.
        num_null: columns after the routed experts whose output is 0.
        num_shared: last columns, which weigh the shared experts.
        num_experts: E, known after ``bind``.
        pool: among which rows the choice is made in evaluation; ``row`` means that rows do not compete.

    Example:
        >>> from moeapps.moe import TopK
        >>> choose = TopK(2, num_null=1)
        >>> choose.bind(5), choose.num_experts
        (4, 4)
    """

    sparse: ClassVar[bool] = True
    by_row: ClassVar[bool] = False
    num_null: int = 0
    num_shared: int = 0
    num_experts: int = 0
    pool: Pool = "row"

    def bind(self, num_outputs: int) -> int:
        """Learn how many columns the score has and return how many routed experts they make.

        Args:
            num_outputs: columns of the logits.

        Raises:
            ValueError: if the setting does not fit that many, or the chooser serves another router of another size.
        """
        num_experts = num_outputs - self.num_null - self.num_shared
        if num_experts < 1:
            raise ValueError(
                f"the score has {num_outputs} columns, but {self.num_null} null and {self.num_shared} shared ones "
                "leave no routed expert; give the score num_experts + num_null + num_shared columns."
            )
        if self.num_experts not in (0, num_experts):
            raise ValueError(
                f"this {type(self).__name__} already serves a router of {self.num_experts} experts and cannot serve "
                f"one of {num_experts}; make one chooser per router."
            )
        self.num_experts = num_experts
        return num_experts

    def mean_k(self) -> float | None:
        """Experts per row, where it is known beforehand; None where the data decide."""
        return None

    def forward(
        self, logits_NX: Tensor, *, token_mask: Tensor | None = None, group: Tensor | None = None
    ) -> AnyRouting:
        """Choose.

        Args:
            logits_NX: [N, E + num_null + num_shared], float32 or float64.
            token_mask: bool [N], False rows get no work; None means all True.
            group: int64 [N] or None.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Picked:
    """What each row takes: K columns, best first.

    Attributes:
        index_NK: int64 [N, K], columns.
        weight_NK: their weights.
        taken_NK: bool, False for padding of a row that takes fewer than K; None means all are taken.
        probs_NX: probabilities of all columns, for losses.
    """

    index_NK: Tensor
    weight_NK: Tensor
    taken_NK: Tensor | None
    probs_NX: Tensor


FEW = 8
"""Rows, up to which one sort costs less than the calls of a repeated arg-max."""


def rows_that_count(like_NX: Tensor, token_mask: Tensor | None) -> Tensor:
    """Number of rows that are not masked, int64 [], without waiting for the device."""
    if token_mask is not None:
        return token_mask.sum()
    return torch.full((), like_NX.shape[0], dtype=torch.int64, device=like_NX.device)


def share_of(rows: Tensor, factor: float, num_experts: int) -> Tensor:
    """How many of so many rows an expert takes, ``floor(rows factor / num_experts)``, at least 1; int64."""
    return (rows.double() * factor / num_experts).long().clamp(min=1)


def top_indices(score_NX: Tensor, k: int) -> Tensor:
    """Columns of the k largest values, best first and none twice, ties to the lowest index; int64 [N, k].

    Repeated arg-max is faster than ``topk`` for small k and many rows and, unlike it, has a defined order of ties.
    """
    score = score_NX.detach()
    few = k > 1 and not torch.compiler.is_compiling() and score.shape[0] <= FEW
    if few or k > 8:
        return torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :k]
    if k > 1:  # what was found is set to minus infinity, which nothing else may be
        score = score.clamp(min=torch.finfo(score.dtype).min)
    found: list[Tensor] = []
    for _ in range(k):
        if found:
            score = score.scatter(-1, found[-1], float("-inf"))
        found.append(score.argmax(-1, keepdim=True) if score.shape[0] else score.new_zeros(0, 1, dtype=torch.int64))
    return torch.cat(found, dim=-1)


def normalised(weight_NK: Tensor, counted_NK: Tensor | None = None) -> Tensor:
    """Weights divided by the sum of the counted ones of their row; rows whose sum is 0 stay 0."""
    counted = weight_NK if counted_NK is None else weight_NK.where(counted_NK, 0)
    total = counted.sum(-1, keepdim=True)
    return weight_NK / total.where(total > 0, 1)


def rows_to_routing(
    picked: Picked, num_experts: int, token_mask: Tensor | None, *, all_real: bool, logits_NX: Tensor
) -> Routing:
    """Row-major assignments of what rows picked; null columns, padding and masked rows become sentinels of weight 0."""
    num_rows, k = picked.index_NK.shape
    expert_NK, weight_NK = picked.index_NK, picked.weight_NK
    null_M: Tensor | None = None
    if not all_real or picked.taken_NK is not None or token_mask is not None:
        is_null = expert_NK >= num_experts
        counts = torch.ones_like(is_null) if picked.taken_NK is None else picked.taken_NK
        counts = counts if token_mask is None else counts & token_mask.unsqueeze(-1)
        null_M = None if all_real else (counts & is_null).reshape(-1)
        real = counts & ~is_null
        expert_NK, weight_NK = expert_NK.where(real, num_experts), weight_NK.where(real, 0)
    return Routing(
        row_M=torch.arange(num_rows * k, device=expert_NK.device) // k,
        expert_M=expert_NK.reshape(-1),
        weight_M=weight_NK.reshape(-1),
        num_rows=num_rows,
        num_experts=num_experts,
        top_k=k,
        logits_NE=logits_NX,
        probs_NE=picked.probs_NX,
        null_M=null_M,
        column_M=picked.index_NK.reshape(-1) if logits_NX.shape[-1] > num_experts + 1 else None,
    )


def pairs_to_routing(taken_NE: Tensor, weight_NE: Tensor, logits_NE: Tensor, probs_NE: Tensor) -> Routing:
    """One assignment per (row, expert) pair, sentinels where not taken: M = N E is known beforehand, row-major."""
    num_rows, num_experts = taken_NE.shape
    columns_NE = torch.arange(num_experts, device=taken_NE.device).expand(num_rows, -1)
    return Routing(
        row_M=torch.arange(num_rows * num_experts, device=taken_NE.device) // num_experts,
        expert_M=columns_NE.where(taken_NE, num_experts).reshape(-1),
        weight_M=weight_NE.where(taken_NE, 0).reshape(-1),
        num_rows=num_rows,
        num_experts=num_experts,
        top_k=num_experts,
        logits_NE=logits_NE,
        probs_NE=probs_NE,
    )


def is_recomputed() -> bool:
    """Whether a backward pass is under way, so that this forward repeats one that has been seen (checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RowChooser(WideBuffers, Chooser):
    """Base of choosers by row; a subclass says in ``pick`` what each row takes.

    Example:
        >>> from moeapps.moe import TopP
        >>> isinstance(TopP(0.5), RowChooser)
        True
    """

    by_row: ClassVar[bool] = True
    null_mass: NullMass = "lost"

    def pick(self, logits_NX: Tensor) -> Picked:
        """Columns, weights and probabilities, from the logits of routed and null experts [N, E + num_null]."""
        raise NotImplementedError

    def limit(self, picked: Picked, logits_NX: Tensor, token_mask: Tensor | None) -> Picked:
        """Take back picks that the columns have no room for; a row alone cannot know (`Capped`)."""
        return picked

    def observe(self, picked: Picked, token_mask: Tensor | None) -> None:
        """See what was picked, once per call and after the choice; for choosers with a memory."""

    @override
    def forward(self, logits_NX: Tensor, *, token_mask: Tensor | None = None, group: Tensor | None = None) -> Routing:
        picked, all_real = self.limit(self.pick(logits_NX), logits_NX, token_mask), self.num_null == 0
        self.observe(picked, token_mask)
        return rows_to_routing(picked, self.num_experts, token_mask, all_real=all_real, logits_NX=logits_NX)

    def _check_null(self, num_null: int, null_mass: NullMass) -> None:
        if num_null < 0 or null_mass not in ("lost", "redistributed"):
            raise ValueError(
                f"num_null={num_null}, null_mass={null_mass!r}: use num_null >= 0 and 'lost' or 'redistributed'."
            )
        self.num_null, self.null_mass = num_null, null_mass

    def _counted(self, index_NK: Tensor, taken_NK: Tensor | None) -> Tensor | None:
        """Which picks share a weight of 1 when renormalised: all taken, or only the real experts among them."""
        if self.num_null == 0 or self.null_mass == "lost":
            return taken_NK
        real = index_NK < self.num_experts
        return real if taken_NK is None else real & taken_NK
