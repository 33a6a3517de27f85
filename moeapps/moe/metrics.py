# SPDX-License-Identifier: Apache-2.0
"""What a routing says about itself: load, sparsity, specialisation. Pure functions without gradient.

Load metrics take counts [E]; specialisation metrics take an assignment matrix [N, E] (counts, 0/1 or weights, for
instance ``routing.assignment()``) and labels [N]; two take a routing because they must tell "no work" from work.
Everything is computed in float64 on the device of the input; scalars come back as 0-dim tensors, so that nothing waits
for the device.

Shape suffixes: N rows, E experts, S labels or domains, M assignments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moeapps.moe.routing import Routing

_TINY = torch.finfo(torch.float64).tiny


@torch.no_grad()
def load(counts_E: Tensor) -> Tensor:
    """Give the load of each expert relative to the mean, c_e / mean(c): 1 when balanced, 0 without any work.

    Args:
        counts_E: Assignments per expert [E].

    Returns:
        float64 [E], in [0, E], mean 1.

    Example:
        >>> load(torch.tensor([6, 2, 1, 3])).tolist()
        [2.0, 0.6666666666666666, 0.3333333333333333, 1.0]
    """
    counts_E = _counts(counts_E)
    return counts_E * len(counts_E) / counts_E.sum().clamp_min(_TINY)


@torch.no_grad()
def max_violation(counts_E: Tensor) -> Tensor:
    """Give max_e c_e / mean(c) − 1: 0 when balanced, E − 1 when one expert takes everything.

    Source: Wang et al. (2024), auxiliary-loss-free load balancing, MaxVio (form as generally known; moe-core card,
        section 6).
    """
    return (load(counts_E).max() - 1.0).clamp_min(0.0)


@torch.no_grad()
def load_cv(counts_E: Tensor) -> Tensor:
    """Give the coefficient of variation of the load, population std over mean: 0 when balanced, at most √(E−1)."""
    return load(counts_E).std(correction=0)


@torch.no_grad()
def dead_fraction(counts_E: Tensor, threshold: float = 0.01) -> Tensor:
    """Give the fraction of experts with a load below ``threshold`` times the mean, in [0, 1].

    Args:
        counts_E: Assignments per expert [E].
        threshold: Fraction of the mean load below which an expert counts as dead; 0.01 by convention of the card.
    """
    return (load(counts_E) < threshold).double().mean()


@torch.no_grad()
def mean_k(routing: Routing, token_mask: Tensor | None = None) -> Tensor:
    """Give the mean number of experts that work per row: k, less drops and null experts; top-p makes it vary.

    Args:
        routing: A sparse routing.
        token_mask: bool [N]; rows with False do not count.
    """
    work_N = _work_per_row(routing)
    work_N = work_N if token_mask is None else work_N[token_mask]
    return work_N.sum() / max(1, len(work_N))


@torch.no_grad()
def drop_rate(routing: Routing, k: int, token_mask: Tensor | None = None) -> Tensor:
    """Give the fraction of the k asked-for assignments per row that do no work, in [0, 1].

    With a capacity these are drops, with null experts they are the share of nulls; a routing does not tell the two
    apart.

    Args:
        routing: A sparse routing of at most k assignments per counted row.
        k: Number of experts asked for per row.
        token_mask: bool [N]; rows with False do not count.

    Raises:
        ValueError: If ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: give the number of experts asked for per row, at least 1")
    return 1.0 - mean_k(routing, token_mask) / k


