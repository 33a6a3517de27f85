# SPDX-License-Identifier: Apache-2.0
"""``moeapps xeval --leave-one-out CONFIG``: a training per domain and seed, tested on the domain that it never saw."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from moeapps.evidence.folds import Setting


def leave_one_out(options: argparse.Namespace, words: str, console: Console) -> int:
    """Run the folds that are missing and print their table; give the exit status."""
    from moeapps.commands.evidence import run_grid
    from moeapps.evidence.evidence import Evidence, Place
    from moeapps.evidence.folds import as_dict, fold_cells, fold_grid, fold_rows
    from moeapps.reporting.matrix import markdown_table
    from moeapps.reporting.screen import bracketed, fitted

    configs = [str(path) for path in options.leave_one_out]
    setting = setting_of(configs, options.metric)
    file = fold_grid(setting, configs, [str(path) for path in options.baseline], options.seeds, words)
    status = run_grid(file, options, console=console)
    if options.list or status == 130:
        return status
    evidence = Evidence(file.grid, Place.of(file, Path.cwd()), console=console)
    done = evidence.read()
    planned = file.grid.cells()
    missing = sum(cell not in done for cell in planned)
    if missing:
        console.print(f"{missing} of {len(planned)} cells are not run yet; the table comes with the last one")
        return status
    rows = fold_rows(setting, file.grid, done, evidence.stale())
    head, lines = fold_cells(setting, rows, bracketed)
    better = "larger" if setting.direction == "max" else "smaller"
    title = f"{setting.metric} on the domain left out ({better} is better), 95 % over {len(options.seeds)} seeds"
    for part in fitted(lambda form: fold_cells(setting, rows, form)[1], head, title, console.width):
        console.print(part)
    if options.out is not None:
        from moeapps.files import write_json, write_text
        from moeapps.reporting.matrix_files import latex_interval, latex_table

        numbers, page, table = (options.out / f"leave_one_out.{ending}" for ending in ("json", "md", "tex"))
        write_json(numbers, as_dict(setting, rows))
        write_text(page, f"# {title}\n\n{markdown_table(head, lines)}\n")
        maths = fold_cells(setting, rows, latex_interval)[1]
        maths = [[name, *(f"${cell}$" for cell in cells)] for name, *cells in maths]
        write_text(table, latex_table(title, head, maths))
        console.print(f"written: {numbers}, {page}, {table}", soft_wrap=True, markup=False)
    return status


def setting_of(configs: list[str], metric: str | None) -> Setting:
    """Build what the configs name, and ask it for its domains and its score.

    Raises:
        ValueError: the configs cannot be built, or have no such metric.
    """
    from moeapps.commands.listing import located
    from moeapps.commands.names import check
    from moeapps.commands.run import Cli, import_tasks, quiet
    from moeapps.evidence.folds import Setting
    from moeapps.evidence.recount import apart
    from moeapps.training.scores import larger_is_better

    words = ["fit", *(word for config in configs for word in ("--config", config))]
    check(words)
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)  # nothing is trained here
    with apart(Path.cwd()):
        quiet()
        located_words = located(words)
        import_tasks(located_words)
        cli = Cli(located_words[1:], run=False)
    data, task = cli.datamodule, cli.model
    chosen = metric or task.main_metric
    collection = task.configure_metrics(data.roles["seen"][0])
    known = ["loss", *collection, *(name for m in collection.values() for name in getattr(m, "larger_is_better", {}))]
    if chosen not in known:
        raise ValueError(f"{configs[0]} has no metric {chosen!r}; it has {', '.join(dict.fromkeys(known))}")
    small = chosen == "loss" or larger_is_better(collection, chosen) is False
    system = str(cli._get(cli.config, "system"))
    return Setting(system, tuple(data.roles["seen"]), chosen, "min" if small else "max")
