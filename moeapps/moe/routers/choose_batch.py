# SPDX-License-Identifier: Apache-2.0
"""Choosers by expert: experts take rows. They look at the whole batch (or group) and do not suit causal models."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.moe.ranks import rows_of_all_ranks, sum_over_ranks
from moeapps.moe.routers.chooser import Chooser, is_recomputed, pairs_to_routing, rows_that_count, share_of
from moeapps.moe.routing import Routing
from moeapps.moe.wide import WideBuffers, wide_dtype

BatchWeighing = Literal["softmax", "sigmoid", "identity"]
ChoiceWeighing = Literal["softmax", "row_softmax", "sigmoid", "identity"]


class _BatchChooser(Chooser):
    """What choosers among the rows of a batch share."""

    capacity_factor: float
    weighing: ChoiceWeighing

    def mean_k(self) -> float | None:
        """The capacity factor, which training holds (and a threshold approaches in evaluation)."""
        return min(self.capacity_factor, float(self.num_experts))

    def _gates(self, logits_NE: Tensor, token_mask: Tensor | None, group_N: Tensor | None = None) -> list[Tensor]:
        """Weights, probabilities, and the scores that decide (minus infinity in masked rows)."""
        probs_NE = logits_NE.softmax(-1)
        weight_NE = probs_NE
        if self.weighing == "row_softmax":
            weight_NE = _row_softmax(logits_NE, group_N, token_mask)
        elif self.weighing != "softmax":
            weight_NE = logits_NE if self.weighing == "identity" else logits_NE.sigmoid()
        score_NE = weight_NE.detach()
        if token_mask is not None:
            score_NE = score_NE.masked_fill(~token_mask.unsqueeze(-1), float("-inf"))
        return [weight_NE, probs_NE, score_NE]


def _row_softmax(logits_NE: Tensor, group_N: Tensor | None, token_mask: Tensor | None) -> Tensor:
    """Softmax per expert over the unmasked rows of each group (or of all); 0 for masked rows."""
    if token_mask is not None:
        logits_NE = logits_NE.masked_fill(~token_mask.unsqueeze(-1), float("-inf"))
    if group_N is None or logits_NE.shape[0] == 0:
        place_NE = torch.zeros_like(logits_NE, dtype=torch.int64)
        num_groups = 1
    else:
        ids, place_N = torch.unique(group_N, return_inverse=True)
        place_NE, num_groups = place_N.unsqueeze(-1).expand_as(logits_NE), len(ids)
    start_GE = logits_NE.new_full((num_groups, logits_NE.shape[1]), float("-inf"))
    most_GE = start_GE.scatter_reduce(0, place_NE, logits_NE.detach(), "amax")
    most_GE = most_GE.where(most_GE.isfinite(), 0)  # no row of the group counts
    share_NE = (logits_NE - most_GE.gather(0, place_NE)).exp()
    total_GE = torch.zeros_like(start_GE).scatter_add(0, place_NE, share_NE)
    return share_NE / total_GE.where(total_GE > 0, 1).gather(0, place_NE)


def _check(capacity_factor: float, weighing: str, known: tuple[str, ...]) -> None:
    if not capacity_factor > 0 or weighing not in known:
        raise ValueError(
            f"capacity_factor={capacity_factor}, weighing={weighing!r}: use a factor above 0 (the mean number of "
            f"experts per row) and one of {', '.join(known)}."
        )


def _rank_in_group(score_NE: Tensor, group_N: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rank of each row in its group, by descending logit per expert; number of unmasked rows in the group."""
    num_rows = score_NE.shape[0]
    by_score_NE = torch.sort(score_NE, dim=0, descending=True, stable=True).indices
    by_group_NE = torch.sort(group_N[by_score_NE], dim=0, stable=True).indices
    order_NE = by_score_NE.gather(0, by_group_NE)
    sorted_group_N, by_id_N = torch.sort(group_N, stable=True)
    start_N = torch.searchsorted(sorted_group_N, sorted_group_N)
    counted_N = torch.ones_like(group_N) if token_mask is None else token_mask.long()
    before_N = torch.nn.functional.pad(counted_N[by_id_N].cumsum(0), (1, 0))
    first_N, end_N = (torch.searchsorted(sorted_group_N, group_N, right=right) for right in (False, True))
    size_N = before_N[end_N] - before_N[first_N]
    place_N1 = (torch.arange(num_rows, device=group_N.device) - start_N).unsqueeze(-1)
    return torch.zeros_like(order_NE).scatter(0, order_NE, place_N1.expand_as(order_NE)), size_N


