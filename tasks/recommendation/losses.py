# SPDX-License-Identifier: Apache-2.0
"""Losses of list ranking: one label each, pairs, or the list at a time; and the contrast of gates.

Shape legend: B lists, N candidates, K width of what is contrasted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moeapps.moe.routers.router import without_autocast

RankingLoss = Literal["pointwise", "pairwise", "softmax"]
Similarity = Literal["cosine", "dot"]


def pointwise(logits_BN: Tensor, label_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean binary cross-entropy over the real candidates; 0 without any.

    Source: recalled as AW-MoE's (docs/papers/aw_moe.md, equation 6).
    """
    each_BN = F.binary_cross_entropy_with_logits(logits_BN, label_BN, reduction="none")
    return each_BN.where(mask_BN, 0).sum() / mask_BN.sum().clamp(min=1)


def pairwise(logits_BN: Tensor, label_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """BPR: mean of softplus(-(s+ - s-)) over all pairs of a taken and another candidate of one list; 0 without any.

    Source: S. Rendle et al., "BPR", UAI 2009.
    """
    positive_BN, negative_BN = mask_BN & (label_BN > 0), mask_BN & (label_BN <= 0)
    pair_BNN = positive_BN.unsqueeze(2) & negative_BN.unsqueeze(1)
    each_BNN = F.softplus(logits_BN.unsqueeze(1) - logits_BN.unsqueeze(2))
    return each_BNN.where(pair_BNN, 0).sum() / pair_BNN.sum().clamp(min=1)


def list_softmax(logits_BN: Tensor, label_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Sampled softmax: mean over the taken candidates of -log of their share among themselves and the list's others.

    Several taken candidates of one list do not compete. A list without a taken or without another candidate is left
    out; without any list it is 0. With one negative per positive it is `pairwise`.
    """
    positive_BN, negative_BN = mask_BN & (label_BN > 0), mask_BN & (label_BN <= 0)
    scored_B1 = negative_BN.any(1, keepdim=True)
    others_B1 = logits_BN.masked_fill(~negative_BN & scored_B1, float("-inf")).logsumexp(1, keepdim=True)
    counted_BN = positive_BN & scored_B1
    return F.softplus(others_B1 - logits_BN).where(counted_BN, 0).sum() / counted_BN.sum().clamp(min=1)


RANKING_LOSSES: dict[RankingLoss, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "pointwise": pointwise,
    "pairwise": pairwise,
    "softmax": list_softmax,
}


def scorable_lists(name: RankingLoss, label_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Return which lists a loss says something about, bool [B]: with a candidate, or with both kinds of them."""
    if name == "pointwise":
        return mask_BN.any(1)
    return (mask_BN & (label_BN > 0)).any(1) & (mask_BN & (label_BN <= 0)).any(1)


def info_nce(
    anchor_BK: Tensor,
    positive_BK: Tensor,
    user_B: Tensor,
    *,
    temperature: float = 0.1,
    similarity: Similarity = "cosine",
) -> Tensor:
    r"""InfoNCE, :math:`-\frac{1}{B} \sum_i \log \frac{e^{sim(g_i, g'_i) / \tau}}{\sum_j e^{sim(g_i, g'_j) / \tau}}`.

    The sum runs over i itself and the lists of other users: another list of the same user is no negative. 0 for
    one list and for none. In float32 at least, under any autocast.

    Args:
        anchor_BK: g.
        positive_BK: g', the other view of each.
        user_B: int64, whose each is.
        temperature: tau, above 0.
        similarity: ``cosine`` or ``dot``.

    Raises:
        ValueError: unknown similarity or a temperature not above 0.

    Source: AW-MoE (docs/papers/aw_moe.md, equation 5; recalled, the exclusion of the same user is inferred).
    """
    check_contrast(temperature, similarity)
    if len(anchor_BK) == 0:
        return anchor_BK.sum()
    exact = torch.promote_types(anchor_BK.dtype, torch.float32)
    # A similarity rounded to bfloat16 errs by 0.004, and over a small temperature by much more.
    with without_autocast(anchor_BK.device):
        anchor_BK, positive_BK = anchor_BK.to(exact), positive_BK.to(exact)
        if similarity == "cosine":
            anchor_BK, positive_BK = F.normalize(anchor_BK, dim=1), F.normalize(positive_BK, dim=1)
        logits_BB = anchor_BK @ positive_BK.t() / temperature
    same_BB = (user_B.unsqueeze(1) == user_B).fill_diagonal_(False)
    return F.cross_entropy(
        logits_BB.masked_fill(same_BB, float("-inf")), torch.arange(len(user_B), device=user_B.device)
    )


def check_contrast(temperature: float, similarity: str) -> None:
    """Refuse what `info_nce` cannot use.

    Raises:
        ValueError: unknown similarity or a temperature not above 0.
    """
    if temperature <= 0 or similarity not in ("cosine", "dot"):
        raise ValueError(
            f"temperature={temperature}, similarity={similarity!r}: give a temperature above 0, and cosine or dot"
        )


def random_mask(mask_BH: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Drop each past item with a probability, but never all of a history: one that would lose all keeps one at random.

    Args:
        mask_BH: bool, which past items are real.
        probability: p in [0, 1).
        generator: on the CPU; its own, so that no other draw moves.

    Source: AW-MoE's simulation of users with few behaviours (docs/papers/aw_moe.md, equation 5).
    """
    draw_BH = torch.rand(mask_BH.shape, generator=generator).to(mask_BH.device)
    kept_BH = mask_BH & (draw_BH >= probability)
    last_B1 = draw_BH.masked_fill(~mask_BH, -1.0).argmax(1, keepdim=True) if mask_BH.shape[1] else None
    if last_B1 is None:
        return kept_BH
    alone_BH = torch.zeros_like(mask_BH).scatter(1, last_B1, True) & mask_BH
    return kept_BH | (alone_BH & ~kept_BH.any(1, keepdim=True))
