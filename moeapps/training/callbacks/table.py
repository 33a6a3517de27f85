# SPDX-License-Identifier: Apache-2.0
"""The table at the end of a test: domains by metrics, role means, and where the files are."""

from __future__ import annotations

import lightning as L
from rich.console import Console
from rich.table import Table

from moeapps.training.evaluation import ScoreTable
from moeapps.training.run import run_dir

MOST_COLUMNS = 12


class EndTable(L.Callback):
    """Print the scores of every domain with its role, the means over roles, the gap, and the run folder."""

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table of the finished test."""
        folder = run_dir(trainer)
        if trainer.is_global_zero:
            table = getattr(pl_module, "results", None)
            if isinstance(table, ScoreTable):
                console = Console()
                console.print(score_table(table))
                if folder is not None:
                    for label, path in (
                        ("run folder", folder),
                        ("figures", folder / "figures"),
                        ("numbers", folder / "metrics"),
                    ):
                        if path.is_dir():
                            console.print(f"{label + ':':<12}{path}", soft_wrap=True, highlight=False)


def score_table(table: ScoreTable) -> Table:
    """Return a rich table: one row per domain, then one per role mean and the gap.

    With more than `MOST_COLUMNS` metrics those that split another one up (``gauc_like`` beside ``gauc``) are left to
    metrics/test.json.
    """
    metrics = list(dict.fromkeys(score.metric for score in table.scores))
    if len(metrics) > MOST_COLUMNS:
        metrics = [name for name in metrics if not any(name.startswith(f"{other}_") for other in metrics)]
    rich = Table(title="test")
    for name in ("domain", "role", "n"):
        rich.add_column(name, justify="right" if name == "n" else "left")
    for name in metrics:
        rich.add_column(name, justify="right")
    values = {(score.domain, score.metric): score.value for score in table.scores}
    for domain, role, n in dict.fromkeys((score.domain, score.role, score.n) for score in table.scores):
        cells = [values.get((domain, name)) for name in metrics]
        rich.add_row(domain, role, str(n), *(_cell(value) for value in cells))
    rich.add_section()
    for role, means in table.summary().items():
        rich.add_row(f"mean {role}" if role != "gap" else "gap", "", "", *(_cell(means.get(name)) for name in metrics))
    return rich


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
