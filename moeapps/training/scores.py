# SPDX-License-Identifier: Apache-2.0
"""Scores per domain: metrics, losses and counts, and the means over roles made of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, Metric, MetricCollection, SumMetric

from moeapps.moe.ranks import is_spread, objects_of_all_ranks, rows_by_rank
from moeapps.training.contract import check_metrics, scalar

Direction = Literal["max", "min"]
Metrics = TypeVar("Metrics", bound=nn.Module)


def over_processes(metrics: Metrics) -> Metrics:
    """Let metrics join their states over processes, of which any may have no row; within `alone` they join nothing.

    Args:
        metrics: a metric or a module with metrics inside; one that brings a way of its own keeps it.
    """
    for metric in metrics.modules():
        if isinstance(metric, Metric):
            metric.dist_sync_fn = metric.dist_sync_fn or rows_by_rank
            metric.distributed_available_fn = is_spread
    return metrics


@dataclass(frozen=True)
class ScoreRow:
    """One number of one domain.

    Args:
        domain: name of the domain.
        role: ``seen``, ``validation`` or ``unseen``.
        metric: name of the metric.
        value: its value.
        n: items (scans, clips, rows) it was computed from.
        direction: whether a larger (``max``) or a smaller (``min``) value is better.
    """

    domain: str
    role: str
    metric: str
    value: float
    n: int
    direction: Direction


@dataclass(frozen=True)
class ScoreTable:
    """The scores of one evaluation and, where a task gives them, values per test unit.

    Args:
        scores: one entry per domain and metric.
        units: domain -> metric -> values per unit.
        parts: domain -> metric -> what each unit adds to the score, [U, G, 3], see `moeapps.evaluation.units`.
        scorable: domain -> units behind its scores: labelled items, or what a metric counts (users with both classes).
    """

    scores: list[ScoreRow]
    units: dict[str, dict[str, list[float]]]
    parts: dict[str, dict[str, list[list[list[float]]]]] = field(default_factory=dict)
    scorable: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return role -> metric -> mean over the domains of the role, plus ``gap``.

        ``gap`` = how much worse unseen domains are than seen ones (seen - unseen where larger is better, else
        unseen - seen). A domain whose metric is not a number is left out of the mean.
        """
        grouped: dict[str, dict[str, list[float]]] = {}
        for score in self.scores:
            grouped.setdefault(score.role, {}).setdefault(score.metric, []).append(score.value)
        means = {role: {name: _mean(values) for name, values in metrics.items()} for role, metrics in grouped.items()}
        if "seen" in means and "unseen" in means:
            sign = {score.metric: 1.0 if score.direction == "max" else -1.0 for score in self.scores}
            common = [name for name in means["seen"] if name in means["unseen"]]
            means["gap"] = {name: sign[name] * (means["seen"][name] - means["unseen"][name]) for name in common}
        return means

    def keys(self, stage: str) -> dict[str, float]:
        """Return the logged keys ``<stage>/<domain or role or gap>/<metric>``."""
        flat = {f"{stage}/{score.domain}/{score.metric}": score.value for score in self.scores}
        for role, metrics in self.summary().items():
            flat.update({f"{stage}/{role}/{name}": value for name, value in metrics.items()})
        return flat

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form: ``rows``, ``summary`` and, if there are any, ``scorable``, ``units`` and ``parts``."""
        value: dict[str, Any] = {"rows": [vars(score) for score in self.scores], "summary": self.summary()}
        more = {"scorable": self.scorable, "units": self.units, "parts": self.parts}
        return value | {name: content for name, content in more.items() if content}


class DomainScores(nn.Module):
    """Metrics, mean loss, item count and per-unit values of several domains; its states are summed over processes.

    Args:
        domains: domain -> role, in the order of the table.
        configure_metrics: gives fresh metrics for a domain.

    Raises:
        ValueError: a metric is called ``loss``, which is the name of the mean loss.
    """

    def __init__(self, domains: dict[str, str], configure_metrics: Callable[[str], MetricCollection]) -> None:
        super().__init__()
        self.domains = dict(domains)
        self.index = {name: i for i, name in enumerate(domains)}
        made = {name: configure_metrics(name) for name in domains}
        for name, metrics in made.items():
            check_metrics(name, metrics)
            if "loss" in metrics:
                raise ValueError(f"the metrics of domain {name!r} hold a 'loss'; choose another name for it")
        self.metrics = nn.ModuleList(made.values())
        # Sums and counts, not MeanMetric: with nan_strategy="disable" that one forgets the weights (torchmetrics 1.9).
        self.losses = nn.ModuleList([SumMetric(nan_strategy="disable") for _ in domains])
        self.weights = nn.ModuleList([SumMetric() for _ in domains])
        self.counts = nn.ModuleList([SumMetric() for _ in domains])
        self.units: dict[str, dict[str, CatMetric]] = {name: {} for name in domains}
        self.parts: dict[str, dict[str, UnitParts]] = {name: {} for name in domains}
        over_processes(self)

    def reset(self) -> None:
        """Forget everything."""
        for module in (*self.metrics, *self.losses, *self.weights, *self.counts):
            cast(Metric, module).reset()
        self.units = {name: {} for name in self.domains}
        self.parts = {name: {} for name in self.domains}

    def update(
        self,
        domain: str,
        loss: Tensor,
        batch_size: int,
        metric_args: tuple[Any, ...],
        units: dict[str, Tensor],
        *,
        weight: int | None = None,
        parts: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Add one batch of a domain.

        Args:
            domain: its name.
            loss: scalar, the mean over ``weight`` items; not looked at where that is 0.
            batch_size: items of the batch.
            metric_args: arguments of the metrics' ``update``.
            units: values per unit.
            weight: items with a label; None for all.
            parts: metric -> int64 [n] which unit (the same number: the same unit) and [n, G, 3] what is added to it.
        """
        i = self.index[domain]
        if metric_args:
            cast(MetricCollection, self.metrics[i]).update(*metric_args)
        weight = batch_size if weight is None else weight
        if weight:  # an undefined loss is left out: 0 * nan is nan
            cast(SumMetric, self.losses[i]).update(loss.detach() * weight)
        cast(SumMetric, self.weights[i]).update(weight)
        cast(SumMetric, self.counts[i]).update(batch_size)
        for name, (unit, added) in (parts or {}).items():
            self._parts_of(domain, name, added.shape[1], loss.device).update(unit, added)
        for name, values in units.items():
            self._units_of(domain, name, loss.device).update(values.detach().float())

    def not_updated(self, domain: str) -> list[str]:
        """Return the metrics of a domain that nothing was given to, although this process has seen labelled items."""
        i = self.index[domain]
        if not float(cast(Any, self.weights[i]).sum_value):
            return []
        collection = cast(MetricCollection, self.metrics[i])
        metrics = collection.items(keep_base=True, copy_state=False)
        return [name for name, metric in metrics if not metric.update_called]

    def compute(self, domains: list[str]) -> ScoreTable:
        """Return the scores of the given domains over all processes; a collective, to be called by each of them."""
        with warnings.catch_warnings():
            # A process that only had padding batches of a domain has updated nothing; the sum over processes is right.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            return self._compute(domains)

    def _agree_on_units(self, domains: list[str]) -> None:
        """Give a process that had padding batches alone the unit metrics of the others."""
        own = {d: (list(self.units[d]), {n: m.groups for n, m in self.parts[d].items()}) for d in domains}
        for told in objects_of_all_ranks(own):
            for domain, (names, groups) in told.items():
                device = cast(SumMetric, self.counts[self.index[domain]]).device
                for name in names:
                    self._units_of(domain, name, device)
                for name, number in groups.items():
                    self._parts_of(domain, name, number, device)

    def _units_of(self, domain: str, name: str, device: torch.device) -> CatMetric:
        return self.units[domain].setdefault(name, over_processes(CatMetric(nan_strategy="disable")).to(device))

    def _parts_of(self, domain: str, name: str, groups: int, device: torch.device) -> UnitParts:
        return self.parts[domain].setdefault(name, over_processes(UnitParts(groups)).to(device))

    def _compute(self, domains: list[str]) -> ScoreTable:
        self._agree_on_units(domains)
        scores: list[ScoreRow] = []
        units: dict[str, dict[str, list[float]]] = {}
        parts: dict[str, dict[str, list[list[list[float]]]]] = {}
        scorable: dict[str, int] = {}
        for domain in domains:
            i, role = self.index[domain], self.domains[domain]
            n = int(cast(SumMetric, self.counts[i]).compute())
            weight = int(cast(SumMetric, self.weights[i]).compute())
            loss = float(cast(SumMetric, self.losses[i]).compute()) / weight if weight else math.nan
            scores.append(ScoreRow(domain, role, "loss", loss, n, "min"))
            collection = cast(MetricCollection, self.metrics[i])
            values = collection.compute() if len(collection) else {}
            for name, value in values.items():
                direction: Direction = "min" if larger_is_better(collection, name) is False else "max"
                scores.append(ScoreRow(domain, role, name, scalar(domain, name, value), n, direction))
            if self.units[domain]:
                units[domain] = {
                    name: torch.as_tensor(metric.compute()).flatten().tolist()
                    for name, metric in sorted(self.units[domain].items())
                }
            if self.parts[domain]:
                parts[domain] = {name: metric.compute() for name, metric in sorted(self.parts[domain].items())}
            counted = [int(cast(Any, metric).scorable) for metric in collection.values() if hasattr(metric, "scorable")]
            scorable[domain] = max(counted, default=weight)
        return ScoreTable(scores, units, parts, scorable)


