# SPDX-License-Identifier: Apache-2.0
"""Ranking within users (GAUC), ranking over all rows (AUC), log-loss and calibration, per task. N rows, T tasks.

GAUC is our own: torchmetrics' ``RetrievalAUROC`` is the UNWEIGHTED mean over users, counts a user without positives as
0 unless told otherwise, and loops over users (about 20 times slower per row at 2,000 users).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from moeapps.evaluation.statistics import Interval, bootstrap_interval

Weight = Literal["rows", "positives", "users"]
Kind = Literal["gauc", "gauc_expected", "auc", "logloss", "calibration", "ece"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DEFAULT_KINDS: tuple[Kind, ...] = ("gauc", "gauc_expected", "auc", "logloss", "calibration")


@dataclass(frozen=True)
class GroupScores:
    """AUC of every group that can have one.

    Attributes:
        group: int64 [G], the groups that hold both classes, ascending.
        auc: float64 [G] in [0, 1].
        rows: float64 [G], rows counted.
        positives: float64 [G], sum of their labels.
    """

    group: Tensor
    auc: Tensor
    rows: Tensor
    positives: Tensor


def group_auc(score: Tensor, label: Tensor, group: Tensor, mask: Tensor | None = None) -> GroupScores:
    """Rank within groups, exactly and without a loop: O(N log N).

    AUC_g = sum over pairs i != j of group g of y_i (1 - y_j) [s_i > s_j] / sum of y_i (1 - y_j), a tie counting one
    half. For labels 0 and 1 that is (R - P (P + 1) / 2) / (P (n - P)) with R the positives' ranks, ties ranked in the
    middle. Labels between 0 and 1 are probabilities: AUC_g is then the ratio of what numerator and denominator are
    expected to be, so that with known probabilities the noise of drawn labels is gone.

    Args:
        score: [N], larger is more likely; any float.
        label: [N] in [0, 1].
        group: int64 [N].
        mask: bool [N], rows that count; None for all.

    Raises:
        ValueError: shapes that differ, labels outside [0, 1], or a score that is not a number.
    """
    if mask is not None:
        score, label, group = score[mask], label[mask], group[mask]
    if not score.shape == label.shape == group.shape or score.dim() != 1:
        raise ValueError(
            f"score {tuple(score.shape)}, label {tuple(label.shape)}, group {tuple(group.shape)}: all are [N]"
        )
    if score.isnan().any():
        raise ValueError(
            f"{int(score.isnan().sum())} of {len(score)} scores are not numbers; look at the training loss"
        )
    y = label.double()
    if ((y < 0) | (y > 1)).any():
        raise ValueError("labels must lie in [0, 1]")
    order = score.argsort()
    order = order[group[order].argsort(stable=True)]
    score, y, group = score[order], y[order], group[order]
    names, group_of, count = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    changed = torch.ones(len(y), dtype=torch.bool, device=y.device)
    changed[1:] = (group[1:] != group[:-1]) | (score[1:] != score[:-1])
    tie_of = changed.cumsum(0) - 1
    num_ties = int(tie_of[-1]) + 1 if len(y) else 0

    def per(index: Tensor, value: Tensor, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=y.device).index_add_(0, index, value)

    positives, self_pairs = per(group_of, y, len(names)), per(group_of, y * (1 - y), len(names))
    negative = 1 - y
    below = negative.cumsum(0) - negative  # negatives before the row, over all groups
    first_of_tie = torch.nonzero(changed).squeeze(1)
    first_of_group = count.cumsum(0) - count
    lower = below[first_of_tie][tie_of] - below[first_of_group][group_of]
    level = per(tie_of, negative, num_ties)[tie_of]
    hits = per(group_of, y * (lower + (level - negative) / 2), len(names))
    pairs = positives * (count - positives) - self_pairs
    mixed = pairs > 0
    return GroupScores(
        names[mixed],
        (hits / pairs.where(mixed, torch.ones_like(pairs)))[mixed],
        count[mixed].double(),
        positives[mixed],
    )


def gauc(score: Tensor, label: Tensor, group: Tensor, mask: Tensor | None = None, weight: Weight = "rows") -> Tensor:
    """Mean AUC within groups: sum_u w_u AUC_u / sum_u w_u over the users u with both classes.

    Args:
        score: [N], larger is more likely.
        label: [N] in [0, 1]; probabilities give the expectation, see `group_auc`.
        group: int64 [N], the user of each row.
        mask: bool [N], rows that count; None for all.
        weight: w_u: the user's counted ``rows`` (the usual definition), ``positives``, or 1 (``users``).

    Returns:
        float64 scalar in [0, 1]; NaN where no user has both classes.
    """
    found = group_auc(score, label, group, mask)
    w = {"rows": found.rows, "positives": found.positives, "users": torch.ones_like(found.rows)}[weight]
    return (w * found.auc).sum() / w.sum()


def auc(score: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
    """AUC over all rows: float64 scalar, NaN where one class is missing."""
    return gauc(score, label, torch.zeros(len(score), dtype=torch.int64, device=score.device), mask)


def log_loss(logit: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of -y log p - (1 - y) log(1 - p), p = sigmoid(logit), in nats: float64 scalar, NaN without rows."""
    logit, label = _counted(logit, label, mask)
    return torch.nn.functional.binary_cross_entropy_with_logits(logit, label)


