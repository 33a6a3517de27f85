# SPDX-License-Identifier: Apache-2.0
"""After a test: numbers, report and figure on experts that are silent, serve one task only or miss rare tasks.

Shape legend: N rows, E experts, o units, G gates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from moeapps.files import write_json, write_text
from moeapps.moe import DenseRouting
from moeapps.moe.record import Kept, Record
from moeapps.reporting.figures import save_figure
from moeapps.training.callbacks import ExpertReport
from moeapps.training.task import BaseTask
from tasks.recommendation.data.batch import Interactions
from tasks.recommendation.module import RankingTask, masked_losses
from tasks.recommendation.nets.fast_gates import StackedGates
from tasks.recommendation.nets.gates import HomeGates
from tasks.recommendation.nets.levels import ExpertLevel, LevelPlan
from tasks.recommendation.report.diagnosis import LevelReport, LevelSample, Thresholds, diagnose, rate_correlation

log = logging.getLogger("moeapps")
PUSH = 30.0
"""By how much the logits of a task's own experts are lowered to see whether they still learn."""


class ExpertDiagnostics(ExpertReport):
    """Measure expert collapse, degradation and underfitting on test rows of the seen domains.

    Writes metrics/experts.json (every number of every level, expert and gate), metrics/experts.md (the same to read),
    figures/gates.png (mean weights of every gate) and, for a page, gallery/rankings.json (impressions of a few users,
    ranked); adds groups ``experts`` (worst over levels) and ``experts.level_<k>`` to the summary of metrics/test.json.
    ``own_gradient_kept`` there: the gradient that reaches a task's own experts when its gate ignores them (their logits
    lowered by 30), over the gradient before, least over tasks.

    Under several processes the rows are those of the first.

    Args:
        rows_per_domain: test rows of each seen domain that are looked at.
        thresholds: when a number is called an illness.
        figure: draw the gates.
    """

    keep: ClassVar[tuple[Kept, ...]] = ("experts",)
    runs_network = True

    def __init__(
        self, rows_per_domain: int = 2048, thresholds: Thresholds | None = None, *, figure: bool = True
    ) -> None:
        super().__init__()
        self.rows_per_domain, self.thresholds, self.figure = rows_per_domain, thresholds or Thresholds(), figure
        self._taken: dict[str, int] = {}
        self._parts: list[list[LevelSample]] = []
        self._labels: list[tuple[Tensor, Tensor]] = []
        self._batch: Interactions | None = None
        self._task: RankingTask | None = None
        self.levels: list[LevelReport] = []

    def start(self, task: BaseTask) -> None:
        """Start anew."""
        super().start(task)
        self._taken = dict.fromkeys(self.domains, 0)
        self._parts, self._labels, self._batch, self.levels = [], [], None, []

    def wants(self, domain: str) -> bool:
        """Whether more rows of the domain are looked at."""
        return self._taken.get(domain, self.rows_per_domain) < self.rows_per_domain

    def count(self, task: BaseTask, batch: Interactions, records: list[Record], domain: int) -> None:
        """Keep what the levels did."""
        self._taken[self.domains[domain]] += len(batch)
        levels = expert_levels(cast(RankingTask, task))
        self._parts.append([level_sample(record, levels[record.index].plan) for record in records])
        self._labels.append((batch.label.cpu(), batch.mask.cpu()))
        self._batch = self._batch or batch

    def finish(self, task: BaseTask, folder: Path | None) -> None:
        """Compute and write."""
        if not self._parts or self._batch is None:
            return
        task = self._task = cast(RankingTask, task)
        rates = positive_rates(task.tasks, self._labels)
        samples = [joined([part[k] for part in self._parts]) for k in range(len(self._parts[0]))]
        self._parts = []
        category = dict(zip(task.tasks, task.facts["categories"], strict=True))
        category |= {name: name for name in task.facts["categories"]}
        self.levels = [diagnose(sample, rates, category, self.thresholds) for sample in samples]
        gradients = own_gradients(task, self._batch)
        self.result = summary(self.levels, rates, gradients)
        if folder is not None:
            self._write(folder, samples, rates, gradients)

    def _write(
        self, folder: Path, samples: list[LevelSample], rates: dict[str, float], gradients: dict[str, dict[str, float]]
    ) -> None:
        levels = [{**vars(level), **mean_weights(sample)} for level, sample in zip(self.levels, samples, strict=True)]
        content = {"thresholds": vars(self.thresholds), "rates": rates, "gradients": gradients, "levels": levels}
        write_json(folder / "metrics" / "experts.json", content | self.result)
        write_json(folder / "gallery" / "rankings.json", self._rankings(samples[-1]))
        path = folder / "metrics" / "experts.md"
        write_text(path, markdown(self.levels, rates, gradients))
        if self.figure:
            draw_gates(samples, folder / "figures" / "gates.png")
        for k, level in enumerate(self.levels, start=1):
            for illness, names in level.findings.items():
                if names:
                    log.info("level %d, %s: %s; see %s", k, illness, ", ".join(names), path)

    def _rankings(self, last: LevelSample, users: int = 4, most: int = 8) -> dict[str, Any]:
        """Impressions of the users with most of them in the first batch, the likeliest first, for a page."""
        task, batch = self._task, self._batch
        assert task is not None
        assert batch is not None
        mode = task.training
        with torch.no_grad():
            probability_BT = task.eval()(batch).sigmoid().cpu()
        task.train(mode)
        expert_B = last.share[0, : len(batch)].argmax(1)  # the first batch's rows come first
        found = []
        number, count = batch.user.cpu().unique(return_counts=True)
        for user in number[count.argsort(descending=True, stable=True)][:users].tolist():
            rows = torch.nonzero(batch.user.cpu() == user).flatten()
            rows = rows[probability_BT[rows, 0].argsort(descending=True)][:most]
            done_BT = (batch.label * batch.mask).cpu() > 0
            shown = [
                {
                    "row": int(batch.row[b]),
                    "probability": probability_BT[b].tolist(),
                    "done": [name for name, was in zip(task.tasks, done_BT[b].tolist(), strict=True) if was],
                    "expert": last.experts[int(expert_B[b])],
                }
                for b in rows.tolist()
            ]
            found.append({"user": user, "rows": shown})
        return {"tasks": list(task.tasks), "users": found}