class ExpertChoice(_BatchChooser):
    r"""Each expert takes its :math:`C = \lfloor N c / E \rfloor` best rows, at least 1, of the N that are not masked.

    The balance is perfect; a row may get anything from 0 to E experts.

    Args:
        capacity_factor: c, the mean number of experts per row.
        per: choose among all rows (``batch``) or among the rows of each ``group`` apart (``group``; rows of other
            groups then change nothing).
        weighing: ``softmax`` over experts, ``row_softmax`` over the rows that an expert chooses among, ``sigmoid``, or
            ``identity`` (the raw score); selection goes by the same.

    Raises:
        ValueError: for a factor not above 0, an unknown weighing, or ``per="group"`` without group ids.

    Source: expert choice routing (docs/papers/core.md, equation 7); ProMoE-EC (docs/papers/promoe.md, equation 5): per
        image, identity, and of its ablations ``row_softmax``: ali-vilab/ProMoE ``models/models_ProMoE_EC.py``.

    Example:
        >>> choose = ExpertChoice(1.0)
        >>> _ = choose.bind(2)
        >>> choose(torch.randn(6, 2)).counts().tolist()
        [3, 3]
    """

    def __init__(
        self,
        capacity_factor: float,
        *,
        per: Literal["group", "batch"] = "batch",
        weighing: ChoiceWeighing = "softmax",
    ) -> None:
        super().__init__()
        _check(capacity_factor, weighing, get_args(ChoiceWeighing))
        if per not in ("group", "batch"):
            raise ValueError(f"per={per!r}, but it must be 'group' or 'batch'.")
        self.capacity_factor, self.per, self.weighing = capacity_factor, per, weighing
        self.pool = per

    def forward(self, logits_NX: Tensor, *, token_mask: Tensor | None = None, group: Tensor | None = None) -> Routing:
        """The rows each expert takes; masked rows neither count nor are taken."""
        own = group if self.per == "group" else None
        weight_NE, probs_NE, score_NE = self._gates(logits_NX, token_mask, own)
        if self.per == "group":
            if group is None:
                raise ValueError(
                    "ExpertChoice(per='group') needs group=ids; pass them to the layer or use per='batch'."
                )
            rank_NE, size_N = _rank_in_group(score_NE, group, token_mask)
            capacity_N = share_of(size_N, self.capacity_factor, self.num_experts)
            taken_NE = (rank_NE < capacity_N.unsqueeze(-1)) & score_NE.isfinite()
            return pairs_to_routing(taken_NE, weight_NE, logits_NX, probs_NE)
        capacity = None if token_mask is None else share_of(token_mask.sum(), self.capacity_factor, self.num_experts)
        return self._batch(weight_NE, score_NE, capacity, logits_NX, probs_NE)

    def _batch(
        self, weight_NE: Tensor, score_NE: Tensor, capacity: Tensor | None, logits_NE: Tensor, probs_NE: Tensor
    ) -> Routing:
        """The best rows of the batch: places for as many as all rows would give, filled up to ``capacity``."""
        num_rows, num_experts = weight_NE.shape
        c = min(num_rows, max(1, int(num_rows * self.capacity_factor / num_experts)))
        row_EC = torch.sort(score_NE, dim=0, descending=True, stable=True).indices[:c].T
        real_EC = score_NE.T.gather(1, row_EC).isfinite()
        if capacity is not None:
            real_EC = real_EC & (torch.arange(c, device=row_EC.device) < capacity)
        expert_EC = torch.arange(num_experts, device=row_EC.device).unsqueeze(-1).expand_as(row_EC)
        return Routing(
            row_M=row_EC.reshape(-1),
            expert_M=expert_EC.where(real_EC, num_experts).reshape(-1),
            weight_M=weight_NE.T.gather(1, row_EC).where(real_EC, 0).reshape(-1),
            num_rows=num_rows,
            num_experts=num_experts,
            logits_NE=logits_NE,
            probs_NE=probs_NE,
        )


