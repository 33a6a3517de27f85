# SPDX-License-Identifier: Apache-2.0
"""Which past item activated which expert: the gate's sum over the history, taken apart; and what its vectors stand for.

Shape legend: B lists, H past items, K experts, L values of a factor, d width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from torch.sparse import check_sparse_tensor_invariants
from torchmetrics.functional.clustering import adjusted_rand_score

from moeapps.data.gather import Rows
from moeapps.moe.routers import AttentionScore
from tasks.recommendation.data.lists import Lists
from tasks.recommendation.model import ListRanker
from tasks.recommendation.nets.list_banks import ListScores


@dataclass
class GateSample(Rows):
    """Gates of some lists, each for the first candidate that the user took (the first of all where none was).

    Attributes:
        gate: float32 [B, K], weights of the experts.
        parts: float32 [B, H, K], what each past item added to the gate's logits; None for gates that read no history.
        factor: int64 [B], see `Lists`.
        events: int64 [B], number of past items.
        history_item: int64 [B, H], -1 at padding.
        item: int64 [B], the candidate.
        user: int64 [B].
        row: int64 [B].
        candidate_item: int64 [B, N], all candidates, -1 at padding; None where nobody asks for their ranking.
        logits: float32 [B, N], their scores.
        taken: bool [B, N], what the user took.
    """

    gate: Tensor
    parts: Tensor | None
    factor: Tensor
    events: Tensor
    history_item: Tensor
    item: Tensor
    user: Tensor
    row: Tensor
    candidate_item: Tensor | None = None
    logits: Tensor | None = None
    taken: Tensor | None = None


def gate_sample(net: ListRanker, batch: Lists) -> GateSample | None:
    """Run a network on lists and keep its gates; None for a network without experts. Gradients are off."""
    with torch.no_grad():
        scores: ListScores = net(batch)
        if scores.gate is None:
            return None
        taken_B = batch.label.argmax(1)
        place = torch.arange(len(batch), device=taken_B.device)
        shared = scores.gate.shape[1] == 1
        gate_BK = scores.gate[:, 0] if shared else scores.gate[place, taken_B]
        parts_BHK = contributions(net, scores, taken_B)
    kept = {
        "gate": gate_BK.float(),
        "parts": None if parts_BHK is None else parts_BHK.float(),
        "factor": batch.factor,
        "events": batch.history_mask.sum(1),
        "history_item": batch.history_item,
        "item": batch.candidate_item[place, taken_B],
        "user": batch.user,
        "row": batch.row,
        "candidate_item": batch.candidate_item,
        "logits": scores.logits.float(),
        "taken": batch.label > 0,
    }
    moved: dict[str, Any] = {name: None if part is None else part.cpu() for name, part in kept.items()}
    return GateSample(**moved)


def contributions(net: ListRanker, scores: ListScores, candidate_B: Tensor) -> Tensor | None:
    """What each past item adds to the logits of the gate, a_j GU_j, 0 at padding.

    With the prior they sum to the gate vector where its weights are not normalised.

    Args:
        net: the network.
        scores: what it said.
        candidate_B: int64 [B], the candidate whose gate is asked for.

    Returns:
        [B, H, K], or None for a gate that reads no history.
    """
    encoded, score = scores.encoded, net.moe.router.score
    if not isinstance(score, AttentionScore) or encoded is None:
        return None
    if net.reads == "target":
        key_Bd = encoded.target_BNd[torch.arange(len(candidate_B), device=candidate_B.device), candidate_B]
    elif net.reads == "query":
        key_Bd = cast(Tensor, encoded.query_Bd)
    else:
        key_Bd = torch.zeros_like(encoded.target_BNd[:, 0])
    return score.contributions((encoded.history_BHd, key_Bd, encoded.mask_BH))


def prior_of(sample: GateSample) -> Tensor | None:
    """The gate of a user without a past, [K]: what is left beside the past items, if that is the same for all lists.

    None for gates that read no history, that norm their weights, or without any list.
    """
    if sample.parts is None or len(sample.gate) == 0:
        return None
    left_BK = sample.gate - sample.parts.sum(1)
    return left_BK[0] if torch.allclose(left_BK, left_BK[:1], atol=1e-4) else None


def clusters(gate: Tensor, num: int, seed: int = 0) -> Tensor:
    """Group gate vectors by direction: k-means on vectors of unit length, the best of ten starts.

    Args:
        gate: float [B, K].
        num: groups; fewer come back where there are fewer different vectors.
        seed: of the starts.

    Returns:
        int64 [B].
    """
    from scipy.cluster.vq import kmeans, vq

    unit: NDArray[np.float64] = normalize(gate.double(), dim=1).numpy()
    num = min(num, len(np.unique(unit.round(9), axis=0)))
    centres, _ = kmeans(unit, num, iter=10, rng=np.random.default_rng(seed))
    return torch.from_numpy(vq(unit, centres)[0].astype(np.int64))


def gate_ari(gate: Tensor, factor: Tensor) -> float:
    """How well groups of gate vectors are the values of a factor: adjusted Rand index, 1 the same, 0 as chance.

    Args:
        gate: float [B, K].
        factor: int64 [B], -1 is left out.

    Returns:
        NaN where the factor has fewer than two values among the lists.
    """
    known = factor >= 0
    values = torch.unique(factor[known])
    if len(values) < 2:
        return float("nan")
    with check_sparse_tensor_invariants(False):  # torchmetrics' table is sparse, and warns unless this is said
        return float(adjusted_rand_score(clusters(gate[known], len(values)), factor[known]))


def mean_gates(gate: Tensor, factor: Tensor, num: int) -> Tensor:
    """Mean gate vector of each value of a factor: float64 [L, K], NaN for a value that does not occur."""
    known = factor >= 0
    sums = torch.zeros(num, gate.shape[1], dtype=torch.float64).index_add_(0, factor[known], gate[known].double())
    count = torch.bincount(factor[known], minlength=num).double()
    return sums / count.masked_fill(count == 0, torch.nan).unsqueeze(1)
