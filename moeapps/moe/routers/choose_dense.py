# SPDX-License-Identifier: Apache-2.0
"""Choosers that use all experts: dense mixtures over all (allowed) ones, their sparse limit, and soft slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.moe.routers.chooser import Chooser, pairs_to_routing
from moeapps.moe.routing import DenseRouting, Routing, SlotRouting

DenseWeighing = Literal["softmax", "sigmoid", "identity", "ones"]


def dense_weights(logits: Tensor, weighing: DenseWeighing, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and probabilities [..., N, E] of a dense mixture; exactly 0 where not allowed.

    Args:
        logits: [..., N, E]; minus infinity has weight 0.
        weighing: how logits become weights.
        allowed: bool, broadcastable to ``logits``; a row with nothing allowed gets weights 0.
    """
    if weighing == "softmax":
        weight = logits.softmax(-1) if allowed is None else _softmax_over(logits, allowed)
        return weight, weight
    probs = logits.sigmoid()
    weight = probs
    if weighing != "sigmoid":  # raw and unit weights would not be 0 at a logit of minus infinity
        weight = (logits if weighing == "identity" else torch.ones_like(logits)).where(logits != float("-inf"), 0)
    return (weight, probs) if allowed is None else (weight.where(allowed, 0), probs.where(allowed, 0))


def _softmax_over(logits: Tensor, allowed: Tensor) -> Tensor:
    possible = allowed | ~allowed.any(-1, keepdim=True)  # keeps the softmax of an empty row finite
    return logits.masked_fill(~possible, float("-inf")).softmax(-1).where(allowed, 0)


def allowed_table(allowed: Tensor | Sequence[Sequence[bool]] | Sequence[bool] | None) -> Tensor | None:
    """A table of what is allowed as a bool tensor, every row of which allows something.

    Raises:
        ValueError: if a row allows nothing.
    """
    if allowed is None:
        return None
    table = torch.as_tensor(allowed).bool()
    if table.ndim not in (1, 2) or not bool(table.any(-1).all()):
        raise ValueError(
            f"allowed is {tuple(table.shape)}: it must be [E] or [rows, E], with an allowed expert in every row."
        )
    return table


class Dense(Chooser):
    r"""Every expert works on every row: :math:`y = \sum_e w_e E_e(x)` with a softmax, sigmoid, raw or unit weight.

    Args:
        weighing: ``softmax`` over the allowed experts, ``sigmoid``, ``identity`` (the raw score), or ``ones``.
        allowed: bool [E], which experts exist for every row; or [S, E], by the group id of the row (leave the domain's
            own expert out). None allows all.

    Raises:
        ValueError: for an unknown weighing, a row of ``allowed`` without an expert, or [S, E] without group ids.

    Source: MMoE (softmax), AW-MoE (identity), Meta-DMoE (ones, with the sample's own expert left out).

    Example:
        >>> choose = Dense(allowed=[True, True, False])
        >>> _ = choose.bind(3)
        >>> choose(torch.zeros(1, 3)).weight
        tensor([[0.5000, 0.5000, 0.0000]])
    """

    sparse: ClassVar[bool] = False
    allowed: Tensor | None

    def __init__(
        self,
        weighing: DenseWeighing = "softmax",
        allowed: Tensor | Sequence[Sequence[bool]] | Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        if weighing not in ("softmax", "sigmoid", "identity", "ones"):
            raise ValueError(f"weighing={weighing!r}; use softmax, sigmoid, identity or ones.")
        self.weighing = weighing
        self.register_buffer("allowed", allowed_table(allowed), persistent=False)

    @override
    def bind(self, num_outputs: int) -> int:
        num_experts = super().bind(num_outputs)
        if self.allowed is not None and self.allowed.shape[-1] != num_experts:
            raise ValueError(f"allowed has {self.allowed.shape[-1]} columns, but there are {num_experts} experts.")
        return num_experts

    def mean_k(self) -> float | None:
        """All experts, whatever their weights."""
        return float(self.num_experts)

    @override
    def forward(
        self, logits_NX: Tensor, *, token_mask: Tensor | None = None, group: Tensor | None = None
    ) -> DenseRouting:
        allowed = self.allowed
        if allowed is not None and allowed.ndim == 2:
            if group is None:
                raise ValueError("Dense(allowed=[S, E]) needs group=ids in 0..S-1; pass them to the layer.")
            allowed = allowed[group]
        if token_mask is not None:
            allowed = token_mask.unsqueeze(-1) if allowed is None else allowed & token_mask.unsqueeze(-1)
        weight_NE, probs_NE = dense_weights(logits_NX, self.weighing, allowed)
        return DenseRouting(weight_NE, self.num_experts, allowed=allowed, logits_NE=logits_NX, probs_NE=probs_NE)


class DenseToSparse(Chooser):
    r"""Each row takes every expert whose gate exceeds a threshold: all at first, fewer as the temperature falls.

    With gates :math:`g` = softmax of the logits: a pair is taken iff :math:`g_{ne} > \theta`, or it is the row's best;
    its weight is :math:`g_{ne}`, not renormalised. Give the router ``GumbelNoise(tau)`` and let a schedule lower tau.

    Args:
        threshold: theta, in [0, 1).

    Raises:
        ValueError: if the threshold is outside [0, 1).

    Source: EvoMoE (docs/papers/core.md, equation 17): threshold 0.001, tau about 2.0 to 0.3 (as generally known).

    Example:
        >>> choose = DenseToSparse(0.1)
        >>> _ = choose.bind(3)
        >>> choose(torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])).counts().tolist()
        [2, 1, 1]
    """

    def __init__(self, threshold: float = 0.001) -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold}, but it must be in [0, 1).")
        self.threshold = threshold

    @override
    def forward(self, logits_NX: Tensor, *, token_mask: Tensor | None = None, group: Tensor | None = None) -> Routing:
        probs_NE = logits_NX.softmax(-1)
        taken_NE = probs_NE > self.threshold
        if logits_NX.shape[0]:
            taken_NE = taken_NE.scatter(-1, logits_NX.argmax(-1, keepdim=True), True)
        if token_mask is not None:
            taken_NE = taken_NE & token_mask.unsqueeze(-1)
        return pairs_to_routing(taken_NE, probs_NE, logits_NX, probs_NE)


