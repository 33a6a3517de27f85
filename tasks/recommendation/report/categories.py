# SPDX-License-Identifier: Apache-2.0
"""Mean scores over the tasks of a category, and the distance to the true probabilities where these are known."""

from __future__ import annotations

import math
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from moeapps.training.callbacks.side import SideReport
from moeapps.training.scores import DomainScores
from moeapps.training.task import BaseTask
from tasks.recommendation.metrics import RankingScores, gauc

Groups = dict[str, dict[str, float]]


class CategoryScores(SideReport):
    """Add means over tasks to the summary of metrics/test.json.

    * ``<role>.<category>``: every kind of score, mean over the role's domains and the category's tasks; only for logs
      of several categories.
    * ``oracle.<role>``: ``gauc`` and ``gauc_expected`` of the true probabilities, where the log knows them; no model
      can be better in expectation. ``oracle/margin``: the least, over domains and tasks, of what the truth's expected
      GAUC is above the model's; below 0 something leaks.

    A score that is not defined (a task without positives in a domain) is left out of the means.
    """

    def __init__(self) -> None:
        self._trainer: L.Trainer | None = None
        self._oracle: Groups = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remember whose results these are."""
        self._trainer = trainer

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        task = cast(BaseTask, pl_module)
        self._oracle = oracle_scores(task.scores["test" if trainer.testing else "val"], task.facts["tasks"])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask for the truth where results are written, not while training."""
        if trainer.state.fn == "validate":
            self.on_test_epoch_end(trainer, pl_module)

    def describe_results(self) -> Groups:
        """Return the groups."""
        trainer = self._trainer
        if trainer is None:
            return {}
        task = cast(BaseTask, trainer.lightning_module)
        means = category_means(task.results.as_dict()["rows"], task.facts["tasks"], task.facts["categories"])
        return means | self._oracle


def category_means(rows: list[dict[str, Any]], tasks: list[str], categories: list[str]) -> Groups:
    """Means over domains of a role and tasks of a category.

    Args:
        rows: entries with domain, role, metric (``<kind>_<task>``) and value.
        tasks: names of the tasks.
        categories: category of each task.
    """
    if len(set(categories)) < 2:
        return {}
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for task, category in zip(tasks, categories, strict=True):
            kind = str(row["metric"]).removesuffix(f"_{task}")
            if kind != row["metric"] and not math.isnan(row["value"]):
                found.setdefault(f"{row['role']}.{category}", {}).setdefault(kind, []).append(float(row["value"]))
    return {
        group: {kind: sum(values) / len(values) for kind, values in kinds.items()} for group, kinds in found.items()
    }


def oracle_scores(scores: DomainScores, tasks: list[str]) -> Groups:
    """The scores of the true probabilities and the model's distance to them; empty for logs without them.

    To be called by all processes, each of which holds a part of the rows.
    """
    found: dict[str, dict[str, list[float]]] = {}
    margins = []
    for (_, role), metrics in zip(scores.domains.items(), scores.metrics, strict=True):
        kept = [m for m in cast(MetricCollection, metrics).values() if isinstance(m, RankingScores)]
        rows: dict[str, Tensor] = {}
        if kept:
            with kept[0].sync_context(dist_sync_fn=kept[0].dist_sync_fn):
                rows = kept[0].rows()
        if "oracle" not in rows:
            continue
        for t in range(len(tasks)):
            truth, mask, user = rows["oracle"][:, t], rows["mask"][:, t], rows["user"]
            # Float32 logits of rare tasks tie where probabilities do not; double keeps the comparison exact.
            best = gauc(truth.double(), truth.double(), user, mask)
            model = gauc(rows["logit"][:, t].double(), truth.double(), user, mask)
            margins.append(best - model)
            group = found.setdefault(f"oracle.{role}", {})
            group.setdefault("gauc_expected", []).append(float(best))
            group.setdefault("gauc", []).append(float(gauc(truth, rows["label"][:, t], user, mask)))
    groups = {group: {kind: _mean(values) for kind, values in kinds.items()} for group, kinds in found.items()}
    return groups | ({"oracle": {"margin": _least(margins)}} if margins else {})


def _mean(values: list[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _least(values: list[Tensor]) -> float:
    return float(torch.stack(values).min())
