# SPDX-License-Identifier: Apache-2.0
"""Scores of ranked lists: list-AUC, NDCG, MRR, GAUC by user, what a short history costs, how steady a gate is.

B lists, N candidates, E experts. What is not defined for a list (a list without a positive, or with nothing but
positives) is NaN and left out of means, never 0. Tied scores count as the mean over the orders of the tied, in the
reciprocal rank as half a place each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric, MetricCollection

from tasks.recommendation.metrics import gauc

TAIL = 5
"""Past items up to which a user belongs to the long tail."""
KEEP = 3
"""Past items that are left where a history is cut."""


def list_auc(score: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """Share of each list's pairs of a positive and a negative that stand in the right order; a tie counts one half.

    Args:
        score: float [B, N], larger ranks higher.
        label: [B, N], 0 or 1.
        mask: bool [B, N], False at padding.

    Returns:
        float64 [B]; NaN for a list without a positive or without a negative.

    Raises:
        ValueError: shapes that differ, or a real candidate's score that is not finite.
    """
    hits_BN, negatives_B1, label_BN = _negatives_below(score, label, mask)
    return (hits_BN * label_BN).sum(1) / (label_BN.sum(1) * negatives_B1.squeeze(1))


def reciprocal_rank(score: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """One over the rank of the best positive among the negatives, tied ones counting half; arguments as `list_auc`.

    Returns:
        float64 [B] in (0, 1]; NaN for a list without a positive.
    """
    hits_BN, negatives_B1, label_BN = _negatives_below(score, label, mask)
    rank_BN = (1 + negatives_B1 - hits_BN).masked_fill(label_BN == 0, torch.inf)
    best_B = rank_BN.amin(1)
    return (1 / best_B).masked_fill(best_B.isinf(), torch.nan)


def ndcg(score: Tensor, label: Tensor, mask: Tensor, k: int | None = None) -> Tensor:
    """Discounted gain of the first k candidates over the best possible one, gain = label; arguments as `list_auc`.

    A place r has discount 1 / log2(r + 1); tied candidates get the mean discount of their places.

    Returns:
        float64 [B] in [0, 1]; NaN for a list without a positive.

    Raises:
        ValueError: k below 1, and as `list_auc`.
    """
    if k is not None and k < 1:
        raise ValueError(f"k={k}: give 1 or more places, or None for all")
    score_BN, label_BN = _checked(score, label, mask)
    places = torch.arange(1, score_BN.shape[1] + 1, device=score_BN.device)
    discount_N = 1 / torch.log2(places.double() + 1)
    if k is not None:
        discount_N[k:] = 0
    total = torch.cat([discount_N.new_zeros(1), discount_N.cumsum(0)])  # discounts of the first r places
    below_BN, upto_BN = _ranks(score_BN, mask)
    above_BN, tied_BN = mask.sum(1, keepdim=True) - upto_BN, upto_BN - below_BN
    mean_BN = (total[(above_BN + tied_BN).clamp(min=0)] - total[above_BN.clamp(min=0)]) / tied_BN.clamp(min=1)
    return (mean_BN * label_BN).sum(1) / total[label_BN.sum(1).long()]


def expected_list_auc(score: Tensor, probability: Tensor, mask: Tensor) -> Tensor:
    """What `list_auc` is on average where each list has ONE positive, a candidate with the given probability.

    Args:
        score: float [B, N].
        probability: [B, N], rows sum to 1.
        mask: bool [B, N].

    Returns:
        float64 [B]; NaN for a list of one candidate or none. No score gives more than ``score = probability``.
    """
    score_BN, probability_BN = _checked(score, probability, mask)
    below_BN, upto_BN = _ranks(score_BN, mask)
    others_B1 = mask.sum(1, keepdim=True) - 1
    expected_B = ((below_BN + upto_BN - 1) / 2 / others_B1 * probability_BN).sum(1)
    return expected_B.where(others_B1.squeeze(1) > 0, torch.nan)


def gate_stability(gate: Tensor, other: Tensor, user: Tensor) -> tuple[Tensor, Tensor]:
    """How alike gate vectors are: of one list with two histories, and of lists of different users.

    Args:
        gate: float [B, E], gate vectors with the whole history.
        other: float [B, E], those of the same lists with a history cut or masked.
        user: int64 [B].

    Returns:
        Mean cosine between ``gate`` and ``other`` of a list, and between ``gate`` of all pairs of different users:
        float64 scalars in [-1, 1], NaN where there is no such pair. A vector of zeros has no direction and is left out.
    """
    unit_BE, other_BE = normalize(gate.double(), dim=1), normalize(other.double(), dim=1)
    there_B, both_B = gate.any(1), gate.any(1) & other.any(1)
    same = (unit_BE * other_BE).sum(1)[both_B].mean()
    names, of_row = torch.unique(user[there_B], return_inverse=True)
    sums_UE = unit_BE.new_zeros(len(names), gate.shape[1]).index_add_(0, of_row, unit_BE[there_B])
    count_U = torch.bincount(of_row, minlength=len(names)).double()
    pairs = count_U.sum().square() - count_U.square().sum()
    return same, (sums_UE.sum(0).square().sum() - sums_UE.square().sum()) / pairs


def user_parts(value: Tensor, user: Tensor) -> tuple[Tensor, Tensor]:
    """Prepare values of lists, [B], for intervals over users, see ``StepOutput.parts``; NaN counts nothing."""
    there = ~value.isnan()
    parts = torch.stack([value.nan_to_num(), there.to(value.dtype), there.to(value.dtype)], 1)
    return user, parts.unsqueeze(1)


def _checked(score: Tensor, label: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if not score.shape == label.shape == mask.shape or score.dim() != 2:
        raise ValueError(
            f"score {tuple(score.shape)}, label {tuple(label.shape)}, mask {tuple(mask.shape)}: all are [B, N]"
        )
    wrong = int((mask & ~score.isfinite()).sum())
    if wrong:
        raise ValueError(f"{wrong} of {int(mask.sum())} scores are not finite; look at the training loss")
    return score.double().masked_fill(~mask, 0), label.double().masked_fill(~mask, 0)


def _ranks(score_BN: Tensor, among_BN: Tensor) -> tuple[Tensor, Tensor]:
    """How many of ``among_BN`` have a lower score, and no higher one, [B, N] each."""
    ordered = score_BN.masked_fill(~among_BN, torch.inf).sort(1).values
    return torch.searchsorted(ordered, score_BN), torch.searchsorted(ordered, score_BN, right=True)


def _negatives_below(score: Tensor, label: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Negatives ranked below each candidate (ties half) [B, N], the number of negatives [B, 1], the labels [B, N]."""
    score_BN, label_BN = _checked(score, label, mask)
    negative_BN = mask & (label_BN == 0)
    below_BN, upto_BN = _ranks(score_BN, negative_BN)
    return (below_BN + upto_BN) / 2, negative_BN.sum(1, keepdim=True), label_BN


