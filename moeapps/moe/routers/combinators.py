# SPDX-License-Identifier: Apache-2.0
"""Routers made of other routers: a fixed expert for flagged rows, many gates over one bank, sums of routings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.routers.choose_dense import DenseWeighing, allowed_table, dense_weights
from moeapps.moe.routers.chooser import widest
from moeapps.moe.routers.router import Adjust, RouterBase, device_of, full_precision, without_autocast
from moeapps.moe.routers.score import Features, Score
from moeapps.moe.routing import AnyRouting, DenseRouting, Routing


class ConditionalSplit(RouterBase):
    r"""Rows of a flagged group go to an expert of their own, with weight 1 as shared ones have; the others are routed.

    Routed experts are 0 .. E-1 of the inner router; a row whose group is ``fixed_groups[j]`` goes to expert E + j. In
    the routing's ``probs_NE`` a fixed row is one-hot, and its logits are about minus infinity elsewhere. The inner
    router may be any sparse one: token choice, expert choice per group or batch, thresholds.

    Args:
        conditional: router of the other rows.
        fixed_groups: group ids that are not routed; None means all negative ids, which share expert E (samples without
            a condition then keep ids of their own).

    Raises:
        ValueError: if no group is named, the inner router is not sparse, or no group ids come.

    Source: ProMoE, unconditional tokens (docs/papers/promoe.md, equation 1).

    Example:
        >>> from moeapps.moe.routers import PrototypeScore, Router, TopK
        >>> split = ConditionalSplit(Router(PrototypeScore(8, 3), TopK(1, weighing="identity")), (-1,))
        >>> split(torch.randn(2, 8), group=torch.tensor([0, -1])).expert_M[1].item()
        3
    """

    def __init__(self, conditional: RouterBase, fixed_groups: Sequence[int] | None = (-1,)) -> None:
        super().__init__()
        if fixed_groups is not None and (not fixed_groups or len(set(fixed_groups)) != len(fixed_groups)):
            raise ValueError(f"fixed_groups={tuple(fixed_groups)}: name at least one group id, each once.")
        if not conditional.sparse:
            raise ValueError(
                "ConditionalSplit needs a sparse router (TopK, TopP, ExpertChoice): a dense gate uses all experts."
            )
        self.conditional = conditional
        self.fixed_groups = None if fixed_groups is None else tuple(fixed_groups)
        self.num_shared, self.pool = conditional.num_shared, conditional.pool
        self.num_experts = conditional.num_experts + (1 if self.fixed_groups is None else len(self.fixed_groups))

    @override
    def mean_k(self) -> float | None:
        return self.conditional.mean_k()

    @override
    def forward(
        self,
        features: Features,
        *,
        state: Tensor | None = None,
        token_mask: Tensor | None = None,
        group: Tensor | None = None,
    ) -> Routing:
        if group is None:
            named = "negative" if self.fixed_groups is None else str(self.fixed_groups)
            raise ValueError(f"ConditionalSplit sends groups {named} to experts of their own; pass group=ids.")
        fixed_NF = self._fixed(group)
        is_fixed_N = fixed_NF.any(-1)
        routed_N = ~is_fixed_N if token_mask is None else ~is_fixed_N & token_mask
        inner = self.conditional(features, state=state, token_mask=routed_N, group=group)
        if not isinstance(inner, Routing) or inner.target_M is not None:
            raise ValueError("ConditionalSplit needs a router of assignments (TopK, TopP, ExpertChoice), not of slots.")
        fixed_N = inner.num_experts + fixed_NF.int().argmax(-1)
        here_N = is_fixed_N if token_mask is None else is_fixed_N & token_mask
        expert_M = inner.expert_M.where(inner.expert_M < inner.num_experts, self.num_experts)
        if inner.top_k is None:  # no place of its own for every row: one more assignment each, a sentinel if routed
            row_N = torch.arange(inner.num_rows, device=group.device)
            row_M = torch.cat([inner.row_M, row_N])
            expert_M = torch.cat([expert_M, fixed_N.where(here_N, self.num_experts)])
            weight_M = torch.cat([inner.weight_M, here_N.to(inner.weight_M.dtype)])
        else:
            row_M = inner.row_M
            first_M = torch.arange(row_M.shape[0], device=group.device) % inner.top_k == 0
            here_M = first_M & here_N[row_M]
            expert_M = fixed_N[row_M].where(here_M, expert_M)
            weight_M = torch.ones_like(inner.weight_M).where(here_M, inner.weight_M)
        shared_weight_NS = inner.shared_weight_NS
        if shared_weight_NS is not None:  # for the inner router fixed rows are masked, which is weight 0
            shared_weight_NS = shared_weight_NS.masked_fill(here_N.unsqueeze(-1), 1.0)
        return replace(
            inner,
            row_M=row_M,
            expert_M=expert_M,
            weight_M=weight_M,
            num_experts=self.num_experts,
            shared_weight_NS=shared_weight_NS,
            logits_NE=self._widened(
                inner.logits_NE, fixed_NF, inner.num_experts, torch.finfo(torch.float32).min / 4, 0.0
            ),
            probs_NE=self._widened(inner.probs_NE, fixed_NF, inner.num_experts, 0.0, 1.0),
            column_M=self._shifted(inner, fixed_NF.shape[1], row_M.shape[0]),
            given_N=is_fixed_N if inner.given_N is None else is_fixed_N | inner.given_N,
            num_given=inner.num_given + fixed_NF.shape[1],
        )

    def _fixed(self, group_N: Tensor) -> Tensor:
        """The fixed expert of each row, bool [N, F]; a row without True is routed."""
        if self.fixed_groups is None:
            return (group_N < 0).unsqueeze(-1)
        return group_N.unsqueeze(-1) == torch.tensor(self.fixed_groups, device=group_N.device)

    @staticmethod
    def _shifted(inner: Routing, num_fixed: int, length: int) -> Tensor | None:
        """Columns of the logits as they stand once those of fixed experts are put in before the nulls'."""
        if inner.column_M is None:
            return None
        column_M = inner.column_M + num_fixed * (inner.column_M >= inner.num_experts)
        return torch.cat([column_M, column_M.new_zeros(length - column_M.shape[0])])

    @staticmethod
    def _widened(values_NX: Tensor | None, fixed_NF: Tensor, at: int, off: float, on: float) -> Tensor | None:
        """Columns of fixed experts put in at ``at``: ``on`` for the row's own, ``off`` for the rest."""
        if values_NX is None:
            return None
        own_NF = torch.full_like(values_NX[:, :1], off).expand_as(fixed_NF).masked_fill(fixed_NF, on)
        values_NX = values_NX.masked_fill(fixed_NF.any(-1, keepdim=True), off)
        return torch.cat([values_NX[:, :at], own_NF, values_NX[:, at:]], dim=-1)