# --- what the levels did ----------------------------------------------------------------------------------------------


def expert_levels(task: RankingTask) -> list[ExpertLevel]:
    """The levels of a task's network, first one first."""
    return [module for module in task.net.modules() if isinstance(module, ExpertLevel)]


def level_sample(record: Record, plan: LevelPlan) -> LevelSample:
    """What a level did, from the record of its layer, which keeps the outputs of the experts."""
    routing, output = record.routing, record.expert_output
    assert isinstance(routing, DenseRouting)
    assert routing.probs_NE is not None
    assert routing.allowed is not None
    assert output is not None
    owns = torch.zeros(len(plan.sees), routing.num_experts) if plan.owns is None else torch.as_tensor(plan.owns)
    return LevelSample(
        output=output.detach().float().cpu(),
        share=routing.probs_NE.detach().float().cpu(),
        weight=routing.weight.detach().float().cpu(),
        allowed=routing.allowed.squeeze(1).cpu(),
        owned=owns.bool(),
        experts=plan.experts,
        gates=plan.gates,
    )


def joined(parts: list[LevelSample]) -> LevelSample:
    """The rows of several batches."""
    return replace(
        parts[0],
        output=torch.cat([part.output for part in parts]),
        share=torch.cat([part.share for part in parts], 1),
        weight=torch.cat([part.weight for part in parts], 1),
    )


