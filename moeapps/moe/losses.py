# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses of a router: pure functions of a record, and the small modules that YAML names.

No coefficient lives in a function: a task adds ``weight * loss(records)`` and logs each, so loss scaling, gradient
accumulation and data parallelism treat them like any other loss. Rows switched off by the record's ``token_mask`` count
nowhere. Scores that are not a distribution (sigmoid) are normalised per row first. Null columns of the logits are
columns like any other, but see `switch_balance`.

With f_e the fraction of assignments that go to column e (Σf = 1, no gradient) and P_e the mean probability of column e
(Σp = 1):

======================  ==========================================  =========================
function                value                                       when balanced
======================  ==========================================  =========================
switch_balance          E·Σ f_e P_e                                 exactly 1, for any k
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
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from moeapps.moe.balance import sum_over_ranks
from moeapps.moe.record import Record
from moeapps.moe.routing import DenseRouting, Routing


def probabilities(record: Record) -> Tensor:
    """Give the router's probabilities of the rows that count, each row summing to 1: [N', E + nulls], with gradient.

    Gates of a dense routing are stacked along the rows. A single expert without logits (a dense twin) has probability
    1.

    Raises:
        ValueError: If the router has no probabilities (random or table routing).
    """
    probs = record.routing.probs_NE
    if probs is None:
        if record.routing.num_experts > 1:
            raise ValueError(
                f"layer {record.name!r} routes without probabilities (random or table routing), which this loss needs; "
                "remove the loss from aux_losses or choose other layers with its 'layers' pattern"
            )
        weight = record.routing.weight_M if isinstance(record.routing, Routing) else record.routing.assignment()
        probs = weight.new_ones(record.routing.num_rows, 1)
    probs_NE = _counted_rows(record, probs)
    return probs_NE / probs_NE.sum(-1, keepdim=True).clamp_min(torch.finfo(probs_NE.dtype).tiny)


def column_counts(record: Record) -> Tensor:
    """Count the assignments per column of the probabilities: float [E + nulls], no gradient.

    Counts of null columns are each the mean over the nulls: which of several equal nulls a row takes does not matter,
    so rows need not be even among them. Null choices are those that the chooser marks (``null_M``). In a routing
    without marks a null choice is a sentinel of a row that counts and that keeps a weight; where it asks for a fixed k
    and has no capacity every missing choice is one.

    Raises:
        ValueError: For dense and slot routings, which select nothing.

    Source: AdaMoE, as implemented in CengZihao/AdaMoE (mean over nulls).
    """
    routing = _sparse(record)
    counts_E = routing.counts()
    nulls = 0 if routing.probs_NE is None else routing.probs_NE.shape[-1] - routing.num_experts
    if nulls <= 0:
        return counts_E.to(routing.weight_M.dtype)
    total = _null_choices(record, routing)
    return torch.cat([counts_E.to(total.dtype), (total / nulls).expand(nulls)])


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


def importance_cv2(record: Record) -> Tensor:
    r"""Give the squared coefficient of variation of the importance, I_e = Σ_n w_ne.

    It is 0 when all experts get the same summed weight.

    Defined for every routing: of several dense gates the values are averaged, each over the experts that the gate may
    use at all. One expert, or no weight at all, gives 0.

    Source: Shazeer et al. (2017), equations 6-7.
    """
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
        record: A sparse routing with logits and a fixed k.
        noise_std: σ in units of the logits, above 0; 1/E when None.

    Returns:
        0-dim tensor; 0 if k is the number of columns (every expert is always chosen).

    Raises:
        ValueError: For other routings, without logits, without a fixed k, or for σ not above 0.

    Source: Shazeer et al. (2017), equations 8-11. Differs: the thresholds come from the clean logits, and σ is one
        number as in microsoft/tutel (tutel/impls/losses.py), because a record keeps logits without their noise.
    """
    routing = _sparse(record)
    logits_NE = _logits(record)
    columns, k = logits_NE.shape[-1], routing.top_k
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

    Defined for every routing with logits.

    Source: Zoph et al. (2022), ST-MoE, equation 5.
    """
    logits_NE = _logits(record)
    return _mean(torch.logsumexp(logits_NE, dim=-1).square())


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
    """Give var/mean² over the entries (population variance): 0 for one entry or a mean of 0."""
    mean = values.mean()
    safe = torch.where(mean == 0, torch.ones_like(mean), mean)
    return torch.where(mean == 0, mean * 0.0, (values - mean).square().mean() / safe.square())