class Threshold(WideBuffers, _BatchChooser):
    r"""Choice over the whole batch in training, by a learned threshold in evaluation.

    Training, ``scope="expert"``: each expert takes its :math:`C = \lfloor N c / E \rfloor` best rows; the buffer
    ``threshold`` [E] follows the C-th best score: :math:`\theta \leftarrow d\,\theta + (1-d)\,s_{(C)}`.
    ``scope="pairs"``: the :math:`\lfloor N c \rfloor` best of all N E pairs are taken, with one threshold. Evaluation:
    a pair is taken iff its score reaches the threshold, so a row's experts do not depend on its batch.

    N counts the rows that are not masked. On several processes each takes its own best rows, and the threshold follows
    the score that would be the last one taken of all of them together.

    Args:
        capacity_factor: c, the mean number of experts per row in training.
        scope: as above.
        weighing: ``softmax``, ``sigmoid`` or ``identity``; selection goes by the same.
        decay: d, in [0, 1).

    Raises:
        ValueError: for a factor not above 0 or a decay outside [0, 1).

    Source: DiffMoE (``expert``; docs/papers/promoe.md, equation 13: decay 0.95, start 0. Its capacity predictor, a
        second network trained to guess the selection, is left out: the score itself is compared) and Expert Race
        (``pairs``, ``identity``).

    Example:
        >>> choose = Threshold(1.0)
        >>> _ = choose.bind(2)
        >>> choose(torch.randn(6, 2)).counts().tolist()
        [3, 3]
    """

    wide: ClassVar[tuple[str, ...]] = ("threshold",)
    threshold: Tensor

    def __init__(
        self,
        capacity_factor: float,
        *,
        scope: Literal["expert", "pairs"] = "expert",
        weighing: BatchWeighing = "softmax",
        decay: float = 0.95,
    ) -> None:
        super().__init__()
        _check(capacity_factor, weighing, get_args(BatchWeighing))
        if scope not in ("expert", "pairs") or not 0 <= decay < 1:
            raise ValueError(f"scope={scope!r}, decay={decay}: use 'expert' or 'pairs', and 0 <= decay < 1.")
        self.capacity_factor, self.scope, self.weighing, self.decay = capacity_factor, scope, weighing, decay
        self.register_buffer("threshold", torch.zeros(1, dtype=wide_dtype()))

    @override
    def bind(self, num_outputs: int) -> int:
        num_experts = super().bind(num_outputs)
        self.threshold = torch.zeros(num_experts if self.scope == "expert" else 1, dtype=wide_dtype())
        return num_experts

    @override
    def forward(self, logits_NX: Tensor, *, token_mask: Tensor | None = None, group: Tensor | None = None) -> Routing:
        weight_NE, probs_NE, score_NE = self._gates(logits_NX, token_mask)
        rows = rows_that_count(score_NE, token_mask)
        taken_NE = self._best(score_NE, rows) if self.training else score_NE >= self.threshold.to(score_NE.dtype)
        return pairs_to_routing(taken_NE & score_NE.isfinite(), weight_NE, logits_NX, probs_NE)

    def _best(self, score_NE: Tensor, rows: Tensor) -> Tensor:
        """The best pairs of this batch, of which ``rows`` count; moves the thresholds."""
        flat = score_NE if self.scope == "expert" else score_NE.reshape(-1, 1)
        order = torch.sort(flat, dim=0, descending=True, stable=True)
        if not is_recomputed():  # once per forward
            joint = rows_of_all_ranks(flat)
            descending = order.values if joint is flat else joint.sort(dim=0, descending=True).values
            self._follow(descending, self._places(sum_over_ranks(rows)))
        place_N1 = torch.arange(flat.shape[0], device=flat.device).unsqueeze(-1)
        taken = torch.zeros_like(flat, dtype=torch.bool)
        return taken.scatter(0, order.indices, (place_N1 < self._places(rows)).expand_as(flat)).view_as(score_NE)

    def _places(self, rows: Tensor) -> Tensor:
        """How many pairs of a column are taken of so many rows."""
        divisor, pairs = (self.num_experts, 1) if self.scope == "expert" else (1, self.num_experts)
        return share_of(rows, self.capacity_factor, divisor).minimum(rows * pairs)

    def _follow(self, descending: Tensor, c: Tensor) -> None:
        """Move the thresholds towards the c-th best logit; without any row they stay."""
        if not descending.shape[0]:
            return
        last = descending.index_select(0, (c - 1).clamp(min=0).view(1))[0].to(self.threshold.dtype)
        moved = self.decay * self.threshold + (1 - self.decay) * last
        self.threshold.copy_(moved.where(last.isfinite(), self.threshold))
