# SPDX-License-Identifier: Apache-2.0
"""Speed of the data side of recommendation: ``python -m benchmarks.recommendation_data [--json FILE] [--quick]``.

CPU time on one thread, median of several runs; pairs are taken in alternation. Rows with a gate make the command fail
when they miss it. About two minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from moeapps.files import write_json
from moeapps.training.optim import OptimizerConfig
from moeapps.training.run import machine, versions
from moeapps.training.sparse import build_optimizer
from tasks.recommendation.data.batch import Interactions
from tasks.recommendation.data.multitask_log import MultitaskLog
from tasks.recommendation.data.readers.blocks import write_table
from tasks.recommendation.data.readers.columns import DenseColumn, IdColumn, TableColumns, TaskColumn
from tasks.recommendation.data.readers.tables import TableDomain, TableFiles, TableSplit
from tasks.recommendation.datamodule import RecommendationData
from tasks.recommendation.metrics import gauc
from tasks.recommendation.nets.embeddings import FeatureEncoder, PlainTable


@dataclass
class Row:
    """One line of the result.

    Attributes:
        name: what was measured.
        value: CPU seconds, a ratio, or rows per CPU second.
        unit: of the value.
        gate: bound of the value (upper for seconds, lower for ratios and rates), or None.
    """

    name: str
    value: float
    unit: str
    gate: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the gate is met."""
        if self.gate is None:
            return True
        return self.value <= self.gate if self.unit == "s" else self.value >= self.gate


def cpu_seconds(work: Callable[[], object], runs: int) -> float:
    """Median CPU seconds of a call."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def gauc_rows(runs: int, rows: int = 1_000_000, users: int = 20_000) -> list[Row]:
    """GAUC of one task over a million rows, without and with many ties."""
    g = torch.Generator().manual_seed(0)
    score, label = torch.randn(rows, generator=g), (torch.rand(rows, generator=g) < 0.1).float()
    user = torch.randint(0, users, (rows,), generator=g)
    return [
        Row(
            f"GAUC, {rows:,} rows, {users:,} users, {name}",
            cpu_seconds(partial(gauc, s, label, user), runs),
            "s",
            3.0,
        )
        for name, s in (("no ties", score), ("many ties", score.mul(15).round()))
    ]


def sparse_rows(runs: int, table_rows: int = 2_000_000, dim: int = 16, batch: int = 4096, bag: int = 20) -> list[Row]:
    """A training step with a table of two million rows: sparse gradients and SparseAdam against dense AdamW."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, table_rows, (batch, bag), generator=g)
    empty = torch.zeros(batch, 0)
    rows = Interactions(
        empty, empty.long(), {"history": (ids, torch.ones(batch, bag))}, empty, empty.bool(), ids[:, 0], ids[:, 0]
    )
    steps = []
    for sparse in (True, False):
        facts = {"dense_dim": 0, "fields": {}, "bags": {"history": table_rows}}
        encoder = FeatureEncoder(facts, dim=dim, table=partial(PlainTable, sparse=sparse))
        steps.append(_step(torch.nn.Sequential(encoder, torch.nn.Linear(dim, 1)), rows))
    pairs = [(cpu_seconds(steps[0], 1), cpu_seconds(steps[1], 1)) for _ in range(runs + 1)][1:]  # the first allocates
    sparse_s, dense_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    name = f"training step, table {table_rows:,} x {dim}, {batch} bags of {bag}"
    return [
        Row(f"{name}: sparse", sparse_s, "s"),
        Row(f"{name}: dense", dense_s, "s"),
        Row(f"{name}: dense / sparse", statistics.median(d / s for s, d in pairs), "x", 2.0),
    ]


def _step(network: torch.nn.Module, rows: Interactions) -> Callable[[], None]:
    optimizer = build_optimizer(network, OptimizerConfig())

    def step() -> None:
        optimizer.zero_grad()
        network(rows).square().mean().backward()
        optimizer.step()

    return step


def log_rows(runs: int) -> list[Row]:
    """Building the default generated log, and one epoch of batches of 512 from memory."""
    with tempfile.TemporaryDirectory() as folder:

        def build(number: list[int] = [0]) -> RecommendationData:  # noqa: B006 - counts the builds
            number[0] += 1
            data = RecommendationData(source=MultitaskLog(data_seed=number[0]), cache_dir=Path(folder))
            data.prepare_data()
            return data

        seconds, data = cpu_seconds(build, max(1, runs // 2)), build()
        data.train_dataloader()
        epoch = cpu_seconds(lambda: sum(len(batch) for batch in data.train_dataloader()), runs)
    return [
        Row("build the default generated log (415,000 rows)", seconds, "s", 5.0),
        Row("rows loaded from memory in batches of 512", 59_904 / epoch, "rows/s", 50_000),
    ]


def table_rows(runs: int, rows: int = 60_000) -> list[Row]:
    """One epoch read block by block: 12 columns of a table on disk."""
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        name: rng.integers(0, 10**9, rows).tolist() for name in ("user", "item", "shop", "brand")
    }
    columns |= {f"x{k}": rng.random(rows).tolist() for k in range(6)}
    columns |= {"click": rng.integers(0, 2, rows).tolist(), "time": sorted(rng.integers(0, 10**9, rows).tolist())}
    spec = TableColumns(
        tasks=[TaskColumn("click", "watch", "click")],
        user="user",
        ids=[IdColumn(name, 1 << 20) for name in ("user", "item", "shop", "brand")],
        dense=[DenseColumn(f"x{k}") for k in range(6)],
        time="time",
    )
    found = []
    for ending in ("parquet", "csv"):
        with tempfile.TemporaryDirectory() as folder:
            write_table(Path(folder) / f"log.{ending}", columns)
            part = TableSplit([f"log.{ending}"])
            source = TableFiles(
                root=Path(folder), columns=spec, domains={"a": TableDomain(part, part, part)}, later_training_rows=True
            )
            data = RecommendationData(
                source=source, seen=["a"], validation=[], unseen=[], cache_dir=Path(folder) / "cache"
            )
            data.prepare_data()

            def epoch(data: RecommendationData = data, source: TableFiles = source) -> None:
                source.forget()
                data._datasets.clear()
                for _ in data.train_dataloader():
                    pass

            found.append(Row(f"rows read from {ending}, 12 columns", rows / cpu_seconds(epoch, runs), "rows/s"))
    return found


def main(args: list[str] | None = None) -> int:
    """Measure, print, and write the rows; return 1 where a gate is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recommendation_data", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    parser.add_argument("--quick", action="store_true", help="one run of each")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    runs = 1 if options.quick else 5
    rows = [row for part in (gauc_rows, sparse_rows, log_rows, table_rows) for row in part(runs)]
    table = Table("what", "value", "gate", "")
    for row in rows:
        gate = "" if row.gate is None else f"{row.gate:g}"
        table.add_row(row.name, f"{row.value:,.4g} {row.unit}", gate, "" if row.ok else "MISSED")
    Console().print(table)
    if options.json:
        write_json(
            options.json,
            {
                "command": "python -m benchmarks.recommendation_data",
                "machine": machine(),
                "versions": versions(),
                "rows": [{**asdict(row), "ok": row.ok} for row in rows],
            },
        )
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