@torch.no_grad()
def token_entropy(probs_NE: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Give the mean over rows of the entropy of each row's probabilities, in nats per row, in [0, log E].

    Rows are normalised first, so sigmoid scores may be given.

    Args:
        probs_NE: Non-negative [N, E] (null columns included).
        token_mask: bool [N]; rows with False do not count.

    Returns:
        0-dim float64; 0 without rows.
    """
    probs_NE = _normalised(probs_NE if token_mask is None else probs_NE[token_mask])
    return _entr(probs_NE).sum(-1).sum() / max(1, len(probs_NE))


@torch.no_grad()
def contingency(assign_NE: Tensor, labels_N: Tensor, num_labels: int | None = None) -> Tensor:
    """Sum the assignments of the rows of each label: float64 [S, E].

    Args:
        assign_NE: Non-negative [N, E].
        labels_N: int64 [N]; rows with a negative label are left out.
        num_labels: S; the largest label plus one when None.

    Raises:
        ValueError: If the numbers of rows differ.
    """
    if labels_N.shape != assign_NE.shape[:1]:
        raise ValueError(
            f"labels {tuple(labels_N.shape)} do not fit assignments {tuple(assign_NE.shape)}: one label per row"
        )
    kept = labels_N >= 0
    labels_N, assign_NE = labels_N[kept], assign_NE[kept]
    size = num_labels if num_labels is not None else (int(labels_N.max()) + 1 if len(labels_N) else 0)
    table_SE = assign_NE.new_zeros(size, assign_NE.shape[1], dtype=torch.float64)
    return table_SE.index_add_(0, labels_N, assign_NE.double())


@torch.no_grad()
def expert_domain_matrix(assign_NE: Tensor, domain_N: Tensor, num_domains: int | None = None) -> Tensor:
    """Give p(expert | domain), how each domain spreads over the experts: float64 [S, E], rows sum to 1 (or 0 if empty).

    Args:
        assign_NE: Non-negative [N, E].
        domain_N: int64 [N]; rows with a negative domain are left out.
        num_domains: S; the largest domain id plus one when None.
    """
    return _normalised(contingency(assign_NE, domain_N, num_domains))


@torch.no_grad()
def mutual_information(assign_NE: Tensor, labels_N: Tensor) -> Tensor:
    """Give I(expert; label) / H(label): 0 when routing ignores the label, 1 when the expert tells it.

    Both are taken from one joint distribution p(label, expert) proportional to the assignments, so a row with more
    experts weighs more and the value stays in [0, 1]. One label only: 0, for there is nothing to tell.

    Args:
        assign_NE: Non-negative [N, E].
        labels_N: int64 [N]; rows with a negative label are left out.
    """
    joint_SE = contingency(assign_NE, labels_N)
    information, entropy = _information(joint_SE), _entropy(joint_SE.sum(1))
    # With one label both are 0 up to rounding, and their quotient could be anything.
    return torch.where(entropy > 1e-12, information / entropy.clamp_min(1e-12), 0.0)


@torch.no_grad()
def jensen_shannon_distance(table_SE: Tensor) -> Tensor:
    """Give the Jensen-Shannon distance between every two rows, √JSD in base 2: a metric in [0, 1], float64 [S, S].

    JSD(p, q) = H((p+q)/2) − (H(p) + H(q))/2. Rows are normalised; a row without mass is at distance NaN from all
    others.

    Args:
        table_SE: Non-negative [S, E], for instance `expert_domain_matrix`.

    Source: Endres and Schindelin (2003) for the metric property of the square root.
    """
    table_SE = _normalised(table_SE)
    table_SE = table_SE.masked_fill(table_SE.sum(1, keepdim=True) == 0, math.nan)
    entropy_S = _entr(table_SE).sum(-1)
    middle_SSE = 0.5 * (table_SE[:, None] + table_SE[None])
    jsd_SS = _entr(middle_SSE).sum(-1) - 0.5 * (entropy_S[:, None] + entropy_S[None])
    # Rounding leaves about 1e-16 on the diagonal; its square root would be 1e-8.
    jsd_SS = jsd_SS.fill_diagonal_(0.0).clamp_min(0.0) if not entropy_S.isnan().any() else jsd_SS.clamp_min(0.0)
    return (jsd_SS / math.log(2.0)).clamp_max(1.0).sqrt()


@torch.no_grad()
def coactivation(assign_NE: Tensor) -> Tensor:
    """Count the rows that use both experts i and j: float64 [E, E], symmetric; the diagonal counts rows per expert.

    Args:
        assign_NE: [N, E]; every entry other than 0 is a use.
    """
    used_NE = (assign_NE != 0).double()
    return used_NE.T @ used_NE


@torch.no_grad()
def path_consistency(choices: Sequence[Tensor], num_experts: int) -> Tensor:
    """Give how far the expert in one layer tells the expert in the next, averaged over successive layers, in [0, 1].

    Expert numbers mean nothing across layers, so equal ids are not asked for: the value is the normalised mutual
    information 2·I(e_l; e_{l+1}) / (H(e_l) + H(e_{l+1})), which is 1 when each layer relabels the one before and 0 when
    they are independent.

    Args:
        choices: One int64 [N] per layer, the first choice of each row, for the SAME rows in the same order; at least
            two layers.
        num_experts: E; ids outside [0, E) (the sentinel) are left out of the pair.

    Raises:
        ValueError: With fewer than two layers.

    Source: our definition; the card names the metric without a formula.
    """
    if len(choices) < 2:
        raise ValueError(
            f"{len(choices)} layer(s): a path needs at least two; give the choices of two or more MoE layers"
        )
    return torch.stack([_agreement(first_N, second_N, num_experts) for first_N, second_N in pairwise(choices)]).mean()


def _agreement(first_N: Tensor, second_N: Tensor, num_experts: int) -> Tensor:
    kept = (first_N >= 0) & (first_N < num_experts) & (second_N >= 0) & (second_N < num_experts)
    pair_N = first_N[kept] * num_experts + second_N[kept]
    joint_EE = torch.bincount(pair_N, minlength=num_experts**2).double().view(num_experts, num_experts)
    total = _entropy(joint_EE.sum(0)) + _entropy(joint_EE.sum(1))
    return torch.where(total > 1e-12, 2.0 * _information(joint_EE) / total.clamp_min(_TINY), torch.ones_like(total))


def _work_per_row(routing: Routing) -> Tensor:
    works_M = (routing.expert_M < routing.num_experts).double()
    return works_M.new_zeros(routing.num_rows).index_add_(0, routing.row_M, works_M)


def _counts(counts_E: Tensor) -> Tensor:
    if counts_E.ndim != 1 or len(counts_E) == 0:
        raise ValueError(f"counts of shape {tuple(counts_E.shape)}: give one count per expert, [E]")
    return counts_E.double()


def _normalised(table: Tensor) -> Tensor:
    table = table.double()
    return table / table.sum(-1, keepdim=True).clamp_min(_TINY)


def _entr(probs: Tensor) -> Tensor:
    """−p·log p, elementwise, 0 at 0."""
    terms: Tensor = torch.special.entr(probs)
    return terms


def _entropy(weights: Tensor) -> Tensor:
    return _entr(weights / weights.sum().clamp_min(_TINY)).sum()


def _information(joint: Tensor) -> Tensor:
    """I = H(rows) + H(columns) − H(joint) in nats, not negative."""
    return (_entropy(joint.sum(0)) + _entropy(joint.sum(1)) - _entropy(joint)).clamp_min(0.0)
