# SPDX-License-Identifier: Apache-2.0
"""Partitions of environments among experts: K-means on contexts, clusters matched to experts by loss.

What a partition remembers from call to call are buffers, so a checkpoint holds it.

Shape letters: N rows (environments), D feature width, E experts (as many clusters), R restarts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeapps.moe import Partition

# --- Functions --------------------------------------------------------------------------------------------------------


def mean_absolute_distance(features_ND: Tensor, centroids_ED: Tensor) -> Tensor:
    """Mean absolute difference of every row and centroid, [N, E]."""
    return (features_ND[:, None] - centroids_ED[None]).abs().mean(-1)


def cluster_means(features_ND: Tensor, labels_N: Tensor, num: int) -> Tensor:
    """Mean of the rows of each cluster, [num, D]; an empty cluster gives nan."""
    member_NE = F.one_hot(labels_N, num).to(features_ND.dtype)
    return member_NE.T @ features_ND / member_NE.sum(0)[:, None]


def published_kmeans(
    features_ND: Tensor, centroids_ED: Tensor, *, max_rounds: int = 20, tol: float = 1e-4
) -> tuple[Tensor, Tensor] | None:
    """Lloyd rounds that assign by mean absolute distance and update by the mean; None when they are abandoned.

    They are abandoned when a cluster is empty, and when the last allowed round is reached, even if it converged in it
    (a quirk of the published code which we keep here).

    Args:
        features_ND: rows.
        centroids_ED: where to start.
        max_rounds: allowed rounds; at least 2 are needed to succeed.
        tol: absolute tolerance on the centroids.

    Returns:
        Centroids [E, D] and labels int64 [N], or None.

    Source: MixER (docs/papers/mixer.md, equation 9).
    """
    num = centroids_ED.shape[0]
    for _ in range(max_rounds - 1):
        labels_N = mean_absolute_distance(features_ND, centroids_ED).argmin(1)
        if int(torch.bincount(labels_N, minlength=num).min()) == 0:
            return None
        updated_ED = cluster_means(features_ND, labels_N, num)
        if torch.allclose(updated_ED, centroids_ED, atol=tol):
            return updated_ED, labels_N
        centroids_ED = updated_ED
    return None


def kmeans_plus_plus(features_ND: Tensor, num: int, restarts: int) -> Tensor:
    """Starting centroids [R, num, D]: each next one is a row drawn in proportion to its squared distance so far.

    Source: Arthur and Vassilvitskii (2007), k-means++.
    """
    N = features_ND.shape[0]
    rows_RE = torch.randint(N, (restarts, 1), device=features_ND.device)
    for _ in range(num - 1):
        distance_RN = _squared(features_ND, features_ND[rows_RE]).amin(-1)
        distance_RN = distance_RN + distance_RN.sum(-1, keepdim=True).clamp_min(1e-30) * 1e-9  # all rows equal: any
        rows_RE = torch.cat([rows_RE, torch.multinomial(distance_RN, 1)], dim=1)
    return features_ND[rows_RE]


def kmeans(features_ND: Tensor, centroids_RED: Tensor, *, max_rounds: int = 20) -> tuple[Tensor, Tensor]:
    """Lloyd rounds (squared distance, mean) from several starts at once, without an empty cluster at the end.

    A cluster that ends empty takes the row that lies farthest from its own centroid, of a cluster that has another.

    Args:
        features_ND: rows, N >= E.
        centroids_RED: R starts.
        max_rounds: rounds at most.

    Returns:
        Labels int64 [R, N] and inertia [R], the sum of squared distances to the means.
    """
    num = centroids_RED.shape[1]
    labels_RN = _squared(features_ND, centroids_RED).argmin(-1)
    for _ in range(max_rounds):
        member_REN = F.one_hot(labels_RN, num).to(features_ND.dtype).transpose(1, 2)
        counts_RE1 = member_REN.sum(-1, keepdim=True)
        means_RED = member_REN @ features_ND / counts_RE1.clamp_min(1)
        centroids_RED = torch.where(counts_RE1 > 0, means_RED, centroids_RED)
        before, labels_RN = labels_RN, _squared(features_ND, centroids_RED).argmin(-1)
        if torch.equal(before, labels_RN):
            break
    for labels_N, centroids_ED in zip(labels_RN, centroids_RED, strict=True):
        _fill_empty(features_ND, labels_N, centroids_ED)
    means_RED = torch.stack([cluster_means(features_ND, labels_N, num) for labels_N in labels_RN])
    inertia_R = _squared(features_ND, means_RED).gather(-1, labels_RN[..., None]).sum((1, 2))
    return labels_RN, inertia_R


def _squared(features_ND: Tensor, centroids_RED: Tensor) -> Tensor:
    """Squared distances [R, N, E]."""
    return (features_ND[None, :, None] - centroids_RED[:, None]).square().sum(-1)


def _fill_empty(features_ND: Tensor, labels_N: Tensor, centroids_ED: Tensor) -> None:
    """Give every empty cluster the farthest row of a cluster with more than one, in place."""
    counts_E = torch.bincount(labels_N, minlength=centroids_ED.shape[0])
    for empty in (counts_E == 0).nonzero().flatten().tolist():
        distance_N = (features_ND - centroids_ED[labels_N]).square().sum(-1)
        row = int(distance_N.where(counts_E[labels_N] > 1, -1.0).argmax())
        counts_E[labels_N[row]] -= 1
        counts_E[empty] += 1
        labels_N[row] = empty
        centroids_ED[empty] = features_ND[row]


def cluster_costs(losses_NE: Tensor, labels_N: Tensor) -> Tensor:
    """Median loss of the rows of cluster j under expert e, [E, E]; the mean of the middle two for an even number."""
    num = losses_NE.shape[1]
    # quantile, not median: torch's median of an even number is the lower of the middle two
    return torch.stack([losses_NE[labels_N == j].quantile(0.5, dim=0) for j in range(num)])


def greedy_assignment(costs: Tensor) -> Tensor:
    """Expert of each cluster: clusters in order take the cheapest expert not yet taken; ties to the lowest index.

    Args:
        costs: [E, E], cluster by expert.

    Returns:
        int64 [E], a permutation.

    Source: MixER (docs/papers/mixer.md, equation 10).
    """
    free = costs.clone()
    taken = []
    for row in free:
        taken.append(int(row.argmin()))
        free[:, taken[-1]] = torch.inf
    return torch.tensor(taken, device=costs.device)


def optimal_assignment(costs: Tensor) -> Tensor:
    """Expert of each cluster so that the sum of costs is least.

    Args:
        costs: finite [E, E], cluster by expert.

    Returns:
        int64 [E], a permutation.
    """
    from scipy.optimize import linear_sum_assignment  # half a second, and a gate without clusters never asks

    experts = linear_sum_assignment(costs.double().cpu().numpy())[1]
    return torch.as_tensor(experts, device=costs.device)


# --- Partitions -------------------------------------------------------------------------------------------------------


class PublishedKMeans(Partition):
    """The published gate update: warm-started K-means that gives up easily, then a greedy match by median loss.

    Steps G1 to G5 of the published algorithm: start from the last centroids, or from U(-spread, spread) if there are
    none; at most ``max_rounds`` rounds of :func:`published_kmeans`; when abandoned the centroids are forgotten.

    Args:
        max_rounds: allowed rounds, at least 2.
        tol: absolute tolerance on the centroids.
        spread: half width of a random start, > 0.

    Raises:
        ValueError: a number outside its range.

    Source: MixER (docs/papers/mixer.md, equations 9 and 10).

    Example:
        >>> gate = PublishedKMeans()
        >>> gate(torch.zeros(4, 2), torch.rand(4, 2)) is None, int(gate.abandoned)  # equal rows leave a cluster empty
        (True, 1)
    """

    centroids: Tensor
    has_centroids: Tensor

    def __init__(self, max_rounds: int = 20, tol: float = 1e-4, spread: float = 1e-3) -> None:
        super().__init__()
        if max_rounds < 2 or not tol >= 0 or not spread > 0:
            raise ValueError(f"max_rounds={max_rounds}, tol={tol}, spread={spread}: use >= 2, >= 0 and > 0.")
        self.max_rounds, self.tol, self.spread = max_rounds, tol, spread
        self.register_buffer("centroids", torch.zeros(0, 0))
        self.register_buffer("has_centroids", torch.zeros((), dtype=torch.bool))

    def partition(self, features_ND: Tensor, losses_NE: Tensor | None) -> Tensor | None:
        """K-means, then the greedy match."""
        assert losses_NE is not None
        start_ED = self.centroids
        if not self.has_centroids:
            start_ED = features_ND.new_empty(losses_NE.shape[1], features_ND.shape[1])
            start_ED.uniform_(-self.spread, self.spread)
        found = published_kmeans(features_ND, start_ED, max_rounds=self.max_rounds, tol=self.tol)
        self.has_centroids.fill_(found is not None)
        if found is None:
            return None
        self.centroids, labels_N = found
        return greedy_assignment(cluster_costs(losses_NE, labels_N))[labels_N]


class RobustKMeans(Partition):
    """Ours: K-means++ restarts beside the warm start, optimal match by median loss, hysteresis, and a freeze.

    The old partition (the means of its clusters as a warm start) is one candidate, ``restarts`` K-means++ starts are
    the others. A restart replaces the warm start only if its inertia is lower by the share ``hysteresis``. No cluster
    is ever empty and no call is abandoned. After ``freeze_after`` calls in a row that gave the same partition it stays.

    Args:
        restarts: K-means++ starts per call, at least 1.
        max_rounds: Lloyd rounds at most.
        hysteresis: share by which a restart must beat the warm start, in [0, 1).
        freeze_after: equal calls in a row after which the partition is frozen; None never freezes.

    Raises:
        ValueError: a number outside its range.

    Example:
        >>> features, losses = torch.tensor([[0.0], [0.1], [5.0]]), torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
        >>> RobustKMeans()(features, losses).tolist()
        [1, 1, 0]
    """

    same_calls: Tensor

    def __init__(
        self, restarts: int = 8, max_rounds: int = 20, hysteresis: float = 0.1, freeze_after: int | None = 100
    ) -> None:
        super().__init__()
        if restarts < 1 or max_rounds < 1 or not 0 <= hysteresis < 1 or (freeze_after is not None and freeze_after < 1):
            raise ValueError(
                f"restarts={restarts}, max_rounds={max_rounds}, hysteresis={hysteresis}, freeze_after={freeze_after}: "
                "use 1 or more, 1 or more, a share in [0, 1), and 1 or more or None."
            )
        self.restarts, self.max_rounds = restarts, max_rounds
        self.hysteresis, self.freeze_after = hysteresis, freeze_after
        self.register_buffer("same_calls", torch.zeros((), dtype=torch.int64))

    @property
    def frozen(self) -> bool:
        """Whether the partition stays as it is."""
        return self.freeze_after is not None and int(self.same_calls) >= self.freeze_after

    @property
    def needs_losses(self) -> bool:
        """Not once it is frozen."""
        return not self.frozen

    def partition(self, features_ND: Tensor, losses_NE: Tensor | None) -> Tensor | None:
        """The frozen partition, or K-means and the optimal match."""
        if self.frozen:
            return self.labels
        assert losses_NE is not None
        num = losses_NE.shape[1]
        starts = [kmeans_plus_plus(features_ND, num, self.restarts)]
        known = len(self.labels) == len(features_ND)
        if known:
            starts.insert(0, cluster_means(features_ND, self.labels, num)[None])
        labels_RN, inertia_R = kmeans(features_ND, torch.cat(starts), max_rounds=self.max_rounds)
        if known:
            inertia_R = torch.cat([inertia_R[:1] * (1 - self.hysteresis), inertia_R[1:]])
        labels_N = labels_RN[int(inertia_R.argmin())]
        labels_N = optimal_assignment(cluster_costs(losses_NE, labels_N))[labels_N]
        same = known and torch.equal(labels_N, self.labels)
        self.same_calls.copy_((self.same_calls + 1) * int(same))
        return labels_N
