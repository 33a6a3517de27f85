# SPDX-License-Identifier: Apache-2.0
"""Choosers by row: each row takes its own k experts, with the weighings that are allowed there."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.routers.chooser import Chooser, NullMass, Picked, RowChooser, normalised, rows_to_routing, top_indices
from moeapps.moe.routing import Routing

Weighing = Literal["softmax", "topk_softmax", "sigmoid", "identity", "ones"]


class TopK(RowChooser):
    r"""Each row takes its k best experts.

    With :math:`p` the softmax (or sigmoid) of the logits and :math:`I` the k chosen: ``softmax`` and ``sigmoid`` weigh
    by :math:`p_I`, divided by its sum when ``renormalise``; ``topk_softmax`` by the softmax over the chosen logits
    (equal to renormalised ``softmax``, but only chosen logits get gradient through it); ``identity`` by the raw score
    (cosine prototypes); ``ones`` by 1: no gradient for the score (tables, fitted gates). Weights are multiplied by
    ``scale``.

    Args:
        k: experts per row, nulls included, 1 <= k <= E + num_null.
        weighing: as above.
        renormalise: None means yes where it is legal and useful: k > 1 and ``softmax`` or ``sigmoid``.
        scale: factor on the weights.
        balance_bias: keep a float32 buffer ``bias`` [E], added to the scores for the selection only.
        num_null: null experts, whose logits are the last columns.
        null_mass: when renormalising, whether the weight of a chosen null expert is ``lost`` (the output shrinks) or
            ``redistributed`` over the real experts chosen (AdaMoE).

    Raises:
        ValueError: k = 1 with a weighing that would always give weight 1 although the score should learn; renormalised
            ``identity`` or ``ones``; k larger than what there is to choose from (when the router is built).

    Source: Switch, GShard, Mixtral, DeepSeek-V3, AdaMoE (docs/papers/core.md, equations 2, 3 and 6).

    Example:
        >>> choose = TopK(2)
        >>> _ = choose.bind(3)
        >>> choose(torch.tensor([[0.0, 2.0, 1.0]])).expert_M.tolist()
        [1, 2]
    """

    wide: ClassVar[tuple[str, ...]] = ("bias",)
    bias: Tensor | None

    def __init__(
        self,
        k: int,
        *,
        weighing: Weighing = "softmax",
        renormalise: bool | None = None,
        scale: float = 1.0,
        balance_bias: bool = False,
        num_null: int = 0,
        null_mass: NullMass = "lost",
    ) -> None:
        super().__init__()
        self._check_null(num_null, null_mass)
        self.k, self.weighing, self.scale, self.balance_bias = k, weighing, scale, balance_bias
        self.renormalise = k > 1 and weighing in ("softmax", "sigmoid") if renormalise is None else renormalise
        _check_weighing(k, weighing, self.renormalise)
        self.may_lack = weighing in ("identity", "ones")  # other weights are 0 at a logit of minus infinity
        self.sum_above_0 = weighing == "softmax" and num_null == 0 and not balance_bias  # of the k best of a softmax
        self.register_buffer("bias", None)

    def bind(self, num_outputs: int) -> int:
        """Check k against the number of columns and make room for the bias."""
        num_experts = super().bind(num_outputs)
        if self.k > num_experts + self.num_null:
            raise ValueError(
                f"top_k={self.k}, but there are only {num_experts} experts and {self.num_null} null experts; "
                f"use 1 <= top_k <= {num_experts + self.num_null}, or add experts."
            )
        if self.balance_bias and self.bias is None:
            self.bias = torch.zeros(num_experts, dtype=torch.float32)
        return num_experts

    def mean_k(self) -> float | None:
        """K, unless null experts may be chosen."""
        return None if self.num_null else float(self.k)

    def rank(self, logits_NX: Tensor, probs_NX: Tensor) -> Tensor:
        """The numbers that decide the selection: the logits, or with a bias the probabilities plus the bias."""
        if self.bias is None:
            return logits_NX
        by_probs = self.weighing in ("softmax", "sigmoid")  # there a bias must not bring back what is forbidden
        score = probs_NX.masked_fill(logits_NX == float("-inf"), float("-inf")) if by_probs else logits_NX
        return score + nn.functional.pad(self.bias, (0, self.num_null)).to(score.dtype)

    @override
    def pick(self, logits_NX: Tensor) -> Picked:
        probs_NX = logits_NX.sigmoid() if self.weighing == "sigmoid" else logits_NX.softmax(-1)
        rank_NX = self.rank(logits_NX, probs_NX)
        index_NK = top_indices(rank_NX, self.k)
        taken_NK = rank_NX.gather(-1, index_NK) != float("-inf") if self.may_lack else None
        source = probs_NX if self.weighing in ("softmax", "sigmoid") else logits_NX
        weight_NK = source.gather(-1, index_NK)
        if self.weighing == "topk_softmax":
            weight_NK = _softmax_of(weight_NK, self._counted(index_NK, taken_NK))
        if self.renormalise and self.sum_above_0:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        elif self.renormalise:
            weight_NK = normalised(weight_NK, self._counted(index_NK, taken_NK))
        if taken_NK is not None:
            weight_NK = (torch.ones_like(weight_NK) if self.weighing == "ones" else weight_NK).where(taken_NK, 0)
        return Picked(index_NK, weight_NK if self.scale == 1.0 else weight_NK * self.scale, taken_NK, probs_NX)

    @override
    def extra_repr(self) -> str:
        return f"k={self.k}, weighing={self.weighing!r}, renormalise={self.renormalise}, num_null={self.num_null}"


def _softmax_of(chosen_NK: Tensor, counted_NK: Tensor | None) -> Tensor:
    """Softmax over the counted logits of a row; a row without any stays finite (its weights are not used)."""
    if counted_NK is not None:
        counted_NK = counted_NK & (chosen_NK != float("-inf"))
        kept_NK = counted_NK | ~counted_NK.any(-1, keepdim=True)
        chosen_NK = chosen_NK.where(kept_NK, float("-inf"))
    return chosen_NK.softmax(-1)


def _check_weighing(k: int, weighing: str, renormalise: bool) -> None:
    if k < 1:
        raise ValueError(
            f"top_k={k}, but each row takes at least one expert; use top_k >= 1 (null experts allow none)."
        )
    if weighing not in ("softmax", "topk_softmax", "sigmoid", "identity", "ones"):
        raise ValueError(f"weighing={weighing!r}; use softmax, topk_softmax, sigmoid, identity or ones.")
    if k == 1 and (weighing == "topk_softmax" or (renormalise and weighing in ("softmax", "sigmoid"))):
        raise ValueError(
            f"top_k=1 with weighing={weighing!r} and renormalise={renormalise} gives every row the weight 1, so the "
            "router would get no gradient; use renormalise=False with 'softmax' or 'sigmoid', or weighing='ones' if "
            "that is what you want."
        )
    if renormalise and weighing in ("identity", "ones"):
        raise ValueError(f"renormalise=True is for softmax and sigmoid weights, not for weighing={weighing!r}.")


class GroupLimitedTopK(TopK):
    r"""Top-k among the experts of the best groups only.

    The E experts are cut into ``num_groups`` equal runs; a group scores the sum of its two best experts; the best
    ``keep_groups`` groups stay. The sum is of what the weights are made of (probabilities of ``softmax``,
    ``topk_softmax`` and ``sigmoid``, else logits), with the bias where there is one.

    Args:
        k: experts per row.
        num_groups: groups; divides E.
        keep_groups: groups that stay, at most ``num_groups``.
        weighing: as in :class:`TopK`.
        renormalise: as in :class:`TopK`.
        scale: as in :class:`TopK`.
        balance_bias: as in :class:`TopK`.

    Raises:
        ValueError: if the groups do not divide E, or hold fewer than k experts.

    Source: DeepSeek-V3, node-limited routing (docs/papers/core.md, equation 4).

    Example:
        >>> choose = GroupLimitedTopK(2, num_groups=2, keep_groups=1)
        >>> _ = choose.bind(4)
        >>> choose(torch.tensor([[3.0, 0.0, 2.0, 2.0]])).expert_M.tolist()  # 21.1 > 14.8 in units of exp(logit)
        [0, 1]
    """

    def __init__(
        self,
        k: int,
        *,
        num_groups: int,
        keep_groups: int,
        weighing: Weighing = "softmax",
        renormalise: bool | None = None,
        scale: float = 1.0,
        balance_bias: bool = False,
    ) -> None:
        super().__init__(k, weighing=weighing, renormalise=renormalise, scale=scale, balance_bias=balance_bias)
        if not 1 <= keep_groups <= num_groups:
            raise ValueError(f"keep_groups={keep_groups}, but it must be from 1 to num_groups={num_groups}.")
        self.num_groups, self.keep_groups = num_groups, keep_groups
        self.may_lack, self.sum_above_0 = True, False  # the groups that stay may allow fewer than k

    @override
    def bind(self, num_outputs: int) -> int:
        num_experts = super().bind(num_outputs)
        size, rest = divmod(num_experts, self.num_groups)
        if rest or self.k > size * self.keep_groups:
            raise ValueError(
                f"{num_experts} experts in {self.num_groups} groups, of which {self.keep_groups} stay: num_groups must "
                f"divide the experts, and the groups that stay must hold at least top_k={self.k}."
            )
        return num_experts

    def rank(self, logits_NX: Tensor, probs_NX: Tensor) -> Tensor:
        """The numbers that decide the selection, with all but the best groups at minus infinity."""
        score_NGe = super().rank(logits_NX, probs_NX).detach().unflatten(-1, (self.num_groups, -1))
        summed_NGe = score_NGe
        if self.bias is None and self.weighing in ("softmax", "topk_softmax", "sigmoid"):
            summed_NGe = probs_NX.detach().unflatten(-1, (self.num_groups, -1))  # logits order experts, not their sums
        best_NGb = summed_NGe.topk(min(2, summed_NGe.shape[-1]), dim=-1).values
        if summed_NGe is score_NGe:  # what is forbidden adds nothing; a group of nothing else comes last
            best_NGb = best_NGb.where((best_NGb != float("-inf")) | (best_NGb[..., :1] == float("-inf")), 0)
        best_NG = best_NGb.sum(-1)
        kept_NG = torch.zeros_like(best_NG, dtype=torch.bool).scatter(-1, top_indices(best_NG, self.keep_groups), True)
        masked_NE: Tensor = score_NGe.masked_fill(~kept_NG.unsqueeze(-1), float("-inf")).flatten(-2)
        return masked_NE


class GatedShared(Chooser):
    r"""Weigh routed and shared experts by one softmax over the chosen and the shared logits.

    With :math:`a` that softmax, shared expert s gets :math:`a_s`; the weights of the inner chooser are multiplied by
    :math:`\sum_{chosen} a` (null experts included), so that routed, null and shared weights sum to 1 when the inner
    ones do.

    Args:
        choose: chooser by row for the routed (and null) columns.
        num_shared: shared experts; their logits are the last columns of the score.

    Raises:
        ValueError: if ``num_shared`` is below 1.

    Source: UniMoE-Audio, released code (docs/papers/unimoe_audio.md, equation 3); ``shared_weighting: gated`` there.

    Example:
        >>> choose = GatedShared(TopK(2), num_shared=1)
        >>> choose.bind(4)
        3
        >>> r = choose(torch.zeros(1, 4))
        >>> [round(float(w), 3) for w in (*r.weight_M, *r.shared_weight_NS[0])]
        [0.333, 0.333, 0.333]
    """

    by_row: ClassVar[bool] = True

    def __init__(self, choose: RowChooser, num_shared: int) -> None:
        super().__init__()
        if num_shared < 1:
            raise ValueError(f"num_shared={num_shared}, but GatedShared weighs at least one; otherwise leave it out.")
        self.choose, self.num_shared, self.num_null = choose, num_shared, choose.num_null
        self.pool = choose.pool

    def bind(self, num_outputs: int) -> int:
        """Bind the inner chooser to the columns before the shared ones."""
        num_experts = super().bind(num_outputs)
        self.choose.bind(num_outputs - self.num_shared)
        return num_experts

    @override
    def mean_k(self) -> float | None:
        return self.choose.mean_k()

    @override
    def forward(self, logits_NX: Tensor, *, token_mask: Tensor | None = None, group: Tensor | None = None) -> Routing:
        routable_NX, shared_NS = logits_NX.tensor_split([logits_NX.shape[-1] - self.num_shared], dim=-1)
        picked = self.choose.limit(self.choose.pick(routable_NX), routable_NX, token_mask)
        chosen_NK = routable_NX.gather(-1, picked.index_NK)
        if picked.taken_NK is not None:
            chosen_NK = chosen_NK.where(picked.taken_NK, float("-inf"))
        self.choose.observe(picked, token_mask)
        gate = torch.cat([chosen_NK, shared_NS], -1).softmax(-1)
        mass_N1 = gate[:, : chosen_NK.shape[-1]].sum(-1, keepdim=True)
        picked = replace(picked, weight_NK=picked.weight_NK * mass_N1)
        all_real = self.num_null == 0
        routing = rows_to_routing(picked, self.num_experts, token_mask, all_real=all_real, logits_NX=routable_NX)
        shared_weight_NS = gate[:, chosen_NK.shape[-1] :]
        if token_mask is not None:
            shared_weight_NS = shared_weight_NS.where(token_mask.unsqueeze(-1), 0)
        return replace(routing, shared_weight_NS=shared_weight_NS)