class ListMetrics(Metric):
    """All scores of the lists of one domain; NaN where undefined.

    * ``list_auc``, ``ndcg``, ``ndcg_<k>``, ``mrr``: means over lists; ``gauc``: AUC within users over all their
      candidates, weighted by their number.
    * ``list_auc_expected``: with the source's probabilities in place of labels, so without the noise of drawn labels;
      ``list_auc_ceiling``: the same of the probabilities themselves, which no model exceeds.
    * Long tail: ``list_auc_cold`` users without a past, ``list_auc_tail`` 1 to `TAIL` past items, ``list_auc_full``
      more. The last again with histories cut to the latest `KEEP` (``list_auc_truncated``) and to nothing
      (``list_auc_no_history``): the same lists, so ``truncation_gap`` = full - truncated is a paired comparison.
    * ``gate_same``, ``gate_between``: see `gate_stability`, of full users and their cut histories.

    Scores whose arguments are not given are left out.

    Args:
        cutoffs: the k of ``ndcg_<k>``.

    Attributes:
        larger_is_better: name of each score -> whether a larger one is better.
        scorable: after `compute`, lists with a positive and a negative.

    Shape:
        update(score [B, N], label [B, N], mask bool [B, N], user int64 [B], events int64 [B] past items, oracle [B, N],
        truncated [B, N] and no_history [B, N] scores with a cut history, gate [B, E], gate_truncated [B, E]);
        compute() -> name -> scalar.

    Raises:
        ValueError: a cutoff below 1.
    """

    is_differentiable = False
    full_state_update = False
    columns = (
        *("score", "label", "mask", "user", "events"),
        *("oracle", "truncated", "no_history", "gate", "gate_truncated"),
    )

    def __init__(self, cutoffs: Sequence[int] = (3,), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if min(cutoffs, default=1) < 1:
            raise ValueError(f"cutoffs={list(cutoffs)}: places count from 1")
        self.cutoffs, self.scorable = tuple(cutoffs), 0
        names = ["list_auc", "ndcg", *(f"ndcg_{k}" for k in self.cutoffs), "mrr", "gauc"]
        names += [f"list_auc_{part}" for part in ("expected", "ceiling", "cold", "tail", "full", "truncated")]
        self.larger_is_better = dict.fromkeys([*names, "list_auc_no_history", "gate_same"], True)
        self.larger_is_better |= {"truncation_gap": False, "gate_between": False}
        for name in self.columns:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        score: Tensor,
        label: Tensor,
        mask: Tensor,
        user: Tensor,
        events: Tensor,
        oracle: Tensor | None = None,
        truncated: Tensor | None = None,
        no_history: Tensor | None = None,
        gate: Tensor | None = None,
        gate_truncated: Tensor | None = None,
    ) -> None:
        """Keep one batch of the domain."""
        given = (score, label, mask, user, events, oracle, truncated, no_history, gate, gate_truncated)
        for name, values in zip(self.columns, given, strict=True):
            if values is not None:
                getattr(self, name).append(values.detach())

    def rows(self) -> dict[str, Tensor]:
        """Return what was kept, by the names of ``columns``."""
        kept = {name: getattr(self, name) for name in self.columns}
        return {n: torch.cat(list(v)) if isinstance(v, list) else v for n, v in kept.items() if len(v)}

    def compute(self) -> dict[str, Tensor]:
        """The scores over everything kept since the last reset."""
        rows = self.rows()
        if not rows:
            self.scorable = 0
            return {name: torch.tensor(torch.nan, dtype=torch.float64) for name in ("list_auc", "ndcg", "mrr", "gauc")}
        score, label, mask, user = (rows[name] for name in ("score", "label", "mask", "user"))
        auc_B = list_auc(score, label, mask)
        self.scorable = int((~auc_B.isnan()).sum())
        scores = {"list_auc": auc_B.nanmean(), "ndcg": ndcg(score, label, mask).nanmean()}
        scores |= {f"ndcg_{k}": ndcg(score, label, mask, k).nanmean() for k in self.cutoffs}
        scores["mrr"] = reciprocal_rank(score, label, mask).nanmean()
        whose = user.unsqueeze(1).expand_as(mask)
        scores["gauc"] = gauc(score.flatten(), label.flatten(), whose.flatten(), mask.flatten())
        if "oracle" in rows:
            scores["list_auc_expected"] = expected_list_auc(score, rows["oracle"], mask).nanmean()
            scores["list_auc_ceiling"] = expected_list_auc(rows["oracle"], rows["oracle"], mask).nanmean()
        return scores | _by_history(rows, auc_B)


def _by_history(rows: dict[str, Tensor], auc_B: Tensor) -> dict[str, Tensor]:
    events_B, full_B = rows["events"], rows["events"] > TAIL
    scores = {"list_auc_cold": auc_B[events_B == 0].nanmean()}
    scores["list_auc_tail"] = auc_B[(events_B > 0) & (events_B <= TAIL)].nanmean()
    scores["list_auc_full"] = auc_B[full_B].nanmean()
    for name in ("truncated", "no_history"):
        if name in rows:
            cut_B = list_auc(*(rows[part][full_B] for part in (name, "label", "mask")))
            scores[f"list_auc_{name}"] = cut_B.nanmean()
    if "truncated" in rows:
        scores["truncation_gap"] = scores["list_auc_full"] - scores["list_auc_truncated"]
    if "gate" in rows and "gate_truncated" in rows:
        found = gate_stability(*(rows[part][full_B] for part in ("gate", "gate_truncated", "user")))
        scores |= dict(zip(("gate_same", "gate_between"), found, strict=True))
    return scores


def list_metrics(cutoffs: Sequence[int] = (3,)) -> MetricCollection:
    """The collection of one domain; its names are those of `ListMetrics`."""
    return MetricCollection({"lists": ListMetrics(cutoffs)})
