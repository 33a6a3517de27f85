# SPDX-License-Identifier: Apache-2.0
"""Training objectives of a router besides the task's loss: pure functions of a record.

No coefficient lives in a function: modules hold it (see `moeapps.moe.losses`) and a task adds and logs them, so loss
scaling, gradient accumulation and data parallelism treat them like any other loss. Rows switched off by the record's
``token_mask`` count nowhere, nor do rows that a `ConditionalSplit` gives to experts of their own, nor those experts:
they are not what the router chose (see `routed`). Scores that are not a distribution (sigmoid) are normalised per row
first. Null columns of the logits are columns like any other, but see `switch_balance`.

With f_e the fraction of assignments that go to column e (Σf = 1, no gradient) and P_e the mean probability of column e
(Σp = 1):

======================  ==========================================  =========================
function                value                                       when balanced
======================  ==========================================  =========================
switch_balance          E·Σ f_e P_e                                 exactly 1, for any k
chosen_balance          E·Σ g_e Q_e, over chosen columns only       the mean number chosen
importance_cv2          var/mean² of the summed weights             0
load_cv2                var/mean² of the smooth load                0
z_loss                  mean logsumexp(s)²                          (keeps logits small)
token_entropy           mean H(p)                                   (low = decided)
batch_entropy_gap       log E − H(mean p)                           0
mutual_information      H(mean p) − mean H(p)                       (high = specialised)
======================  ==========================================  =========================

Shape suffixes: N rows, E columns (experts, then nulls), M assignments, G groups.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from moeapps.moe.record import Record
from moeapps.moe.routers.choose import GatedShared, TopK
from moeapps.moe.routers.choose_capped import Capped
from moeapps.moe.routers.choose_sparse_mixer import SparseMixer
from moeapps.moe.routing import DenseRouting, Routing


def routed(record: Record) -> Record:
    """Give the part of a record that the router chose: without rows that were given an expert, and those experts.

    Assignments of such rows become sentinels, their columns go, and ``token_mask`` leaves the rows out.
    """
    routing = record.routing
    if not isinstance(routing, Routing) or routing.given_N is None:
        return record
    num_all, num_chosen = routing.num_experts, routing.num_experts - routing.num_given

    def without_given(values_NX: Tensor | None) -> Tensor | None:
        return None if values_NX is None else torch.cat([values_NX[:, :num_chosen], values_NX[:, num_all:]], dim=-1)

    part = replace(
        routing,
        expert_M=routing.expert_M.clamp(max=num_chosen),
        num_experts=num_chosen,
        logits_NE=without_given(routing.logits_NE),
        probs_NE=without_given(routing.probs_NE),
        column_M=None
        if routing.column_M is None
        else routing.column_M - routing.num_given * (routing.column_M >= num_all).long(),
        given_N=None,
        num_given=0,
    )
    mask_N = ~routing.given_N if record.token_mask is None else ~routing.given_N & record.token_mask
    return replace(record, routing=part, token_mask=mask_N)


def probabilities(record: Record) -> Tensor:
    """Give the router's probabilities of the rows that count, each row summing to 1: [N', E + nulls], with gradient.

    Gates of a dense routing are stacked along the rows. A single expert without logits (a dense twin) has probability
    1.

    Raises:
        ValueError: If the router has no probabilities (random or table routing).
    """
    record = routed(record)
    probs = record.routing.probs_NE
    if probs is None:
        if record.routing.num_experts > 1:
            raise ValueError(
                f"layer {record.name!r} routes without probabilities (random or table routing), which this loss needs; "
                "remove the loss from aux_losses or choose other layers with its 'layers' pattern"
            )
        weight = record.routing.weight_M if isinstance(record.routing, Routing) else record.routing.assignment()
        probs = weight.new_ones(record.routing.num_rows, 1)
    probs_NE = counted_rows(record, probs)
    return probs_NE / probs_NE.sum(-1, keepdim=True).clamp_min(torch.finfo(probs_NE.dtype).tiny)


def column_counts(record: Record) -> Tensor:
    """Count the assignments per column of the probabilities: float [E + nulls], no gradient.

    Counts of null columns are each the mean over the nulls: which of several equal nulls a row takes does not matter,
    so rows need not be even among them. The chooser marks them in ``null_M``, apart from padding and masked rows; a
    capacity takes none of them away.

    Raises:
        ValueError: For dense and slot routings, which select nothing; with null experts, if the routing marks none.

    Source: AdaMoE, as implemented in CengZihao/AdaMoE (mean over nulls).
    """
    routing = _sparse(routed(record))
    counts_E = routing.counts().to(routing.weight_M.dtype)
    nulls = _num_nulls(routing)
    return counts_E if nulls == 0 else torch.cat([counts_E, _null_choices(routing, record.name).sum().expand(nulls)])


def switch_balance(record: Record, *, per_group: bool = False, counts_E: Tensor | None = None) -> Tensor:
    r"""Give the load-balancing loss E·Σ_e f_e P_e.

    f_e is the share of all assignments, so its minimum over uniform P is exactly 1 whatever k is (forms that do not
    divide by k have minimum k), and E when all rows go to one expert with certainty. It is not a lower bound: f and P
    of one batch may disagree. Capacity drops are not assignments; the overloaded expert still has the largest f.

    Args:
        record: A sparse routing with probabilities.
        per_group: f and P are taken within each group of the record (a sample, a sequence, a domain) and the values
            averaged.
        counts_E: Use these counts per column instead of the record's own, for instance those of the global batch.

    Returns:
        0-dim tensor; 0 without rows.

    Raises:
        ValueError: For dense and slot routings, without probabilities, if ``per_group`` lacks groups or meets
            ``counts_E``.

    Source: Fedus et al. (2021), Switch Transformers, equations 4-6, divided by k; per group: the sequence-wise form of
        DeepSeekMoE; null columns: AdaMoE.
    """
    record = routed(record)
    _sparse(record)
    probs_NE = probabilities(record)
    if per_group:
        if counts_E is not None:
            raise ValueError("per_group=True takes the counts of each group; leave counts_E out")
        return _grouped_balance(record, probs_NE)
    if probs_NE.shape[0] == 0:
        return probs_NE.sum()
    counts_E = (column_counts(record) if counts_E is None else counts_E).to(probs_NE.dtype)
    fraction_E = counts_E / counts_E.sum().clamp_min(1.0)
    return len(fraction_E) * (fraction_E.detach() * probs_NE.mean(0)).sum()


def chosen_balance(record: Record) -> Tensor:
    r"""Give E·Σ_e g_e Q_e, g_e the share of rows that chose column e, Q_e the mean softmax over a row's chosen columns.

    Unlike in `switch_balance` the counts are raw, Σg is the mean number chosen and not 1, which is also the value at
    balance, and only chosen logits have a gradient. Every null expert is a column of its own.

    Args:
        record: A sparse routing with logits.

    Returns:
        0-dim tensor; 0 without rows. Rows without a choice (drops) count with a softmax of 0.

    Raises:
        ValueError: For dense and slot routings, without logits, or if null choices are not marked.

    Source: UniMoE-Audio, released code (docs/papers/unimoe_audio.md, equation 6): HITsz-TMG/Uni-MoE
        ``UniMoE-Audio/utils/UniMoE_Audio_core.py``, with the padding mask as the weight of its rows.
    """
    record = routed(record)
    logits_NE, chosen_NE = _logits(record), _chosen_columns(record)
    if logits_NE.shape[0] == 0:
        return logits_NE.sum()
    share_NE = logits_NE.masked_fill(~chosen_NE, torch.finfo(logits_NE.dtype).min).softmax(-1).where(chosen_NE, 0)
    return logits_NE.shape[1] * (chosen_NE.to(logits_NE.dtype).mean(0) * share_NE.mean(0)).sum()


def importance_cv2(record: Record) -> Tensor:
    r"""Give the squared coefficient of variation of the importance, I_e = Σ_n w_ne.

    It is 0 when all experts get the same summed weight.

    Defined for every routing: of several dense gates the values are averaged, each over the experts that the gate may
    use at all. One expert, or no weight at all, gives 0.

    Source: Shazeer et al. (2017), equations 6-7.
    """
    record = routed(record)
    routing = record.routing
    if isinstance(routing, DenseRouting):
        weight = routing.weight if record.token_mask is None else routing.weight[..., record.token_mask, :]
        importance = weight.flatten(0, -3).sum(-2) if weight.ndim > 2 else weight.sum(-2)[None]
        usable = _usable(routing).expand(importance.shape)
        return torch.stack([cv_squared(row[keep]) for row, keep in zip(importance, usable, strict=True)]).mean()
    assignment_NE = routing.assignment()
    return cv_squared((assignment_NE if record.token_mask is None else assignment_NE[record.token_mask]).sum(0))


def load_cv2(record: Record, *, noise_std: float | None = None) -> Tensor:
    r"""Give cv² of the smooth load, L_e = Σ_n Φ((s_ne − t_ne)/σ), t_ne the k-th largest logit among the OTHER columns.

    L_e is the expected number of rows that would choose e if its logit were drawn again with noise σ: a count with a
    gradient.

    Args:
        record: A sparse routing with logits, in which each row takes its k best columns (`TopK`, `SparseMixer`).
        noise_std: σ in units of the logits, above 0; 1/E when None.

    Returns:
        0-dim tensor; 0 if k is the number of columns (every expert is always chosen).

    Raises:
        ValueError: For other routings, without logits, without a fixed k, or for σ not above 0.

    Source: Shazeer et al. (2017), equations 8-11. Differs: the thresholds come from the clean logits, and σ is one
        number as in microsoft/tutel (tutel/impls/losses.py), because a record keeps logits without their noise.
    """
    record = routed(record)
    _sparse(record)
    logits_NE = _logits(record)
    columns, k = logits_NE.shape[-1], _fixed_k(record)
    sigma = 1.0 / columns if noise_std is None else noise_std
    if k is None:
        raise ValueError(f"layer {record.name!r} has no fixed k, which the load loss needs; use SwitchBalance")
    if not sigma > 0.0:
        raise ValueError(f"noise_std={noise_std}: the load is smooth only for a noise above 0")
    if k >= columns or logits_NE.shape[0] == 0:
        return (logits_NE * 0.0).sum()
    top_NK = logits_NE.topk(k + 1, dim=-1).values
    inside_NE = logits_NE >= top_NK[:, k - 1, None]
    # Leaving e out moves the threshold one place down the order for those that are among the first k.
    others_NE = torch.where(inside_NE, top_NK[:, k, None], top_NK[:, k - 1, None])
    return cv_squared(torch.special.ndtr((logits_NE - others_NE) / sigma).sum(0))


def z_loss(record: Record) -> Tensor:
    """Give mean_n logsumexp(s_n)², which keeps logits from drifting to where rounding matters.

    Defined for every routing with logits, in float32 at least. A square whose mean that cannot hold (from 1e19, less
    with many rows) counts as the largest it can, with the gradient there: finite, and towards smaller logits.

    Source: Zoph et al. (2022), ST-MoE, equation 5.
    """
    logits_NE = _logits(routed(record))
    partition_N = torch.logsumexp(logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32)), dim=-1)
    limit = math.sqrt(torch.finfo(partition_N.dtype).max / max(partition_N.numel(), 1)) / 2
    nothing_N = partition_N - partition_N.detach()  # 0, with the gradient
    return _mean((partition_N.detach().clamp(-limit, limit) + nothing_N).square())


def token_entropy(record: Record) -> Tensor:
    """Give the mean entropy of a row's probabilities, in nats, in [0, log E]: minimise it for decided routers.

    Top-p routers need it: without it a uniform p, which takes the most experts, is never punished.

    Source: Huang et al. (2024), Harder Tasks Need More Experts, the dynamic loss.
    """
    return _mean(_entropy(probabilities(record)))


def batch_entropy_gap(record: Record) -> Tensor:
    """Give log E − H(mean_n p_n), the divergence of the mean probability from uniform: 0 when balanced."""
    probs_NE = probabilities(record)
    if probs_NE.shape[0] == 0:
        return probs_NE.sum()
    return math.log(probs_NE.shape[1]) - _entropy(probs_NE.mean(0))


def mutual_information(record: Record) -> Tensor:
    """Give I(expert; row) = H(mean p) − mean H(p) in nats: high when rows are decided AND experts evenly used."""
    probs_NE = probabilities(record)
    if probs_NE.shape[0] == 0:
        return probs_NE.sum()
    return _entropy(probs_NE.mean(0)) - _entropy(probs_NE).mean()


def cv_squared(values: Tensor) -> Tensor:
    """Give var/mean² over the entries (population variance): 0 for one entry, for none, or for a mean of 0."""
    if not values.numel():
        return values.sum()
    mean = values.mean()
    safe = torch.where(mean == 0, torch.ones_like(mean), mean)
    return torch.where(mean == 0, mean * 0.0, (values - mean).square().mean() / safe.square())


def _grouped_balance(record: Record, probs_NE: Tensor) -> Tensor:
    """Mean over the groups present of E·Σ f P within the group."""
    routing, mask = _sparse(record), record.token_mask
    if record.group is None:
        raise ValueError(
            f"layer {record.name!r} was called without group: per_group=True needs the group (sample) id of each row"
        )
    _, group_N = torch.unique(record.group if mask is None else record.group[mask], return_inverse=True)
    if len(group_N) == 0:
        return probs_NE.sum()
    groups = int(group_N.max()) + 1
    # Masked rows hold sentinels only, so the group they are given here counts nothing.
    every_N = group_N if mask is None else torch.zeros_like(record.group).masked_scatter(mask, group_N)
    slot_M = every_N[routing.row_M] * (routing.num_experts + 1) + routing.expert_M
    counts_GE = torch.bincount(slot_M, minlength=groups * (routing.num_experts + 1)).view(groups, -1)[:, :-1]
    counts = counts_GE.to(probs_NE.dtype)
    if _num_nulls(routing):
        nulls_NX = _null_choices(routing, record.name).unsqueeze(-1).expand(-1, _num_nulls(routing))
        counts = torch.cat([counts, nulls_NX.new_zeros(groups, nulls_NX.shape[1]).index_add(0, every_N, nulls_NX)], 1)
    fraction = counts / counts.sum(1, keepdim=True).clamp_min(1)
    size_G = torch.bincount(group_N, minlength=groups).to(probs_NE.dtype)
    mean = probs_NE.new_zeros(groups, probs_NE.shape[1]).index_add(0, group_N, probs_NE) / size_G[:, None]
    return probs_NE.shape[1] * (fraction * mean).sum(1).mean()


def _num_nulls(routing: Routing) -> int:
    return 0 if routing.probs_NE is None else routing.probs_NE.shape[-1] - routing.num_experts


@torch.no_grad()
def _null_choices(routing: Routing, layer: str) -> Tensor:
    """How many choices of each row fell on null experts, per null expert on average: float [N]."""
    if routing.null_M is None:
        raise ValueError(
            f"layer {layer!r} has null experts, but its routing does not say which sentinels are choices of one "
            "(null_M); set it in your router, or leave the layer out of this loss with its 'layers' pattern"
        )
    share_M = routing.null_M.to(routing.weight_M.dtype) / _num_nulls(routing)
    return share_M.new_zeros(routing.num_rows).index_add(0, routing.row_M, share_M)


@torch.no_grad()
def _chosen_columns(record: Record) -> Tensor:
    """Which columns of the logits each row that counts chose: bool [N', E + nulls]."""
    routing = _sparse(record)
    num, nulls = routing.num_experts, _num_nulls(routing)
    column_M = routing.expert_M
    if nulls:
        if routing.null_M is None or (nulls > 1 and routing.column_M is None):
            raise ValueError(
                f"layer {record.name!r} has {nulls} null experts, but its routing does not say which sentinels are "
                "choices of which one (null_M, column_M); set them in your router, or leave the layer out of this loss "
                "with its 'layers' pattern"
            )
        null_M = num if routing.column_M is None else routing.column_M
        column_M = torch.where(routing.null_M, null_M, column_M.where(column_M < num, num + nulls))
    chosen = torch.zeros(routing.num_rows, num + nulls + 1, dtype=torch.bool, device=column_M.device)
    return counted_rows(record, chosen.index_put((routing.row_M, column_M), chosen.new_ones(()))[:, :-1])


def _fixed_k(record: Record) -> int | None:
    """How many columns every row takes, the best by its own logits; None where that is not so."""
    router = getattr(record.layer, "router", None)
    if router is None:  # a record made by hand
        return _sparse(record).top_k
    while hasattr(router, "conditional"):
        router = router.conditional
    choose = getattr(router, "choose", None)
    while isinstance(choose, GatedShared | Capped):
        choose = choose.choose
    return choose.k if isinstance(choose, TopK | SparseMixer) else None  # of a SparseMixer with p it is None


def _sparse(record: Record) -> Routing:
    if isinstance(record.routing, Routing):
        return record.routing
    kind = type(record.routing).__name__
    raise ValueError(
        f"layer {record.name!r} has a {kind}, which selects no experts: a loss on the load is not defined; "
        "use ImportanceLoss for dense gates, none for slots (always even), or leave the layer out by 'layers'"
    )


def _logits(record: Record) -> Tensor:
    logits = record.routing.logits_NE
    if logits is None:
        raise ValueError(
            f"layer {record.name!r} routes without logits (random or table routing): the loss is not defined; "
            "remove the loss from aux_losses or choose other layers with its 'layers' pattern"
        )
    return counted_rows(record, logits)


def counted_rows(record: Record, values: Tensor) -> Tensor:
    """Rows that count, gates stacked along the rows: [N', E]."""
    if record.token_mask is not None:
        values = values[..., record.token_mask, :]
    return values.flatten(0, -2)


def _usable(routing: DenseRouting) -> Tensor:
    """Which experts each gate may use for some row: bool [G or 1, E]."""
    if routing.allowed is None:
        return torch.ones(1, routing.num_experts, dtype=torch.bool, device=routing.weight.device)
    allowed = routing.allowed.expand(routing.weight.shape)
    return allowed.any(-2)[None] if allowed.ndim == 2 else allowed.any(-2).flatten(0, -2)


def _entropy(probs: Tensor) -> Tensor:
    # The clamp keeps the gradient at p = 0 finite; its own contribution there is 0.
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, values.numel())
