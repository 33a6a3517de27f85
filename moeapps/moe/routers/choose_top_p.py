# SPDX-License-Identifier: Apache-2.0
"""Top-p: each row takes as many experts as it needs, optionally within a mean budget over the batches."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from moeapps.moe.ranks import rows_of_all_ranks, sum_over_ranks
from moeapps.moe.routers.chooser import NullMass, Picked, RowChooser, is_recomputed, normalised

_LEAST = 1e-6  # threshold


class TopP(RowChooser):
    r"""Each row takes the smallest set of experts whose probabilities reach p, best first.

    Column j in descending order is taken iff :math:`\sum_{i<j} p_i < p`, so the one that crosses p is included, at
    least one is taken, and p = 1 takes all. A row takes at most :math:`\lfloor p X \rfloor + 1` of X columns (reached
    by uniform probabilities); that is the static K, and the rest of a row is padded with sentinels.

    Args:
        p: in (0, 1].
        num_null: null experts, whose logits are the last columns.
        max_k: never take more than this many.
        renormalise: divide the weights by the sum over the chosen; otherwise a weight is its probability.
        null_mass: as in :class:`TopK`.
        budget: mean number of real (not null) experts per row to hold; None leaves p as it is.
        decay: d, in [0, 1), how slowly p follows the budget.

    A fixed p does not fix the compute: the number of experts also depends on how sharp the logits are, and falls as a
    router grows sure. With a ``budget`` the buffer ``threshold`` stands for p, which is where it starts. In training it
    follows the p that would have met the budget in this batch: with :math:`v_{nj} = \sum_{i<j} p_i` of all real columns
    in ascending order, :math:`\theta \leftarrow d\,\theta + (1-d)\,v_{(N b)}`, after the choice, so that a batch never
    decides about itself. Evaluation never moves it, and a checkpoint holds it. As p moves, the static K is all columns
    (or ``max_k``). On several processes the batch is that of all of them together; masked rows are in none.

    Raises:
        ValueError: if p is not in (0, 1], ``max_k`` is below 1, the budget is not above 0 or the decay outside [0, 1);
            when the router is built, if the budget exceeds what a row can take.

    Source: Harder Tasks Need More Experts (docs/papers/core.md, equation 5): weights as they are; UniMoE-Audio
        (docs/papers/unimoe_audio.md, equations 1 and 2): with null experts, renormalised over the chosen ones, nulls
        included. The budget is ours; DTop-p (known to us by its abstract only) steers p by a PI controller, which needs
        two gains where a quantile needs none.

    Example:
        >>> choose = TopP(0.7)
        >>> _ = choose.bind(3)
        >>> choose(torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.05, 0.05]]).log()).counts().tolist()
        [2, 1, 0]
    """

    wide: ClassVar[tuple[str, ...]] = ("threshold", "used")
    threshold: Tensor | None
    used: Tensor | None

    def __init__(
        self,
        p: float,
        *,
        num_null: int = 0,
        max_k: int | None = None,
        renormalise: bool = False,
        null_mass: NullMass = "lost",
        budget: float | None = None,
        decay: float = 0.95,
    ) -> None:
        super().__init__()
        self._check_null(num_null, null_mass)
        if not 0 < p <= 1 or (max_k is not None and max_k < 1):
            raise ValueError(f"p={p}, max_k={max_k}: use 0 < p <= 1, and max_k >= 1 or None.")
        if (budget is not None and not budget > 0) or not 0 <= decay < 1:
            raise ValueError(f"budget={budget}, decay={decay}: use a budget above 0 or None, and 0 <= decay < 1.")
        self.p, self.max_k, self.renormalise = p, max_k, renormalise
        self.budget, self.decay = budget, decay
        start = None if budget is None else torch.tensor(p, dtype=torch.float32)
        self.register_buffer("threshold", start)
        # What the last forward in training chose by: activation checkpointing must choose by it again.
        self.register_buffer("used", None if start is None else start.clone(), persistent=False)

    def bind(self, num_outputs: int) -> int:
        """Check the budget against what a row can take."""
        num_experts = super().bind(num_outputs)
        most = num_experts if self.max_k is None else min(num_experts, self.max_k)
        if self.budget is not None and self.budget > most:
            raise ValueError(f"budget={self.budget}, but a row takes at most {most} experts; use a smaller budget.")
        return num_experts

    def mean_k(self) -> float | None:
        """The budget, which training approaches; None where the data decide."""
        return self.budget

    def pick(self, logits_NX: Tensor) -> Picked:
        """The smallest sets that reach p, or the threshold that stands for it."""
        probs_NX = logits_NX.softmax(-1)
        num = probs_NX.shape[-1]
        k = min(num, int(self.p * num) + 1 if self.threshold is None else num, self.max_k or num)
        index_NK = torch.sort(logits_NX.detach(), dim=-1, descending=True, stable=True).indices[:, :k]
        weight_NK = probs_NX.gather(-1, index_NK)
        before_NK = sum_before(weight_NK)
        threshold = self.used if self.training and is_recomputed() else self.threshold
        limit = self.p if threshold is None else threshold.to(before_NK.dtype)
        taken_NK = (before_NK < limit) | (limit >= 1)
        if self.renormalise:
            weight_NK = normalised(weight_NK, self._counted(index_NK, taken_NK))
        return Picked(index_NK, weight_NK, taken_NK, probs_NX)

    @torch.no_grad()
    def observe(self, picked: Picked, token_mask: Tensor | None) -> None:
        """Move the threshold towards the one that meets the budget on the rows that count."""
        if self.budget is None or self.threshold is None or self.used is None or not self.training or is_recomputed():
            return
        met = _threshold_for(self.budget, picked, self.num_experts, token_mask).to(self.threshold.dtype)
        self.used.copy_(self.threshold)
        moved = self.decay * self.threshold + (1 - self.decay) * met
        self.threshold.copy_(moved.where(met.isfinite(), self.threshold))

    def extra_repr(self) -> str:
        """The settings, for the printed module."""
        budget = "" if self.budget is None else f", budget={self.budget}"
        return f"p={self.p}, num_null={self.num_null}, max_k={self.max_k}, renormalise={self.renormalise}{budget}"


def _threshold_for(budget: float, picked: Picked, num_experts: int, token_mask: Tensor | None) -> Tensor:
    """The threshold that gives these rows ``budget`` real experts on average; nan without any row that counts.

    What lies below the threshold is taken, so it is put between the last sum within the budget and the first beyond.
    """
    index_NK = picked.index_NK
    rows_N = torch.ones_like(index_NK[:, 0], dtype=torch.bool) if token_mask is None else token_mask
    real_NK = (index_NK < num_experts) & rows_N.unsqueeze(-1)
    before_NK = sum_before(picked.probs_NX.gather(-1, index_NK)).where(real_NK, float("inf"))
    before_NK, rows = rows_of_all_ranks(before_NK), sum_over_ranks(rows_N.sum())
    ascending = nn.functional.pad(before_NK.flatten().sort().values, (0, 1), value=float("inf"))
    wanted = (rows * budget).round().long().clamp(max=before_NK.numel())
    around = ascending.gather(0, torch.stack([(wanted - 1).clamp(min=0), wanted]))
    return around.mean().clamp(_LEAST, 1.0).where(rows > 0, torch.nan)  # above 0: each row takes its best column


def sum_before(sorted_NK: Tensor) -> Tensor:
    """Sum of the probabilities before each, best first."""
    return nn.functional.pad(sorted_NK.detach().cumsum(-1)[:, :-1], (1, 0))
