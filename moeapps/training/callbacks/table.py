# SPDX-License-Identifier: Apache-2.0
"""The table at the end of a test: domains by metrics, role means, what the experts did, and where the files are."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any, cast

import lightning as L
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from moeapps.text import plain
from moeapps.training.callbacks.summary import MoESummary
from moeapps.training.results import told_by_callbacks
from moeapps.training.run import run_dir
from moeapps.training.scores import ScoreTable
from moeapps.training.task import BaseTask

MOST_COLUMNS = 12
_COLUMN = 3  # what a column takes beside its text


class EndTable(L.Callback):
    """Print the scores of every domain with its role, the means over roles and the gap; then what else a user came for.

    That is the headline numbers of the task (`Shown.headlines`), a sentence on what the experts did, what the training
    has cost, and where to look further.
    """

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_dir(trainer)
        if trainer.is_global_zero:
            table = getattr(pl_module, "results", None)
            if isinstance(table, ScoreTable):
                console = Console()
                main = str(getattr(pl_module, "main_metric", ""))
                console.print(score_table(table, main=main, width=console.width))
                lines = [*headline_lines(cast(BaseTask, pl_module)), *compute_lines(trainer)]
                if folder is not None:
                    lines = [*lines, *experts_line(folder), *place_lines(folder)]
                for line in lines:
                    console.print(line, soft_wrap=True, highlight=False, markup=False)


def headline_lines(task: BaseTask) -> list[str]:
    """Return the numbers beside the scores that the task's users come for, as far as this test has them."""
    if not task.headlines:
        return []
    told: dict[str, dict[str, float]] = told_by_callbacks(task, "describe_results")
    found = []
    for key, words in task.headlines.items():
        group, _, number = key.partition("/")
        value = told.get(group, {}).get(number)
        if value is not None:
            found.append(f"{words}: {_cell(value)}")
    return [f"{'beside it:' if not place else '':<12}{line}" for place, line in enumerate(found)]


def experts_line(folder: Path) -> list[str]:
    """Return what the experts of a run did, in one sentence; nothing where it cannot be read."""
    from moeapps.reporting.findings import describe_run

    if not (folder / "metrics" / "routing_test.json").is_file():
        return []
    try:
        return [f"{'experts:':<12}{plain(describe_run(folder).sentence, 1000)}"]
    except (ValueError, OSError) as error:
        return [f"{'experts:':<12}not told ({plain(error)})"]


def place_lines(folder: Path) -> list[str]:
    """Return where the files of a run are, and how to look at them."""
    places = (("run folder", folder), ("figures", folder / "figures"), ("numbers", folder / "metrics"))
    found = [f"{label + ':':<12}{path}" for label, path in places if path.is_dir()]
    return [*found, f"{'look:':<12}moeapps report {shlex.quote(str(folder))}"]


def compute_lines(trainer: L.Trainer) -> list[str]:
    """Return what the run's training has cost, where the summary counted it."""
    told = [callback.describe_run() for callback in cast(Any, trainer).callbacks if isinstance(callback, MoESummary)]
    return [
        f"{'training:':<12}{header['train_flops']:.4g} FLOPs in {header['train_steps']:,} steps"
        for header in told
        if "train_flops" in header
    ]


def score_table(table: ScoreTable, *, main: str = "", width: int = 120) -> Table:
    """Return a rich table: one row per domain, then one per role mean and the gap.

    From 80 columns on names and numbers are not cut: metrics that do not fit are left to metrics/test.json, and a
    line says so.

    Args:
        table: the scores.
        main: the metric that comes first.
        width: columns of the terminal.
    """
    metrics, left_out = _fitting(table, main, width)
    caption = f"not shown for want of room, in metrics/test.json: {', '.join(left_out)}" if left_out else None
    rich = Table(title="test", caption=caption, caption_justify="left")
    for name in ("domain", "role", "n"):
        rich.add_column(name, justify="right" if name == "n" else "left", no_wrap=True)
    for name in metrics:
        rich.add_column(Text(name), justify="right", no_wrap=True)
    values = {(score.domain, score.metric): score.value for score in table.scores}
    for domain, role, n in dict.fromkeys((score.domain, score.role, score.n) for score in table.scores):
        cells = [values.get((domain, name)) for name in metrics]
        rich.add_row(domain, role, str(n), *(_cell(value) for value in cells))
    rich.add_section()
    for role, means in table.summary().items():
        rich.add_row(_label(role), "", "", *(_cell(means.get(name)) for name in metrics))
    return rich


def _label(role: str) -> str:
    return "gap: unseen worse by" if role == "gap" else f"mean {role}"


def _fitting(table: ScoreTable, main: str, width: int) -> tuple[list[str], list[str]]:
    """Metrics that fit beside the names, the main one and its variants (``miou_all``) first, and those that do not.

    With more than `MOST_COLUMNS` metrics those that split another one up (``gauc_like`` beside ``gauc``) go first.
    """
    names = list(dict.fromkeys(score.metric for score in table.scores))
    whole = [name for name in names if not any(name.startswith(f"{other}_") for other in names)]
    columns = names if len(names) <= MOST_COLUMNS else whole
    wanted = sorted(columns, key=lambda name: (name != main, not name.startswith(f"{main}_")))
    summary = table.summary()
    texts: dict[str, list[str]] = {name: [name] for name in names}
    for score in table.scores:
        texts[score.metric].append(_cell(score.value))
    for means in summary.values():
        for name in names:
            texts[name].append(_cell(means.get(name)))
    labels = [*(score.domain for score in table.scores), *map(_label, summary)]
    roles, counts = [score.role for score in table.scores], [str(score.n) for score in table.scores]
    room = width - 1 - sum(_COLUMN + max(map(len, column)) for column in (labels, [*roles, "role"], [*counts, "n"]))
    shown: list[str] = []
    for name in wanted:
        need = _COLUMN + max(map(len, texts[name]))
        if need <= room or not shown:
            shown.append(name)
            room -= need
    return shown, [name for name in wanted if name not in shown]


def _cell(value: float | None) -> str:
    return "" if value is None else "-" if math.isnan(value) else f"{value:.4f}"