def calibration(logit: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean predicted probability over mean label: float64 scalar, 1 is right; NaN without a positive."""
    logit, label = _counted(logit, label, mask)
    mean = label.mean()
    return logit.sigmoid().mean() / mean.where(mean > 0, torch.full_like(mean, torch.nan))


def expected_calibration_error(logit: Tensor, label: Tensor, mask: Tensor | None = None, bins: int = 10) -> Tensor:
    """Sum over bins of share of rows times |mean probability - mean label|; bins hold equally many rows.

    Equally many, not equally wide: rare tasks have nearly all probabilities in the lowest of ten equal intervals. Rows
    whose logits tie may fall on both sides of a border; each counts with the mean of the tied, whatever their order.

    Returns:
        float64 scalar in [0, 1], NaN without rows.
    """
    logit, label = _counted(logit, label, mask)
    if not len(logit):
        return torch.tensor(torch.nan, dtype=torch.float64)
    _, of_row, tied = torch.unique(logit, return_inverse=True, return_counts=True)  # ascending
    total = logit.new_zeros(len(tied)).index_add(0, of_row, logit.sigmoid() - label)
    gap: Tensor = (total / tied).repeat_interleave(tied)
    return sum((part.sum().abs() for part in gap.tensor_split(bins)), gap.new_zeros(())) / len(gap)


def _counted(logit: Tensor, label: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is not None:
        logit, label = logit[mask], label[mask]
    return logit.double(), label.double()


def gauc_interval(
    score: Tensor,
    label: Tensor,
    group: Tensor,
    mask: Tensor | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """GAUC of each task, averaged over tasks, with its bootstrap interval over USERS: all rows of a user go together.

    Args:
        score: [N] or [N, T].
        label: as ``score``.
        group: int64 [N].
        mask: as ``score``; None for all.
        resamples: bootstrap samples, at least 100.
        confidence: coverage in (0, 1).
        seed: seed of the drawing.

    Raises:
        ValueError: fewer than two users.
    """
    columns = [score.unsqueeze(1) if score.dim() == 1 else score, label.reshape(len(label), -1)]
    masks = torch.ones_like(columns[0], dtype=torch.bool) if mask is None else mask.reshape(len(mask), -1)
    users, of_row = torch.unique(group, return_inverse=True)
    units = np.zeros((len(users), columns[0].shape[1], 2))  # weight and weight * AUC of each user and task
    for t in range(units.shape[1]):
        found = group_auc(columns[0][:, t], columns[1][:, t], of_row, masks[:, t])
        place = found.group.cpu().numpy()
        units[place, t, 0] = found.rows.cpu().numpy()
        units[place, t, 1] = (found.rows * found.auc).cpu().numpy()

    def statistic(drawn: Any) -> float:
        weight, hits = drawn.sum(0).T
        return float(np.mean(hits[weight > 0] / weight[weight > 0])) if (weight > 0).any() else float("nan")

    return bootstrap_interval(units, statistic, resamples=resamples, confidence=confidence, seed=seed)


class RankingScores(Metric):
    """All scores of one domain: ``<kind>`` the mean over tasks, ``<kind>_<task>`` each task; NaN where undefined.

    One metric and not one per score, so that rows are kept once and modules stay few. The rows of an epoch are kept (9
    bytes per row and task, 8 per row, 4 more per row and task where the source knows probabilities) and scored at its
    end. A mean leaves out tasks whose score is not defined.

    Args:
        tasks: names of the tasks, in the order of the columns.
        kinds: which scores. ``calibration`` is |mean p / mean y - 1|; ``gauc_expected`` replaces labels by the source's
            true probabilities: the same number without the noise of drawn labels (for a task of 0.5 per cent a tenth of
            the standard error over test users); it is left out where the source knows none.

    Attributes:
        larger_is_better: name of each score -> whether a larger one is better.
        scorable: after `compute`, users with both classes in some task, those behind a mean within users.

    Shape:
        update(logits [N, T], label [N, T], mask bool [N, T], user int64 [N], oracle [N, T] or None);
        compute() -> name -> scalar.

    Raises:
        ValueError: unknown kind, or no task.
    """

    is_differentiable = False
    full_state_update = False
    logit: list[Tensor]
    label: list[Tensor]
    mask: list[Tensor]
    user: list[Tensor]
    oracle: list[Tensor]

    def __init__(self, tasks: Sequence[str], kinds: Sequence[Kind] = DEFAULT_KINDS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"kind={kind!r}: choose from {', '.join(KINDS)}")
        if not tasks:
            raise ValueError("tasks=[] leaves nothing to score; name at least one")
        self.tasks, self.kinds = list(tasks), list(kinds)
        self.scorable = 0
        self.larger_is_better = {
            name: kind in ("gauc", "gauc_expected", "auc")
            for kind in kinds
            for name in (kind, *(f"{kind}_{task}" for task in tasks))
        }
        for name in ("logit", "label", "mask", "user", "oracle"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, label: Tensor, mask: Tensor, user: Tensor, oracle: Tensor | None = None) -> None:
        """Keep one batch of the domain."""
        self.logit.append(logits.detach().float())
        self.label.append(label)
        self.mask.append(mask)
        self.user.append(user)
        if oracle is not None:
            self.oracle.append(oracle)

    def rows(self) -> dict[str, Tensor]:
        """Return the kept rows: logit, label, mask [N, T], user [N], and oracle [N, T] if the source has one."""
        kept = {}
        for name in ("logit", "label", "mask", "user", "oracle"):
            value = getattr(self, name)
            if len(value):
                kept[name] = torch.cat(list(value)) if isinstance(value, list) else value
        return kept

    def compute(self) -> dict[str, Tensor]:
        """The scores over everything kept since the last reset."""
        rows = self.rows()
        self.scorable = scorable_users(rows)
        scores: dict[str, Tensor] = {}
        for kind in self.kinds:
            if kind == "gauc_expected" and "logit" in rows and "oracle" not in rows:
                continue
            values = torch.stack([score_task(kind, rows, t) for t in range(len(self.tasks))])
            scores |= {kind: values.nanmean(), **{f"{kind}_{task}": values[t] for t, task in enumerate(self.tasks)}}
        return scores


def scorable_users(rows: dict[str, Tensor]) -> int:
    """Users with a positive and a negative known label in at least one task.

    Args:
        rows: as of ``RankingScores.rows``.
    """
    if "logit" not in rows:
        return 0
    user, of_row = torch.unique(rows["user"], return_inverse=True)
    size, known = (len(user), rows["label"].shape[1]), rows["mask"].double()
    label = rows["label"].double()
    sums = [
        torch.zeros(size, dtype=torch.float64, device=label.device).index_add_(0, of_row, part)
        for part in (known * (label > 0), known * (label < 1))
    ]
    return int(((sums[0] > 0) & (sums[1] > 0)).any(1).sum())


def score_task(kind: Kind, rows: dict[str, Tensor], t: int) -> Tensor:
    """One score of task ``t``: float64 scalar, NaN where it is not defined (no rows, no oracle, one class only).

    Args:
        kind: one of `KINDS`.
        rows: as of ``RankingScores.rows``.
        t: index of the task.
    """
    if "logit" not in rows or (kind == "gauc_expected" and "oracle" not in rows):
        return torch.tensor(torch.nan, dtype=torch.float64)
    logit, label, mask = rows["logit"][:, t], rows["label"][:, t], rows["mask"][:, t]
    if kind == "gauc":
        return gauc(logit, label, rows["user"], mask)
    if kind == "gauc_expected":
        return gauc(logit, rows["oracle"][:, t], rows["user"], mask)
    if kind == "auc":
        return auc(logit, label, mask)
    if kind == "calibration":
        return (calibration(logit, label, mask) - 1).abs()
    return log_loss(logit, label, mask) if kind == "logloss" else expected_calibration_error(logit, label, mask)


def ranking_metrics(tasks: Sequence[str], kinds: Sequence[Kind] = DEFAULT_KINDS) -> MetricCollection:
    """The collection of one domain; its names are those of `RankingScores`."""
    return MetricCollection({"ranking": RankingScores(tasks, kinds)})
