# SPDX-License-Identifier: Apache-2.0
"""A ceiling on the rows of every column, nulls included, before the weights are divided by their sum."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from moeapps.moe.routers.chooser import Picked, Pool, RowChooser, rows_that_count

_TINY = 1e-6  # in the sums of a row's weights, as released


class Capped(RowChooser):
    r"""Each column keeps its rows with the highest logits, and what a row keeps shares its weight anew.

    Of the N rows that count a column keeps at most :math:`C = \max(c_{min}, \lceil f N / X \rceil)`, X the number of
    columns, nulls included. What a row keeps takes over the weight of what it lost: weights are multiplied by
    :math:`t / (\sum_{kept} |w| + 10^{-6})`, t the ``scale`` of a ``choose`` that renormalises, otherwise the same sum
    over all that was asked for. Null experts are in neither where their mass is ``redistributed``. A row that loses
    nothing keeps its weights (up to that :math:`10^{-6}`); a row that keeps nothing gets nothing. Unlike `Capacity` it
    counts null experts and comes before `GatedShared`, whose softmax is then over what is left. Rows compete in
    evaluation as well: results depend on batch mates.

    Args:
        choose: what rows ask for.
        factor: f, above 0; no column overflows from X on.
        minimum: c_min, at least 1.

    Raises:
        ValueError: for a factor or minimum that is too small.

    Source: UniMoE-Audio, released code, off there (docs/papers/unimoe_audio.md, equation 18). Differs: masked rows are
        not counted, and balance losses see what is left.

    Example:
        >>> from moeapps.moe import TopK
        >>> choose = Capped(TopK(1, renormalise=False), factor=1.0, minimum=1)
        >>> _ = choose.bind(2)
        >>> choose(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).counts().tolist()
        [1, 0]
    """

    pool: Pool = "batch"

    def __init__(self, choose: RowChooser, factor: float, *, minimum: int = 8) -> None:
        super().__init__()
        if not factor > 0 or minimum < 1:
            raise ValueError(f"factor={factor}, minimum={minimum}: use a factor above 0 and a minimum of 1 or more.")
        self.choose, self.factor, self.minimum = choose, factor, minimum
        self.num_null, self.null_mass = choose.num_null, choose.null_mass

    @override
    def bind(self, num_outputs: int) -> int:
        self.choose.bind(num_outputs)
        return super().bind(num_outputs)

    @override
    def pick(self, logits_NX: Tensor) -> Picked:
        return self.choose.pick(logits_NX)

    @override
    def observe(self, picked: Picked, token_mask: Tensor | None) -> None:
        self.choose.observe(picked, token_mask)

    @override
    def limit(self, picked: Picked, logits_NX: Tensor, token_mask: Tensor | None) -> Picked:
        wanted_NK = torch.ones_like(picked.index_NK, dtype=torch.bool) if picked.taken_NK is None else picked.taken_NK
        wanted_NK = wanted_NK if token_mask is None else wanted_NK & token_mask.unsqueeze(-1)
        asked_NX = torch.zeros_like(logits_NX, dtype=torch.bool).scatter(-1, picked.index_NK, wanted_NK)
        score_NX = logits_NX.detach().masked_fill(~asked_NX, float("-inf"))
        order_NX = torch.sort(score_NX, dim=0, descending=True, stable=True).indices
        place_N1 = torch.arange(len(logits_NX), device=logits_NX.device).unsqueeze(-1)
        rank_NX = torch.empty_like(order_NX).scatter(0, order_NX, place_N1.expand_as(order_NX))
        share = rows_that_count(logits_NX, token_mask).double() * self.factor / logits_NX.shape[-1]
        kept_NX = asked_NX & (rank_NX < share.ceil().clamp(min=self.minimum))
        kept_NK = kept_NX.gather(-1, picked.index_NK) & wanted_NK
        size_NK = picked.weight_NK.abs()
        if self.null_mass == "redistributed":
            size_NK = size_NK.where(picked.index_NK < self.num_experts, 0)
        total: Tensor | float = size_NK.where(wanted_NK, 0).sum(-1, keepdim=True) + _TINY
        if getattr(self.choose, "renormalise", False):
            total = getattr(self.choose, "scale", 1.0)
        left_N1 = size_NK.where(kept_NK, 0).sum(-1, keepdim=True) + _TINY
        return replace(picked, weight_NK=picked.weight_NK.where(kept_NK, 0) * total / left_N1, taken_NK=kept_NK)

    @override
    def extra_repr(self) -> str:
        return f"factor={self.factor}, minimum={self.minimum}"
