# SPDX-License-Identifier: Apache-2.0
"""Scores per class and domain after a test, for programs (JSON) and for readers (Markdown). C classes."""

from __future__ import annotations

import math
from typing import Any, cast

from torch import Tensor
from torchmetrics import MetricCollection

from moeapps.files import write_json, write_text
from moeapps.text import markdown as as_markdown
from moeapps.training.run import run_dir
from moeapps.training.task import BaseTask
from tasks.point_cloud.metrics import SegmentationScore, scores


def class_rows(names: list[str], counts_CC: Tensor) -> list[dict[str, Any]]:
    """Scores of each class of one domain, at the raw points.

    Args:
        names: C class names.
        counts_CC: int64 counts, rows are targets.

    Returns:
        Per class ``class``, ``support`` and ``predicted`` (points of that label and of that answer), ``iou``
        (I / (support + predicted - I)) and ``accuracy`` (I / support), both None where the class has no target.
    """
    counts = counts_CC.double()
    hit, support, predicted = counts.diagonal().tolist(), counts.sum(dim=1).tolist(), counts.sum(dim=0).tolist()
    rows = []
    for i, name in enumerate(names):
        present = support[i] > 0
        iou = hit[i] / (support[i] + predicted[i] - hit[i]) if present else None
        accuracy = hit[i] / support[i] if present else None
        row = {"class": name, "support": int(support[i]), "predicted": int(predicted[i])}
        rows.append({**row, "iou": iou, "accuracy": accuracy})
    return rows


def domain_table(role: str, names: list[str], counts_CC: Tensor) -> dict[str, Any]:
    """Everything about one domain: its role, its scores (as in test.json), its classes, and the counts themselves.

    ``miou`` is the mean of ``iou`` over the classes with targets; ``miou_all`` counts the other classes as 0.
    """
    return {
        "role": role,
        "points": int(counts_CC.sum()),
        **{name: float(value) for name, value in scores(counts_CC).items()},
        "classes": class_rows(names, counts_CC),
        "confusion": counts_CC.tolist(),
    }


def write_class_tables(task: BaseTask, label_sets: dict[str, list[str]]) -> None:
    """Write metrics/per_class.json and .md of the test that has just ended; to be called by all processes.

    Args:
        task: whose test it was.
        label_sets: domain -> names of its classes.
    """
    held = task.scores["test"]
    tables = {}
    for domain in task.data.eval_domains("test"):
        metric = cast(SegmentationScore, cast(MetricCollection, held.metrics[held.index[domain]])["miou"])
        with metric.sync_context():  # counts of all processes
            counts_CC = metric.counts.detach().cpu().clone()
        tables[domain] = domain_table(held.domains[domain], label_sets[domain], counts_CC)
    folder = run_dir(task.trainer)
    if folder is not None and task.trainer.is_global_zero:
        write_json(folder / "metrics" / "per_class.json", {"confusion": "rows are targets", "domains": tables})
        write_text(folder / "metrics" / "per_class.md", markdown(tables))


def markdown(tables: dict[str, Any]) -> str:
    """Return the tables for readers: one row per domain, then one table per domain with a row per class."""
    lines = [
        "# Scores per domain and class",
        "",
        "Percent, at the raw points. mIoU: mean over the classes with targets; all: over all classes, one without",
        "targets counting 0. A dash: no target.",
        "",
        "| domain | role | points | mIoU | mIoU all | mAcc | allAcc |",
        "|---|---|---|---|---|---|---|",
    ]
    for domain, table in tables.items():
        values = " | ".join(_percent(table[name]) for name in ("miou", "miou_all", "macc", "allacc"))
        lines.append(f"| {domain} | {table['role']} | {table['points']:,} | {values} |")
    for domain, table in tables.items():
        lines += ["", f"## {domain} ({table['role']})", ""]
        lines += ["| class | IoU | accuracy | support | predicted |", "|---|---|---|---|---|"]
        for row in table["classes"]:
            values = f"{_percent(row['iou'])} | {_percent(row['accuracy'])} | {row['support']:,} | {row['predicted']:,}"
            lines.append(f"| {as_markdown(row['class'])} | {values} |")
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