class MultiGate(RouterBase):
    r"""G gates over one bank: :math:`y_g = \sum_e w_{ge} E_e(x)`, each gate over the experts it is allowed to see.

    Args:
        scores: one score per gate; all have E columns.
        allowed: bool [G, E]; None lets every gate see all experts. What a gate does not see has weight exactly 0.
        weighing: softmax over the allowed experts, sigmoid, identity or ones; one for all gates or one per gate.

    Shape:
        features [N, d] read by all gates, [G, N, d], or a tuple of G tensors [N, d_g] -> weight [G, N, E].

    Raises:
        ValueError: if the sizes do not fit, or a gate sees nothing.

    Source: MMoE, CGC, PLE, HoME (docs/papers/core.md, equation 15; docs/papers/home.md, equation 1).

    Example:
        >>> from moeapps.moe.routers import LinearScore
        >>> gates = MultiGate([LinearScore(8, 3), LinearScore(8, 3)], allowed=[[True, True, False], [True, True, True]])
        >>> gates(torch.randn(5, 8)).weight.shape
        torch.Size([2, 5, 3])
    """

    sparse = False
    takes_gates = True
    allowed: Tensor | None

    def __init__(
        self,
        scores: Sequence[Score],
        *,
        allowed: Tensor | Sequence[Sequence[bool]] | None = None,
        weighing: DenseWeighing | Sequence[DenseWeighing] = "softmax",
    ) -> None:
        super().__init__()
        widths = {score.num_outputs for score in scores}
        if len(widths) != 1:
            raise ValueError(
                f"the gates have {sorted(widths)} columns; give at least one gate, all with one column per expert."
            )
        self.scores: nn.ModuleList = nn.ModuleList(scores)
        self.num_experts = widths.pop()
        self.weighing = [weighing] * len(scores) if isinstance(weighing, str) else list(weighing)
        wrong = [w for w in self.weighing if w not in ("softmax", "sigmoid", "identity", "ones")]
        if wrong or len(self.weighing) != len(scores):
            raise ValueError(
                f"weighing={weighing!r}: use softmax, sigmoid, identity or ones, one for all or one per gate."
            )
        table = allowed_table(allowed)
        if table is not None and table.shape != (len(scores), self.num_experts):
            raise ValueError(f"allowed is {tuple(table.shape)}, but it must be [{len(scores)}, {self.num_experts}].")
        self.register_buffer("allowed", table, persistent=False)
        self.pool = widest(*(score.pool for score in scores))
        self.adjust: Adjust | None = None

    @override
    def mean_k(self) -> float | None:
        return float(self.num_experts)

    @override
    def forward(
        self,
        features: Features,
        *,
        state: Tensor | None = None,
        token_mask: Tensor | None = None,
        group: Tensor | None = None,
    ) -> DenseRouting:
        with without_autocast(device_of(features)):
            read = self._per_gate(full_precision(features))
            logits = torch.stack([score(f, group=group) for score, f in zip(self.scores, read, strict=True)])
            if self.adjust is not None:
                logits = self.adjust(logits, features)
            allowed = None if self.allowed is None else self.allowed.unsqueeze(1)
            if token_mask is not None:
                allowed = token_mask.view(1, -1, 1) if allowed is None else allowed & token_mask.view(1, -1, 1)
            weight, probs = self._weights(logits, allowed)
        known = features if isinstance(features, Tensor) else None
        return DenseRouting(
            weight, self.num_experts, allowed=allowed, logits_NE=logits, probs_NE=probs, features_ND=known
        )

    def _per_gate(self, features: Features) -> Sequence[Tensor]:
        num_gates = len(self.scores)
        if isinstance(features, Tensor) and features.ndim == 2:
            return [features] * num_gates
        gates = features if isinstance(features, tuple) else features.unbind(0)
        if len(gates) != num_gates:
            raise ValueError(
                f"features for {len(gates)} gates, but there are {num_gates}: use [N, d], [G, N, d] or G tensors."
            )
        return gates

    def _weights(self, logits: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        if len(set(self.weighing)) == 1:
            return dense_weights(logits, self.weighing[0], allowed)
        masks = [None] * len(logits) if allowed is None else allowed.expand(len(logits), -1, -1).unbind(0)
        both = [dense_weights(x, w, m) for x, w, m in zip(logits, self.weighing, masks, strict=True)]
        return torch.stack([weight for weight, _ in both]), torch.stack([probs for _, probs in both])


class SumRouters(RouterBase):
    r"""The sum of several routings over one bank: weights add up (dense), or assignments are joined (sparse).

    The layer's output is the sum of what each routing would give. Logits, probabilities and features are those of the
    first router.

    Args:
        routers: at least two, all dense or all sparse by row, over equally many experts.

    Raises:
        ValueError: if they do not fit together.

    Source: HoME, gate plus self-gate (docs/papers/home.md, equation 6).

    Example:
        >>> from moeapps.moe.routers import Dense, LinearScore, Router
        >>> both = SumRouters([Router(LinearScore(8, 3), Dense()), Router(LinearScore(8, 3), Dense("sigmoid"))])
        >>> both(torch.randn(5, 8)).weight.shape
        torch.Size([5, 3])
    """

    def __init__(self, routers: Sequence[RouterBase]) -> None:
        super().__init__()
        kinds = {(router.num_experts, router.sparse, router.num_shared) for router in routers}
        if len(routers) < 2 or len(kinds) != 1:
            raise ValueError(
                f"got {len(routers)} routers of (experts, sparse, gated shared) {sorted(kinds)}; give at least two "
                "that agree."
            )
        self.num_experts, self.sparse, self.num_shared = kinds.pop()
        if self.num_shared:
            raise ValueError("SumRouters cannot add shared weights; use a chooser without gated shared experts.")
        self.takes_gates = any(router.takes_gates for router in routers)
        self.pool = widest(*(router.pool for router in routers))
        self.routers = nn.ModuleList(routers)

    def _each(self) -> list[RouterBase]:
        return [router for router in self.routers if isinstance(router, RouterBase)]

    def mean_k(self) -> float | None:
        """The sum for sparse routers; all experts for dense ones."""
        if not self.sparse:
            return float(self.num_experts)
        each = [router.mean_k() for router in self._each()]
        known = [k for k in each if k is not None]
        return sum(known) if len(known) == len(each) else None

    @override
    def forward(
        self,
        features: Features,
        *,
        state: Tensor | None = None,
        token_mask: Tensor | None = None,
        group: Tensor | None = None,
    ) -> AnyRouting:
        parts = [router(features, state=state, token_mask=token_mask, group=group) for router in self._each()]
        dense = [part for part in parts if isinstance(part, DenseRouting)]
        if len(dense) == len(parts):
            return self._dense(dense)
        sparse = [part for part in parts if isinstance(part, Routing) and part.top_k is not None]
        if len(sparse) < len(parts):
            raise ValueError(
                "SumRouters adds dense routings, or sparse ones with k experts per row; these are neither."
            )
        num_rows, k = sparse[0].num_rows, sum(part.top_k or 0 for part in sparse)

        def joined(name: str) -> Any:
            """Row by row what the parts have of that name, [M]; None unless all have it."""
            values = [getattr(part, name) for part in sparse]
            if any(value is None for value in values):
                return None
            return torch.cat([v.view(num_rows, -1) for v in values], -1).reshape(-1)

        return replace(
            sparse[0],
            row_M=torch.arange(num_rows * k, device=sparse[0].row_M.device) // k,
            expert_M=joined("expert_M"),
            weight_M=joined("weight_M"),
            top_k=k,
            null_M=joined("null_M"),
            column_M=joined("column_M"),
        )

    @staticmethod
    def _dense(parts: list[DenseRouting]) -> DenseRouting:
        weight = torch.stack(torch.broadcast_tensors(*(part.weight for part in parts))).sum(0)
        masks = [part.allowed for part in parts if part.allowed is not None]
        allowed = torch.stack(torch.broadcast_tensors(*masks)).any(0) if len(masks) == len(parts) else None
        return replace(parts[0], weight=weight, allowed=allowed)
