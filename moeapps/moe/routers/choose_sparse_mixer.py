# SPDX-License-Identifier: Apache-2.0
"""SparseMixer: experts are drawn one after the other, and each weight is learned as if its draw were a soft choice."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.moe.routers.choose_top_p import sum_before
from moeapps.moe.routers.chooser import Picked, RowChooser

_TINY = 1e-6  # in the sum of a row's weights, as released
_KEPT, _SMALL = 0.25, 0.3333  # how often a draw beside the best counts fully, and what it counts otherwise


class SparseMixer(RowChooser):
    r"""Each row draws k experts without replacement, k fixed or as many as reach p; near ties share a draw.

    In each draw the columns left whose logit lies within a relative gap of :math:`2\epsilon` of the best one left,
    :math:`(s_{best} - s_e) / \max(|s_e|, |s_{best}|) \le 2\epsilon`, are kept. Training adds fresh Gumbel noise to them
    and takes the largest; evaluation takes the best. With :math:`q` the softmax over the kept logits and c the column
    drawn, its multiplier is :math:`m = q_c`; in training a column other than the best counts only a third, but for a
    quarter of the draws. The gradient is always that of the whole :math:`q_c`,
    :math:`\partial m / \partial s = q_c (1_c - q)`. A weight is :math:`m / (\sum m + 10^{-6})` over the chosen, null
    experts included, whose share is lost.

    As mostly one column is kept, a row's weights are nearly equal, and the order of its logits says who is chosen
    rather than how much each counts.

    Args:
        k: experts per row, nulls included; None where ``p`` is given.
        p: in (0, 1]: as many as it takes to reach p (`TopP`); None where ``k`` is given.
        eps: half the relative gap, at least 0.
        num_null: null experts, whose logits are the last columns.
        renormalise: divide by the sum over the chosen; otherwise a weight is its multiplier (GRIN).
        draws: draw in training; without, training chooses and weighs as evaluation does.

    Raises:
        ValueError: unless exactly one of k and p is given and in its range, for a negative eps, for k = 1 when
            renormalised (every weight would be 1); when the router is built, for more experts than there are.

    Source: UniMoE-Audio, released code (docs/papers/unimoe_audio.md, equation 5): HITsz-TMG/Uni-MoE
        ``UniMoE-Audio/utils/UniMoE_Audio_core.py``, there with 0.3333 for a third; the estimator is SparseMixer-v2 of
        GRIN (Liu et al. 2024). Differs: at p = 1 a row takes all columns (there rounding may ask for one more).

    Example:
        >>> choose = SparseMixer(2).eval()
        >>> _ = choose.bind(3)
        >>> choose(torch.tensor([[0.0, 2.0, 1.0]])).expert_M.tolist()
        [1, 2]
    """

    def __init__(
        self,
        k: int | None = None,
        *,
        p: float | None = None,
        eps: float = 0.01,
        num_null: int = 0,
        renormalise: bool = True,
        draws: bool = True,
    ) -> None:
        super().__init__()
        self._check_null(num_null, "lost")
        if (k is None) == (p is None) or (k is not None and k < 1) or (p is not None and not 0 < p <= 1):
            raise ValueError(f"k={k}, p={p}: give either k >= 1 or 0 < p <= 1, and not both.")
        if not eps >= 0:
            raise ValueError(f"eps={eps}, but it must be at least 0.")
        if k == 1 and renormalise:
            raise ValueError("k=1 with renormalise=True gives every row the weight 1; use renormalise=False.")
        self.k, self.p, self.eps, self.renormalise, self.draws = k, p, eps, renormalise, draws

    @override
    def bind(self, num_outputs: int) -> int:
        num_experts = super().bind(num_outputs)
        if self.k is not None and self.k > num_experts + self.num_null:
            raise ValueError(
                f"k={self.k}, but there are only {num_experts} experts and {self.num_null} null experts; "
                f"use 1 <= k <= {num_experts + self.num_null}, or add experts."
            )
        return num_experts

    def mean_k(self) -> float | None:
        """K, unless null experts or probabilities decide."""
        return None if self.num_null or self.k is None else float(self.k)

    def pick(self, logits_NX: Tensor) -> Picked:
        """Draw after draw; a row that takes fewer than the most is padded."""
        probs_NX, num = logits_NX.softmax(-1), logits_NX.shape[-1]
        k = min(num, int((self.p or 0) * num) + 1) if self.k is None else self.k
        index_NK, weight_NK = _draws(logits_NX, k, self.eps, noisy=self.training and self.draws)
        taken_NK = logits_NX.gather(-1, index_NK) != float("-inf")  # a row may allow fewer than it draws
        if self.p is not None:
            sorted_NX = torch.sort(probs_NX.detach(), dim=-1, descending=True).values
            taken_NK = taken_NK & ((sum_before(sorted_NX)[:, :k] < self.p) | (self.p >= 1))
        weight_NK = weight_NK.where(taken_NK, 0)
        if self.renormalise:
            weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + _TINY)
        return Picked(index_NK, weight_NK, taken_NK, probs_NX)

    @override
    def extra_repr(self) -> str:
        chosen = f"k={self.k}" if self.p is None else f"p={self.p}"
        return f"{chosen}, eps={self.eps}, num_null={self.num_null}, renormalise={self.renormalise}"


def _draws(logits_NX: Tensor, k: int, eps: float, *, noisy: bool) -> tuple[Tensor, Tensor]:
    """Draw after draw: k different columns and their multipliers, [N, k] each.

    What is forbidden (minus infinity) is the last to be drawn, before what was: those would be drawn twice.
    """
    index: list[Tensor] = []
    weight: list[Tensor] = []
    logits_NX = left_NX = logits_NX.clamp(min=torch.finfo(logits_NX.dtype).min)
    for _ in range(k):
        index_N1, weight_N1 = _draw(logits_NX.detach(), left_NX, eps, noisy=noisy)
        left_NX = left_NX.scatter(-1, index_N1, float("-inf"))
        index.append(index_N1)
        weight.append(weight_N1)
    return torch.cat(index, -1), torch.cat(weight, -1)


def _draw(logits_NX: Tensor, left_NX: Tensor, eps: float, *, noisy: bool) -> tuple[Tensor, Tensor]:
    """One draw from the columns left (the others are at minus infinity): column and multiplier, [N, 1] each."""
    with torch.no_grad():
        best_N1 = left_NX.argmax(-1, keepdim=True) if len(left_NX) else left_NX.new_zeros(0, 1, dtype=torch.int64)
        top_N1 = left_NX.gather(-1, best_N1)
        far_NX = (top_N1 - logits_NX) > 2 * eps * logits_NX.abs().clamp(min=top_N1.abs())
    kept_NX = left_NX.masked_fill(far_NX, float("-inf"))
    share_NX = kept_NX.softmax(-1)
    if not noisy or not len(left_NX):
        return best_N1, share_NX.gather(-1, best_N1)
    with torch.no_grad():
        index_N1 = (kept_NX - torch.empty_like(kept_NX).exponential_().log()).argmax(-1, keepdim=True)
        full_N1 = (index_N1 == best_N1) | (torch.rand_like(top_N1) > 1 - _KEPT)
        scale_N1 = torch.ones_like(top_N1).where(full_N1, _SMALL)
    m_N1 = share_NX.gather(-1, index_N1)
    # The value of a part, the gradient of the whole: the estimator's backward pass.
    return index_N1, m_N1 - (1 - scale_N1) * m_N1.detach()
