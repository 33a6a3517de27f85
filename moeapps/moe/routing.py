# SPDX-License-Identifier: Apache-2.0
"""What a router returns: three frozen dataclasses, one per shape of routing.

Shape suffixes, one legend for the whole project: B batch, L sequence, N rows (tokens, points, users, environments), D
model width, F hidden width, E experts, K chosen per row, C classes, H heads, S domains (or shared experts in
``shared_weight_NS``), M assignments, G gates.

* :class:`Routing` - a list of M (row, expert, weight) triples: every sparse router, with a static M.
* :class:`DenseRouting` - a weight for every (row, expert) pair, for one gate or for G gates over one bank of experts.
* :class:`SlotRouting` - soft dispatch of rows to slots and soft combination of slots to rows (soft MoE, the one-hot
  oracle).

All three carry ``logits_NE``, ``probs_NE`` and ``features_ND`` for losses and metrics, and ``state`` for routers with a
memory. They hold references only: building one computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


def _check_ids(name: str, ids_M: Tensor, num: int) -> None:
    if ids_M.dtype != torch.int64 or ids_M.ndim != 1 or ids_M.shape[0] != num:
        raise ValueError(
            f"{name} is {tuple(ids_M.shape)} of {ids_M.dtype}; it must be one-dimensional int64 with one entry per "
            f"assignment ({num})."
        )


def _offsets(times: int, like: Tensor) -> Tensor:
    if times < 1:
        raise ValueError(f"times={times}; a row is repeated at least once.")
    return torch.arange(times, device=like.device).view(1, -1, 1)


def _repeat(values_M: Tensor, times: int, width: int) -> Tensor:
    """Repeat runs of ``width`` entries, so that a row-major order of assignments stays one."""
    return values_M.view(-1, 1, width).expand(-1, times, width).reshape(-1)


def _repeated_extras(routing: Routing | DenseRouting, times: int) -> dict[str, Any]:
    """What losses read, repeated along the rows; a state has no rows to repeat and is kept."""
    names = ("logits_NE", "probs_NE", "features_ND", "shared_weight_NS")
    found = {name: getattr(routing, name) for name in names}
    return {name: None if v is None else v.repeat_interleave(times, -2) for name, v in found.items()}


@dataclass(frozen=True, eq=False)
class Routing:
    r"""Sparse assignments: M triples (row, expert, weight), with M known before the data is seen.

    The layer computes :math:`y_t = \sum_{m:\, target_m = t} w_m\, E_{expert_m}(x_{row_m})`. The expert id
    ``num_experts`` is the sentinel "no work" (a null expert, a capacity drop, top-p padding, a masked row): such
    assignments cost no expert work and contribute exactly 0.

    Args:
        row_M: int64 [M], the row each assignment reads, in ``[0, num_rows)``.
        expert_M: int64 [M], in ``[0, num_experts]``; ``num_experts`` is the sentinel.
        weight_M: float [M], differentiable.
        num_rows: N.
        num_experts: E, routed experts only (shared experts are not counted here).
        target_M: int64 [M], the output row each assignment is added to; default ``row_M``.
        num_targets: rows of the output; default ``num_rows``.
        top_k: set when M == num_rows * top_k in row-major order (assignment m belongs to row ``m // top_k``).
        shared_weight_NS: weight [N, S] of the always-on shared experts; None means 1 each.
        state: memory of a recurrent router, handed back by the caller at the next layer.
        logits_NE: [N, E] or [N, E + nulls]: logits as the chooser got them: after noise and ``adjust``, before any
            selection bias or mask.
        probs_NE: probabilities (softmax or sigmoid) of the same shape as ``logits_NE``.
        features_ND: what was routed on, not detached; in masked rows not what stood there (see the layer).
        null_M: bool [M], which sentinels are choices of a null expert (and not padding, drops or masked rows); None
            where there are no null experts.
        given_N: bool [N], which rows were given an expert and had no choice; None means no row.
        num_given: how many of the experts, the last ones, are given and never chosen.
        column_M: int64 [M], the column of the logits each assignment stands for; set where there are several null
            experts, which ``null_M`` does not tell apart.

    Raises:
        ValueError: tensors of the wrong rank, dtype or length; ``top_k`` that does not fit M; ``target_M`` without
            ``num_targets``.

    Source: shapes follow the transformers convention of a sentinel id E for "not here" tokens, generalised to every
    kind of no-work.

    Example:
        >>> row, expert, weight = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 3]), torch.tensor([0.6, 0.4, 1, 0])
        >>> r = Routing(row, expert, weight, num_rows=2, num_experts=3, top_k=2)
        >>> r.counts().tolist()
        [1, 1, 1]
        >>> r.assignment()
        tensor([[0.6000, 0.0000, 0.4000],
                [0.0000, 1.0000, 0.0000]])
    """

    row_M: Tensor
    expert_M: Tensor
    weight_M: Tensor
    num_rows: int
    num_experts: int
    target_M: Tensor | None = None
    num_targets: int | None = None
    top_k: int | None = None
    shared_weight_NS: Tensor | None = None
    state: Any = None
    logits_NE: Tensor | None = None
    probs_NE: Tensor | None = None
    features_ND: Tensor | None = None
    null_M: Tensor | None = None
    given_N: Tensor | None = None
    num_given: int = 0
    column_M: Tensor | None = None

    def __post_init__(self) -> None:
        num = self.weight_M.shape[0] if self.weight_M.ndim == 1 else -1
        if num < 0:
            raise ValueError(
                f"weight_M is {tuple(self.weight_M.shape)}; it must be one-dimensional with one entry per assignment."
            )
        _check_ids("row_M", self.row_M, num)
        _check_ids("expert_M", self.expert_M, num)
        if self.target_M is not None:
            _check_ids("target_M", self.target_M, num)
            if self.num_targets is None:
                raise ValueError("target_M is given without num_targets: say how many rows the output has.")
        if self.top_k is not None and num != self.num_rows * self.top_k:
            raise ValueError(
                f"top_k={self.top_k} says {self.num_rows * self.top_k} assignments for {self.num_rows} rows, but there "
                f"are {num}; leave top_k=None unless assignment m belongs to row m // top_k."
            )

    @property
    def output_M(self) -> Tensor:
        """The output row of each assignment: ``target_M`` or, by default, ``row_M``."""
        return self.row_M if self.target_M is None else self.target_M

    @property
    def num_outputs(self) -> int:
        """Rows of the output: ``num_targets`` or, by default, ``num_rows``."""
        return self.num_rows if self.num_targets is None else self.num_targets

    def repeat_rows(self, times: int) -> Routing:
        """The routing of ``times`` consecutive rows for each row: route per image or request, apply per item.

        Args:
            times: how many rows of the new input share one row of this routing, at least 1.

        Raises:
            ValueError: when outputs do not go back to their own rows (``target_M`` is set).
        """
        if self.target_M is not None:
            raise ValueError("repeat_rows is for outputs that go back to their own row; this routing has target_M.")
        width = 1 if self.top_k is None else self.top_k
        row_M = (self.row_M.view(-1, 1, width) * times + _offsets(times, self.row_M)).reshape(-1)
        return replace(
            self,
            row_M=row_M,
            expert_M=_repeat(self.expert_M, times, width),
            weight_M=_repeat(self.weight_M, times, width),
            num_rows=self.num_rows * times,
            null_M=None if self.null_M is None else _repeat(self.null_M, times, width),
            given_N=None if self.given_N is None else self.given_N.repeat_interleave(times),
            column_M=None if self.column_M is None else _repeat(self.column_M, times, width),
            **_repeated_extras(self, times),
        )

    def counts(self) -> Tensor:
        """Assignments per expert, int64 [E]; the sentinel is not counted. No host synchronisation."""
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=self.expert_M.device)
        return counts.scatter_add(0, self.expert_M, torch.ones_like(self.expert_M))[: self.num_experts]

    def assignment(self) -> Tensor:
        """Dense weights [N, E] by the row that was read, differentiable; repeated pairs add up."""
        dense = self.weight_M.new_zeros(self.num_rows, self.num_experts + 1)
        dense = dense.index_put((self.row_M, self.expert_M), self.weight_M, accumulate=True)
        return dense[:, : self.num_experts]


@dataclass(frozen=True, eq=False)
class DenseRouting:
    r"""A weight for every (row, expert) pair, :math:`y_{gn} = \sum_e w_{gne} E_e(x_n)`.

    Every expert runs once on every row. Leading dimensions of ``weight`` are gates: weight [N, E] gives output [N, o];
    weight [G, N, E] gives [G, N, o] (MMoE, HoME).

    Args:
        weight: float [..., N, E], differentiable; already zero where not allowed.
        num_experts: E.
        allowed: bool, broadcastable to ``weight``: which pairs exist at all; None means all.
        shared_weight_NS: weight [N, S] of the always-on shared experts; None means 1 each.
        state: memory of a recurrent router.
        logits_NE: [..., N, E] as scored.
        probs_NE: probabilities, of the same shape as ``logits_NE``.
        features_ND: what was routed on, not detached.

    Raises:
        ValueError: if the last dimension of ``weight`` is not ``num_experts``.

    Source: MMoE and its descendants (docs/papers/core.md, equation 15).

    Example:
        >>> allowed = torch.tensor([[True, True], [True, False]])
        >>> DenseRouting(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), 2, allowed=allowed).counts().tolist()
        [2, 1]
    """

    weight: Tensor
    num_experts: int
    allowed: Tensor | None = None
    shared_weight_NS: Tensor | None = None
    state: Any = None
    logits_NE: Tensor | None = None
    probs_NE: Tensor | None = None
    features_ND: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim < 2 or self.weight.shape[-1] != self.num_experts:
            raise ValueError(
                f"weight is {tuple(self.weight.shape)}; it must be [..., N, {self.num_experts}], gates first."
            )

    @property
    def num_rows(self) -> int:
        """N, rows that are routed."""
        return int(self.weight.shape[-2])

    def repeat_rows(self, times: int) -> DenseRouting:
        """The routing of ``times`` consecutive rows for each row; see :meth:`Routing.repeat_rows`."""
        allowed = self.allowed
        if allowed is not None:
            allowed = allowed.expand(self.weight.shape).repeat_interleave(times, -2)
        weight = self.weight.repeat_interleave(times, -2)
        return replace(self, weight=weight, allowed=allowed, **_repeated_extras(self, times))

    def counts(self) -> Tensor:
        """Rows per expert, int64 [E]: N each, less the pairs that no gate allows."""
        if self.allowed is None:
            return torch.full((self.num_experts,), self.num_rows, dtype=torch.int64, device=self.weight.device)
        allowed = self.allowed.expand(self.weight.shape)
        return (allowed if allowed.ndim == 2 else allowed.flatten(0, -3).any(0)).sum(0)

    def assignment(self) -> Tensor:
        """Weights [N, E]; the mean over the gates when there are several."""
        return self.weight if self.weight.ndim == 2 else self.weight.flatten(0, -3).mean(0)


@dataclass(frozen=True, eq=False)
class SlotRouting:
    r"""Soft MoE: slots are mixtures of rows, outputs are mixtures of slots.

    :math:`z_{es} = \sum_n D_{nes} x_n`, :math:`y_n = \sum_{es} C_{nes} E_e(z_{es})`.

    Args:
        dispatch: float [N, E, S]; columns sum to 1 over the rows in soft MoE, one-hot in the GShard oracle.
        combine: float [N, E, S]; rows sum to 1 over (E, S) in soft MoE.
        shared_weight_NS: weight [N, shared] of the always-on shared experts; None means 1 each.
        state: memory of a recurrent router.
        logits_NES: [N, E, S], one per row and slot, before any mask.
        features_ND: what was routed on, not detached.

    Raises:
        ValueError: if the two shapes differ or are not three-dimensional.

    Source: soft MoE (docs/papers/core.md, equation 16); the one-hot form is GShard's.

    Example:
        >>> r = SlotRouting(torch.full((4, 2, 3), 0.25), torch.full((4, 2, 3), 1 / 6))
        >>> r.counts().tolist(), tuple(r.assignment().shape)
        ([3, 3], (4, 2))
    """

    dispatch: Tensor
    combine: Tensor
    shared_weight_NS: Tensor | None = None
    state: Any = None
    logits_NES: Tensor | None = None
    features_ND: Tensor | None = None

    def __post_init__(self) -> None:
        if self.dispatch.ndim != 3 or self.dispatch.shape != self.combine.shape:
            raise ValueError(
                f"dispatch {tuple(self.dispatch.shape)} and combine {tuple(self.combine.shape)} must both be [N, E, S]."
            )

    @property
    def logits_NE(self) -> Tensor | None:
        """[N, E], the logsumexp over the slots of each expert; computed when asked for."""
        return None if self.logits_NES is None else self.logits_NES.logsumexp(-1)

    @property
    def probs_NE(self) -> Tensor | None:
        """[N, E], the softmax over all slots summed over those of each expert; computed when asked for."""
        logits_NE = self.logits_NE
        return None if logits_NE is None else logits_NE.softmax(-1)

    @property
    def num_rows(self) -> int:
        """N, rows that are routed."""
        return int(self.dispatch.shape[0])

    @property
    def num_experts(self) -> int:
        """E, routed experts."""
        return int(self.dispatch.shape[1])

    def counts(self) -> Tensor:
        """Slots per expert, int64 [E]: S each."""
        return torch.full((self.num_experts,), self.dispatch.shape[2], dtype=torch.int64, device=self.dispatch.device)

    def assignment(self) -> Tensor:
        """Combine weights summed over the slots of each expert, [N, E]."""
        return self.combine.sum(-1)


AnyRouting = Routing | DenseRouting | SlotRouting