class AuxLoss(nn.Module):
    """A loss over all recorded layers: the mean over records of `compute`, without the weight.

    To write one, set ``name`` and override `compute`.

    Args:
        weight: Coefficient that the task multiplies with; the value returned and logged (``train/aux/<name>``) is
            without it.
        layers: Pattern (``*`` and ``?``) of the names of the layers that take part; it becomes part of the name.

    Shape:
        Input: list of records. Output: 0-dim tensor.

    Raises:
        ValueError: For a weight that is not a finite number.

    Example:
        >>> ZLoss(0.001, layers="decoder.*").name
        'z.decoder'
    """

    name: str = "aux"

    def __init__(self, weight: float, *, layers: str = "*") -> None:
        super().__init__()
        if not math.isfinite(weight):
            raise ValueError(
                f"weight={weight} of {self.name!r}: give a finite number; 0 logs the value without training on it"
            )
        self.weight = weight
        self.layers = layers
        if layers != "*":  # Two losses of one kind on different layers must be logged apart.
            self.name = f"{self.name}.{re.sub(r'[^A-Za-z0-9]+', '_', layers).strip('_')}"

    def compute(self, record: Record) -> Tensor:
        """Give the loss of one record, 0-dim."""
        raise NotImplementedError(f"{type(self).__name__} must override compute(record)")

    def forward(self, records: Sequence[Record]) -> Tensor:
        """Give the mean over the records whose layer name matches.

        Raises:
            ValueError: If no record matches: a loss over nothing would be silently absent.
        """
        chosen = [record for record in records if fnmatchcase(record.name, self.layers)]
        if not chosen:
            names = sorted({record.name for record in records})
            raise ValueError(
                f"auxiliary loss {self.name!r} with layers={self.layers!r} meets no recorded MoE layer "
                f"(recorded: {names or 'none'}); change the pattern, or remove the loss from aux_losses"
            )
        return torch.stack([self.compute(record) for record in chosen]).mean()

    def on_optimizer_step(self) -> None:
        """Forget what was gathered over micro-batches; the training loop calls this after each optimizer step."""

    def extra_repr(self) -> str:
        """Show weight and layers in the print-out of a model."""
        return f"weight={self.weight}, layers={self.layers!r}"


class SwitchBalance(AuxLoss):
    """`switch_balance`: E·Σ f P, 1 when balanced.

    Args:
        weight: Coefficient; 0.01 in Switch Transformers and most since.
        per_group: Balance within each sample (or whatever group the network gives) rather than over the batch.
        layers: Pattern of layer names.

    Example:
        >>> from moeapps.moe import LinearScore, MLPExperts, MoELayer, MoERecorder, Router, TopK
        >>> layer = MoELayer(Router(LinearScore(8, 4, init_std=0.0), TopK(2)), MLPExperts(4, 8, 8))
        >>> with MoERecorder() as recorder:
        ...     _ = layer(torch.randn(6, 8))
        >>> round(SwitchBalance()(recorder.records).item(), 3)
        1.0
    """

    name = "switch_balance"

    def __init__(self, weight: float = 0.01, *, per_group: bool = False, layers: str = "*") -> None:
        super().__init__(weight, layers=layers)
        self.per_group = per_group

    def compute(self, record: Record) -> Tensor:
        """Give `switch_balance` of one record."""
        return switch_balance(record, per_group=self.per_group)


class GlobalBatchBalance(AuxLoss):
    """`switch_balance` with f counted over the batch of an optimizer step: all ranks, and the micro-batches so far.

    Small micro-batches of one domain each then need not be balanced one by one, so experts may specialise by domain. f
    has no gradient, so only E counts per layer travel. Ranks see each other at once; of the micro-batches on one rank
    the first sees only itself and the last sees all. In evaluation nothing is gathered and f is the batch's own.

    Args:
        weight: Coefficient.
        layers: Pattern of layer names.

    Source: Qiu et al. (2025), Demons in the Detail.

    Example:
        >>> GlobalBatchBalance(0.01).name
        'global_balance'
    """

    name = "global_balance"

    def __init__(self, weight: float = 0.01, *, layers: str = "*") -> None:
        super().__init__(weight, layers=layers)
        self._seen: dict[str, Tensor] = {}

    def compute(self, record: Record) -> Tensor:
        """Give `switch_balance` of one record with the counts of the step so far."""
        counts_E = column_counts(record)
        if self.training:
            counts_E = sum_over_ranks(counts_E)
            if record.name in self._seen:
                counts_E = counts_E + self._seen[record.name]
            self._seen[record.name] = counts_E
        return switch_balance(record, counts_E=counts_E)

    def on_optimizer_step(self) -> None:
        """Start the next step's counts from nothing."""
        self._seen.clear()


class ImportanceLoss(AuxLoss):
    """`importance_cv2`: cv² of the summed weights, 0 when balanced; the one balance loss that dense gates have too.

    Example:
        >>> ImportanceLoss(0.01).name
        'importance'
    """

    name = "importance"

    def __init__(self, weight: float = 0.01, *, layers: str = "*") -> None:
        super().__init__(weight, layers=layers)

    def compute(self, record: Record) -> Tensor:
        """Give `importance_cv2` of one record."""
        return importance_cv2(record)