class UnitParts(nn.Module):
    """What each unit adds to a score: batches may bring parts of a unit, which are summed, in any order.

    Args:
        groups: G.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.rows = CatMetric(nan_strategy="disable")

    def update(self, unit: Tensor, added: Tensor) -> None:
        """Add rows: int64 [n] numbers of units, below 2^32, and [n, G, 3]."""
        halves = torch.stack([unit >> 16, unit & 0xFFFF], 1)  # float32 holds no larger whole numbers exactly
        self.rows.update(torch.cat([halves.float(), added.detach().flatten(1).float()], 1).flatten())

    def compute(self) -> list[list[list[float]]]:
        """Return [U, G, 3], units in the order of their numbers."""
        rows = torch.as_tensor(self.rows.compute()).reshape(-1, 2 + 3 * self.groups).double()
        _, unit = torch.unique(rows[:, 0] * 2**16 + rows[:, 1], return_inverse=True)
        sums = rows.new_zeros(int(unit.max()) + 1 if len(unit) else 0, 3 * self.groups).index_add_(0, unit, rows[:, 2:])
        found: list[list[list[float]]] = sums.unflatten(1, (self.groups, 3)).tolist()
        return found


def larger_is_better(collection: MetricCollection, name: str) -> bool | None:
    """Ask the metric; one that gives several numbers says it for each in an attribute ``larger_is_better``."""
    if name in collection:
        return collection[name].higher_is_better
    known = [getattr(metric, "larger_is_better", {}) for metric in collection.values()]
    return next((table[name] for table in known if name in table), None)


def _mean(values: list[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan
