# SPDX-License-Identifier: Apache-2.0
"""Metrics of a routing: load, sparsity, specialisation. Pure functions without gradient.

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

    Source: Wang et al. (2024), auxiliary-loss-free load balancing, MaxVio (form as generally known;
        docs/papers/core.md, equation 21).
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
        threshold: Fraction of the mean load below which an expert counts as dead; 0.01 by convention.
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

    Returns:
        0-dim float64; pairs of layers without a row in common are left out, nan without any.

    Raises:
        ValueError: With fewer than two layers.

    Source: our definition (docs/papers/core.md, equation 22).
    """
    if len(choices) < 2:
        raise ValueError(
            f"{len(choices)} layer(s): a path needs at least two; give the choices of two or more MoE layers"
        )
    pairs = [_agreement(first_N, second_N, num_experts) for first_N, second_N in pairwise(choices)]
    return torch.stack(pairs).nanmean()


@torch.no_grad()
def segment_routing_performance(assign: Tensor, length: int, *, per_expert: bool = False) -> Tensor:
    """Give SRP, how well a fixed group of experts covers the needs of a segment of consecutive rows, in [0, 1].

    A predictor that knows only how often expert e is used in a segment of m rows, c_e, says "always" where c_e reaches
    a threshold t and "never" elsewhere; SRP is its best F1 over t, 2·Σ_{c>=t} c / (m·#(c>=t) + Σ c). 1 when every
    expert is used by all rows of a segment or by none; near the share of rows an expert gets when routing forgets.

    Args:
        assign: [N, E] or [sequences, N, E], rows in the order they come (a sequence, a scan line, a serialised cloud);
            every entry other than 0 is a use. Segments do not reach from one sequence into the next.
        length: m, rows of a segment, 1 to N; all N - m + 1 overlapping segments count.
        per_expert: Give one value per expert, [E], each with its own best t; nan for an expert that is never used.

    Returns:
        float64, 0-dim: of all experts together with one t; nan without any use.

    Raises:
        ValueError: For another shape, or a length that does not fit.

    Source: Liang et al. (2025), Not All Models Suit Expert Offloading (arXiv 2505.16056); ljcleo/moe-lrc
        ``src/30_srp_calc.py`` and ``31_srp_refine.py``, which give 0 for an expert without uses.

    Example:
        >>> round(float(segment_routing_performance(torch.eye(2).repeat_interleave(4, 0), 4)), 3)
        0.818
    """
    used_SNE = _sequences(assign, length).double()
    total_SNE = torch.nn.functional.pad(used_SNE.cumsum(1), (0, 0, 1, 0))
    count_WE = (total_SNE[:, length:] - total_SNE[:, :-length]).flatten(0, 1).long()
    # How many segments use an expert t times, t = 0 .. m; then sums over t and above.
    times_TE = torch.zeros(length + 1, count_WE.shape[1], dtype=torch.float64, device=count_WE.device)
    times_TE.scatter_add_(0, count_WE, torch.ones_like(count_WE, dtype=torch.float64))
    if not per_expert:
        times_TE = times_TE.sum(1, keepdim=True)
    t_T1 = torch.arange(length + 1, dtype=torch.float64, device=count_WE.device).unsqueeze(-1)
    hits_TE = (times_TE * t_T1).flip(0).cumsum(0).flip(0)
    said_TE = length * times_TE.flip(0).cumsum(0).flip(0)
    best_E = (2 * hits_TE / (said_TE + hits_TE[0]).clamp_min(1)).amax(0)
    best_E = best_E.where(hits_TE[0] > 0, torch.nan)
    return best_E if per_expert else best_E.squeeze(0)


@torch.no_grad()
def segment_cache_hits(assign: Tensor, length: int, sizes: Sequence[int]) -> Tensor:
    """Give SCH, the share of uses that find their expert in a cache that knows the needs of the next rows, in [0, 1].

    The cache holds a number of experts. A use of an expert that it lacks loads it, in place of the one that the next m
    rows need least often, of these the one used longest ago. All experts of a row are looked up before any is loaded.
    Filling an empty place is no miss. m = 0 is least recently used, a cache that can be built.

    Args:
        assign: [N, E] or [sequences, N, E] as for `segment_routing_performance`; the cache starts empty in each
            sequence.
        length: m, rows that are known ahead, the present one included until its experts are served; 0 to N.
        sizes: Sizes of caches, in experts, 1 to E; rho·k for a cache of rho times what a row uses.

    Returns:
        float64 [sizes]; nan without any use.

    Raises:
        ValueError: For another shape, or a length or size that does not fit.

    Source: as of `segment_routing_performance`; ``src/41_sch_calc.py``, which gives all sizes by one stack. Here each
        cache is kept as a set: a loop over rows on the CPU, about 20 microseconds a use.

    Example:
        >>> segment_cache_hits(torch.eye(3)[[0, 1, 0, 2, 0]], 2, [1, 2, 3]).tolist()
        [0.2, 0.8, 1.0]
    """
    used_SNE = _sequences(assign, length, least=0).cpu()
    num_experts = used_SNE.shape[2]
    if not sizes or not all(1 <= size <= num_experts for size in sizes):
        raise ValueError(f"sizes={list(sizes)}: give sizes of caches from 1 to the {num_experts} experts")
    hits = torch.zeros(len(sizes), dtype=torch.float64)
    for rows_NE in used_SNE:
        hits += _cache_hits([row.nonzero()[:, 0].tolist() for row in rows_NE], num_experts, length, sizes)
    uses = used_SNE.sum()
    return (hits / uses.clamp_min(1)).where(uses > 0, torch.nan).to(assign.device)


def _cache_hits(rows: list[list[int]], num_experts: int, length: int, sizes: Sequence[int]) -> Tensor:
    """Hits of one sequence for each size of cache."""
    ahead, served = [0] * num_experts, [-1] * num_experts  # uses in the known rows; when used last
    held: list[set[int]] = [set() for _ in sizes]
    hits, clock = [0] * len(sizes), 0
    for expert in (e for row in rows[:length] for e in row):
        ahead[expert] += 1
    for n, row in enumerate(rows):
        found = sum(last >= 0 for last in served)  # different experts so far
        for expert in row:
            new = served[expert] < 0
            for z, size in enumerate(sizes):
                hits[z] += (found < size) if new else (expert in held[z])
            found += new
        for expert in row:
            for cache, size in zip(held, sizes, strict=True):
                if expert not in cache and len(cache) == size:
                    cache.remove(min(cache, key=lambda e: (ahead[e], served[e])))
                cache.add(expert)
            served[expert], clock = clock, clock + 1
            ahead[expert] -= length > 0
        if length > 0 and n + length < len(rows):
            for expert in rows[n + length]:
                ahead[expert] += 1
    return torch.tensor(hits, dtype=torch.float64)


def _sequences(assign: Tensor, length: int, least: int = 1) -> Tensor:
    """Uses as bool [sequences, N, E]; checks the length against N."""
    if assign.ndim not in (2, 3):
        raise ValueError(f"assignments of shape {tuple(assign.shape)}: give [N, E] or [sequences, N, E]")
    used_SNE = (assign != 0).reshape(-1, *assign.shape[-2:])
    if not least <= length <= used_SNE.shape[1]:
        raise ValueError(f"length={length}, but it must be from {least} to the {used_SNE.shape[1]} rows of a sequence")
    return used_SNE


def _agreement(first_N: Tensor, second_N: Tensor, num_experts: int) -> Tensor:
    """Normalised mutual information of two layers, 1 where both use one expert alone; nan without a row in common."""
    kept = (first_N >= 0) & (first_N < num_experts) & (second_N >= 0) & (second_N < num_experts)
    pair_N = first_N[kept] * num_experts + second_N[kept]
    joint_EE = torch.bincount(pair_N, minlength=num_experts**2).double().view(num_experts, num_experts)
    total = _entropy(joint_EE.sum(0)) + _entropy(joint_EE.sum(1))
    agreement = torch.where(total > 1e-12, 2.0 * _information(joint_EE) / total.clamp_min(_TINY), 1.0)
    return agreement.where(kept.any(), torch.nan)


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