def positive_rates(tasks: list[str], labels: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Share of positives among the known labels of each task; NaN for a task without a label."""
    label, mask = (torch.cat([pair[i] for pair in labels]).double() for i in (0, 1))
    rate = (label * mask).sum(0) / mask.sum(0)
    return dict(zip(tasks, rate.tolist(), strict=True))


# --- gradients of own experts -----------------------------------------------------------------------------------------


def own_gradients(task: RankingTask, batch: Interactions) -> dict[str, dict[str, float]]:
    """Norm of each task's loss gradient at its own experts of the last level that has any.

    Returns:
        Task -> ``grad_ratio`` (over the mean over tasks) and ``kept`` (after `PUSH`, over before); nothing for networks
        whose tasks own no expert. Parameters, gradients and modes are left as they were.
    """
    levels = [
        level for level in expert_levels(task) if level.plan.owns is not None and level.plan.gates == tuple(task.tasks)
    ]
    if not levels or not bool(torch.as_tensor(levels[-1].plan.owns).any(1).all()):
        return {}
    level = levels[-1]
    modes = [(module, module.training) for module in task.modules()]
    try:
        task.eval()
        with torch.inference_mode(False), torch.enable_grad():
            copy = batch.take(torch.arange(min(len(batch), 2048)))
            before = _norms(task, level, copy)
            with _pushed(level):
                after = _norms(task, level, copy)
    finally:
        for module, mode in modes:
            module.training = mode
    known = [value for value in before.values() if not math.isnan(value)]
    mean = sum(known) / max(len(known), 1)
    return {
        name: {"grad_ratio": before[name] / max(mean, 1e-30), "kept": after[name] / max(before[name], 1e-30)}
        for name in before
    }


def _norms(task: RankingTask, level: ExpertLevel, batch: Interactions) -> dict[str, float]:
    weight = cast(Tensor, level.moe.experts.weight)
    losses_T = masked_losses(task(batch), batch.label, batch.mask, task.get_buffer("positive_weight"))
    norms = {}
    for t, name in enumerate(task.tasks):
        grad = torch.autograd.grad(losses_T[t], weight, retain_graph=True)[0]
        norm = float(grad[torch.as_tensor(level.plan.owns)[t].to(grad.device)].norm())
        norms[name] = math.nan if losses_T[t].isnan() else norm
    return norms


@contextmanager
def _pushed(level: ExpertLevel) -> Iterator[None]:
    """Lower the logits of every gate's own experts by `PUSH`; those of self-gates stay."""
    router = cast(StackedGates | HomeGates, level.moe.router)
    biases = router.biases_of(torch.as_tensor(level.plan.owns))
    kept = [bias.detach().clone() for bias, _ in biases]
    with torch.no_grad():
        for bias, own in biases:
            bias[own] -= PUSH
    try:
        yield
    finally:
        with torch.no_grad():
            for (bias, _), before in zip(biases, kept, strict=True):
                bias.copy_(before)


def mean_weights(sample: LevelSample) -> dict[str, Any]:
    """Names of gates and experts, and the mean weight that each gate gives to each expert: [G, E], 0 where masked."""
    share_GE = sample.share.double().mean(1).where(sample.allowed, 0.0)
    return {"gates": list(sample.gates), "experts": list(sample.experts), "share": share_GE.tolist()}


# --- saying it --------------------------------------------------------------------------------------------------------


def summary(
    levels: list[LevelReport], rates: dict[str, float], gradients: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Groups of numbers for the results file: the worst over levels, and each level."""
    worst: dict[str, float] = {}
    for level in levels:
        for key, value in level.overall.items():
            if key.endswith("_count"):
                worst[key] = worst.get(key, 0.0) + value
            else:
                pick = min if key.endswith(("_min", "_mean")) else max
                worst[key] = pick(worst.get(key, value), value)
    own = {g: x for level in levels for g, x in level.per_gate.items() if "own_mass" in x and g in rates}
    worst |= {f"own_mass_{name}": numbers["own_mass"] for name, numbers in own.items()}
    correlation = rate_correlation({name: x["own_mass"] / x["fair"] for name, x in own.items()}, rates)
    if correlation is not None:
        worst["own_mass_rate_correlation"] = correlation
    if gradients:
        for key, name in (("own_gradient_kept", "kept"), ("grad_ratio_min", "grad_ratio")):
            defined = [numbers[name] for numbers in gradients.values() if not math.isnan(numbers[name])]
            worst[key] = min(defined, default=math.nan)
    return {"experts": worst} | {f"experts.level_{k}": level.overall for k, level in enumerate(levels, start=1)}


def markdown(levels: list[LevelReport], rates: dict[str, float], gradients: dict[str, dict[str, float]]) -> str:
    """The report to read."""
    lines = ["# Experts", "", "Test rows of the seen domains. Thresholds are in experts.json.", ""]
    for k, level in enumerate(levels, start=1):
        lines += [f"## Level {k}", ""]
        for illness, names in level.findings.items():
            lines.append(f"- {illness}: {', '.join(names) if names else 'none'}")
        lines += ["", *_table("expert", level.per_expert)]
        gates = {
            name: ({"rate": rates[name]} if name in rates else {}) | numbers | gradients.get(name, {})
            for name, numbers in level.per_gate.items()
        }
        lines += ["", *_table("gate", gates), ""]
    return "\n".join(lines)


def _table(head: str, rows: dict[str, dict[str, float]]) -> list[str]:
    columns = list(dict.fromkeys(key for numbers in rows.values() for key in numbers))
    lines = [f"| {head} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, numbers in rows.items():
        cells = [f"{numbers[key]:.3g}" if key in numbers else "" for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def draw_gates(samples: list[LevelSample], path: Path) -> None:
    """Draw the mean weights of every gate (rows) on every expert (columns), one panel per level; grey = not allowed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = sum(2.0 + 0.42 * len(sample.experts) for sample in samples)
    figure = Figure(figsize=(width, 1.6 + 0.36 * max(len(sample.gates) for sample in samples)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(samples), squeeze=False, width_ratios=[len(sample.experts) for sample in samples])[0]
    for k, (axis, sample) in enumerate(zip(axes, samples, strict=True), start=1):
        mean_GE = sample.share.double().mean(1).where(sample.allowed, torch.nan)
        axis.set_facecolor("#d9d9d9")
        image = axis.imshow(mean_GE.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(sample.experts)), sample.experts, rotation=90, fontsize=8)
        axis.set_yticks(range(len(sample.gates)), sample.gates, fontsize=8)
        axis.set_title(f"level {k}", fontsize=9)
        axis.set_xlabel("expert (grey: the gate may not see it)", fontsize=8)
        axis.set_ylabel("gate", fontsize=8)
    figure.colorbar(image, ax=list(axes), label="mean gate weight", shrink=0.8)
    save_figure(figure, path, dpi=120)