class Slots(Chooser):
    r"""Soft MoE: each expert works on S mixtures of rows, and each row reads a mixture of all slots.

    With logits :math:`L` [N, E S]: dispatch is the softmax of L over the rows, combine its softmax over the slots.
    Groups (samples) do not mix: with ``num_groups`` G each of them has its own S slots per expert.

    Args:
        num_slots: S, slots per expert (and group).
        num_groups: G; above 1 the layer needs group ids in 0..G-1.

    Raises:
        ValueError: if the columns of the score are not a multiple of S, or group ids are missing.

    Source: soft MoE (docs/papers/core.md, equation 16). Use ``CosineScore(dim, num_experts * num_slots)``.

    Example:
        >>> choose = Slots(2)
        >>> choose.bind(6)
        3
        >>> torch.allclose(choose(torch.randn(5, 6)).dispatch.sum(0), torch.ones(3, 2))
        True
    """

    def __init__(self, num_slots: int, *, num_groups: int = 1) -> None:
        super().__init__()
        if num_slots < 1 or num_groups < 1:
            raise ValueError(f"num_slots={num_slots}, num_groups={num_groups}, but both must be at least 1.")
        self.slots, self.num_groups = num_slots, num_groups
        self.pool = "batch" if num_groups == 1 else "group"

    def bind(self, num_outputs: int) -> int:
        """Divide the columns into experts of S slots."""
        if num_outputs % self.slots:
            raise ValueError(f"the score has {num_outputs} columns, not a multiple of num_slots={self.slots}.")
        return super().bind(num_outputs // self.slots)

    def forward(
        self, logits_NX: Tensor, *, token_mask: Tensor | None = None, group: Tensor | None = None
    ) -> SlotRouting:
        """Dispatch and combine [N, E, G S]; masked rows give nothing and read nothing."""
        logits_NES = logits_NX.unflatten(-1, (self.num_experts, self.slots))
        combine_NES = logits_NX.softmax(-1).view_as(logits_NES)
        if self.num_groups == 1 and token_mask is None:
            return SlotRouting(dispatch=logits_NES.softmax(0), combine=combine_NES, logits_NES=logits_NES)
        present_NG = self._present(logits_NX, token_mask, group)
        present = present_NG[:, None, :, None]
        wide = logits_NES.unsqueeze(2).expand(-1, -1, self.num_groups, -1)
        possible = present | ~present.any(0, keepdim=True)  # keeps the softmax of an empty group finite
        dispatch = wide.masked_fill(~possible, float("-inf")).softmax(0).where(present, 0)
        combine = combine_NES.unsqueeze(2).where(present, 0)
        return SlotRouting(dispatch=dispatch.flatten(2), combine=combine.flatten(2), logits_NES=logits_NES)

    def _present(self, logits_NX: Tensor, token_mask: Tensor | None, group: Tensor | None) -> Tensor:
        """Bool [N, G]: which rows each group mixes."""
        if self.num_groups > 1 and group is None:
            raise ValueError(f"Slots(num_groups={self.num_groups}) needs group=ids; pass them to the layer.")
        present_NG = logits_NX.new_ones(logits_NX.shape[0], 1, dtype=torch.bool)
        if self.num_groups > 1 and group is not None:
            present_NG = group.unsqueeze(-1) == torch.arange(self.num_groups, device=group.device)
        return present_NG if token_mask is None else present_NG & token_mask.unsqueeze(-1)