class LoadLoss(AuxLoss):
    """`load_cv2`: cv² of the smooth load, 0 when balanced.

    Args:
        weight: Coefficient.
        noise_std: σ in units of the logits; 1/E when None.
        layers: Pattern of layer names.

    Example:
        >>> LoadLoss(0.01).name
        'load'
    """

    name = "load"

    def __init__(self, weight: float = 0.01, *, noise_std: float | None = None, layers: str = "*") -> None:
        super().__init__(weight, layers=layers)
        self.noise_std = noise_std

    def compute(self, record: Record) -> Tensor:
        """Give `load_cv2` of one record."""
        return load_cv2(record, noise_std=self.noise_std)


class ZLoss(AuxLoss):
    """`z_loss`: mean logsumexp²; a weight of 0.001 is usual.

    Example:
        >>> ZLoss(0.01).name
        'z'
    """

    name = "z"

    def __init__(self, weight: float = 0.001, *, layers: str = "*") -> None:
        super().__init__(weight, layers=layers)

    def compute(self, record: Record) -> Tensor:
        """Give `z_loss` of one record."""
        return z_loss(record)


class EntropyLoss(AuxLoss):
    """`token_entropy`: minimised by decided routers, needed with top-p above all; a weight of 1e-4 is usual there.

    Example:
        >>> EntropyLoss(0.01).name
        'entropy'
    """

    name = "entropy"

    def __init__(self, weight: float = 1e-4, *, layers: str = "*") -> None:
        super().__init__(weight, layers=layers)

    def compute(self, record: Record) -> Tensor:
        """Give `token_entropy` of one record."""
        return token_entropy(record)


class BatchEntropyLoss(AuxLoss):
    """`batch_entropy_gap`: log E − H(mean p), 0 when balanced.

    Example:
        >>> BatchEntropyLoss(0.01).name
        'batch_entropy'
    """

    name = "batch_entropy"

    def __init__(self, weight: float = 0.01, *, layers: str = "*") -> None:
        super().__init__(weight, layers=layers)

    def compute(self, record: Record) -> Tensor:
        """Give `batch_entropy_gap` of one record."""
        return batch_entropy_gap(record)


class MutualInformationLoss(AuxLoss):
    """The NEGATIVE of `mutual_information`: a positive weight maximises the information.

    Example:
        >>> MutualInformationLoss(0.01).name
        'mutual_information'
    """

    name = "mutual_information"

    def __init__(self, weight: float = 0.01, *, layers: str = "*") -> None:
        super().__init__(weight, layers=layers)

    def compute(self, record: Record) -> Tensor:
        """Give minus `mutual_information` of one record."""
        return -mutual_information(record)


def _grouped_balance(record: Record, probs_NE: Tensor) -> Tensor:
    """Mean over the groups present of E·Σ f P within the group."""
    routing = _sparse(record)
    if record.group is None:
        raise ValueError(
            f"layer {record.name!r} was called without group: per_group=True needs the group (sample) id of each row"
        )
    columns, experts = probs_NE.shape[1], routing.num_experts
    if columns > experts:
        raise ValueError("per_group=True is not defined with null experts; set per_group=False")
    mask = record.token_mask
    _, group_N = torch.unique(record.group if mask is None else record.group[mask], return_inverse=True)
    groups = int(group_N.max()) + 1 if len(group_N) else 0
    if groups == 0:
        return probs_NE.sum()
    row_group = group_N
    if mask is not None:
        # Masked rows hold sentinels only, so the group they are given here counts nothing.
        row_group = torch.zeros_like(record.group).masked_scatter(mask, group_N)
    slot_M = row_group[routing.row_M] * (experts + 1) + routing.expert_M
    counts = torch.bincount(slot_M, minlength=groups * (experts + 1)).view(groups, experts + 1)[:, :experts]
    fraction_GE = counts.to(probs_NE.dtype) / counts.sum(1, keepdim=True).clamp_min(1)
    size_G = torch.bincount(group_N, minlength=groups).to(probs_NE.dtype)
    mean_GE = probs_NE.new_zeros(groups, columns).index_add(0, group_N, probs_NE) / size_G[:, None]
    return columns * (fraction_GE * mean_GE).sum(1).mean()


def _null_choices(record: Record, routing: Routing) -> Tensor:
    """Number of choices that fell on a null expert, 0-dim float: as the chooser says, else from the sentinels."""
    if routing.null_M is not None:
        return routing.null_M.sum().to(routing.weight_M.dtype)
    capacity = getattr(getattr(record.layer, "router", None), "capacity", None)
    sentinel_M = routing.expert_M == routing.num_experts
    if routing.top_k is not None and capacity is None:
        counted_M = sentinel_M if record.token_mask is None else sentinel_M & record.token_mask[routing.row_M]
        return counted_M.sum().to(routing.weight_M.dtype)
    return (sentinel_M & (routing.weight_M.detach() != 0)).sum().to(routing.weight_M.dtype)


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
    return _counted_rows(record, logits)


def _counted_rows(record: Record, values: Tensor) -> Tensor:
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
