# SPDX-License-Identifier: Apache-2.0
"""The results file of an evaluation: what its run is, and the scores of its domains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moeapps.files import write_json
from moeapps.training.scores import ScoreTable

if TYPE_CHECKING:
    from moeapps.training.task import BaseTask


def write_results(task: BaseTask, stage: str, table: ScoreTable, folder: Path, trained: Mapping[str, int]) -> None:
    """Write metrics/<stage>.json of a run.

    Args:
        task: that was evaluated.
        stage: ``val`` or ``test``.
        table: its scores.
        folder: of the run.
        trained: epoch and step of the checkpoint, where the weights came from one.
    """
    results = {"header": header(task, trained), **table.as_dict()}
    results["summary"] |= told_by_callbacks(task, "describe_results")
    callbacks = cast(Any, task.trainer).callbacks
    failed = {type(c).__name__: c.failure for c in callbacks if getattr(c, "failure", 0)}
    results["header"] |= {"failed_reports": failed} if failed else {}
    write_json(folder / "metrics" / f"{stage}.json", results)


def header(task: BaseTask, trained: Mapping[str, int]) -> dict[str, Any]:
    """Return what a results file says about its run: the parts that callbacks and the command line know.

    ``global_step`` is the step that training had come to, ``tested_step`` that of the weights.
    """
    kind = type(task)
    parts: dict[str, Any] = {"task": f"{kind.__module__}.{kind.__qualname__}", "main_metric": task.main_metric}
    parts |= told_by_callbacks(task, "describe_run")
    parts["sources"] = dict(task.data.sources)
    parts["missing_domains"] = dict(task.data.missing)
    if task.origin is not None:
        parts["started_from"] = task.origin.as_dict()
    now = {"epoch": task.current_epoch, "global_step": task.global_step}
    # A test of a checkpoint does not train: how far its training had come stands in the checkpoint. After a training,
    # the weights tested are those of the best checkpoint, which may be of an earlier step than the last.
    tested = {"tested_step": trained.get("global_step", task.global_step)}
    return parts | (now if task.global_step else {**now, **trained}) | tested


def told_by_callbacks(task: BaseTask, method: str) -> dict[str, Any]:
    """Join what callbacks add to a results file.

    ``describe_run`` gives parts of the header, ``describe_results`` groups of numbers beside the means over roles.
    """
    parts: dict[str, Any] = {}
    for callback in cast(Any, task.trainer).callbacks:
        describe: Callable[[], dict[str, Any]] | None = getattr(callback, method, None)
        parts |= {} if describe is None else describe()
    return parts
