# SPDX-License-Identifier: Apache-2.0
"""Speed of reading logs: ``python -m benchmarks.recommendation_tables [--quick]``.

Rows per CPU second of `TableFiles` over those of a plain pyarrow loop in the same process, on one thread: pairs in
alternating order, median of nine (``--quick``: three). The plain loop makes the same tensors of the same blocks and
columns, but hashes no id (text ids become their codes), checks nothing and knows no domains; "decoding alone" makes no
tensors either. Writes benchmarks/results/recommendation_tables.json; fails when a gate is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet
import torch
from rich.console import Console
from rich.table import Table

from moeapps.evidence.cells import describe_machine
from moeapps.files import write_json
from tasks.recommendation.data.readers.columns import DenseColumn, IdColumn, TableColumns, TaskColumn
from tasks.recommendation.data.readers.tables import TableDomain, TableFiles, TableSplit

RESULTS = Path(__file__).parent / "results" / "recommendation_tables.json"
PAIRS, QUICK_PAIRS, ROWS, BLOCK = 9, 3, 400_000, 16_384
IDS, DENSE = ("user", "item", "shop", "brand"), tuple(f"x{k}" for k in range(6))
GATE = 0.7

Loop = Callable[[], None]


def make_log(*, words: bool) -> pa.Table:
    """A log of 12 columns: four ids (one of them text, if asked), six numbers, a label, the time."""
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {name: rng.integers(0, 10**9, ROWS) for name in IDS}
    if words:
        columns["item"] = [f"B{number:09d}" for number in rng.zipf(1.3, ROWS) % 10**6]
    columns |= {name: rng.random(ROWS) for name in DENSE}
    return pa.table(columns | {"click": rng.integers(0, 2, ROWS), "time": np.sort(rng.integers(0, 10**9, ROWS))})


def plain_batches(path: Path) -> Iterator[pa.Table | pa.RecordBatch]:
    """The blocks as pyarrow gives them."""
    names = [*IDS, *DENSE, "click"]
    if path.suffix == ".csv":
        read = arrow_csv.ReadOptions(use_threads=False)
        yield from arrow_csv.open_csv(path, read, convert_options=arrow_csv.ConvertOptions(include_columns=names))
        return
    with parquet.ParquetFile(path) as file:
        for block in range(file.num_row_groups):
            yield file.read_row_group(block, columns=names, use_threads=False)


def plain_tensors(path: Path) -> None:
    """The tensors of each block, as one would write it without a library."""
    first = 0
    for batch in plain_batches(path):
        columns = {}
        for name in batch.schema.names:
            column = batch.column(name)
            if pa.types.is_string(column.type):
                encoded = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
                column = encoded.dictionary_encode().indices
            columns[name] = column.to_numpy()
        torch.from_numpy(np.stack([columns[name] for name in IDS], 1).astype(np.int64, copy=False))
        torch.from_numpy(np.stack([columns[name] for name in DENSE], 1).astype(np.float32))
        torch.from_numpy(columns["click"][:, None].astype(np.float32))
        torch.from_numpy(~np.isnan(columns["click"].astype(np.float64))[:, None])
        torch.from_numpy(columns["user"].copy())
        torch.arange(first, first + len(batch))
        first += len(batch)


def decoding_alone(path: Path) -> None:
    """No tensors."""
    for _ in plain_batches(path):
        pass


def opened(path: Path, cache: Path) -> tuple[TableFiles, list[Any]]:
    """Our reader of the file, and its blocks: converted, counted and checked."""
    columns = TableColumns(
        tasks=[TaskColumn("click", "watch", "click")],
        user="user",
        ids=[IdColumn(name, 1 << 20) for name in IDS],
        dense=[DenseColumn(name) for name in DENSE],
        time="time",
    )
    domain = TableDomain(test=TableSplit([path.name]))
    source = TableFiles(root=path.parent, columns=columns, domains={"log": domain}, csv_rows=BLOCK)
    source.bind({"seen": [], "validation": [], "unseen": ["log"]})
    return source, source.blocks("log", "test", cache)


def our_loop(source: TableFiles, blocks: list[Any]) -> None:
    """One epoch in the order of the file."""
    for block in blocks:
        source.read("log", "test", block)


def cpu_seconds(work: Loop) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def paired(name: str, plain: Loop, ours: Loop, pairs: int, gate: float | None) -> dict[str, Any]:
    """One row: our rows per second over the plain loop's, in pairs of alternating order after one warm-up each."""
    plain()
    ours()
    seconds = []
    for k in range(pairs):
        if k % 2:
            ours_s, plain_s = cpu_seconds(ours), cpu_seconds(plain)
        else:
            plain_s, ours_s = cpu_seconds(plain), cpu_seconds(ours)
        seconds.append((plain_s, ours_s))
    ratios = sorted(plain_s / ours_s for plain_s, ours_s in seconds)
    value = statistics.median(ratios)
    return {
        "name": name,
        "ratio": round(value, 3),
        "lowest": round(ratios[0], 3),
        "highest": round(ratios[-1], 3),
        "plain_rows_per_s": round(ROWS / statistics.median(plain_s for plain_s, _ in seconds)),
        "our_rows_per_s": round(ROWS / statistics.median(ours_s for _, ours_s in seconds)),
        "gate": gate,
        "ok": gate is None or value >= gate,
    }


def measure(folder: Path, pairs: int) -> list[dict[str, Any]]:
    """All rows."""
    rows = []
    for words in (False, True):
        ids, table = "one id of text" if words else "ids are integers", make_log(words=words)
        parquet.write_table(table, folder / f"{words}.parquet", row_group_size=BLOCK)
        arrow_csv.write_csv(table, folder / f"{words}.csv")
        for ending in ("parquet", "csv"):
            path = folder / f"{words}.{ending}"
            source, blocks = opened(path, folder / "cache")

            def ours(source: TableFiles = source, blocks: list[Any] = blocks) -> None:
                our_loop(source, blocks)

            def first(path: Path = path) -> None:
                with tempfile.TemporaryDirectory() as cache:
                    our_loop(*opened(path, Path(cache)))

            def plain(path: Path = path) -> None:
                plain_tensors(path)

            def decode(path: Path = path) -> None:
                decoding_alone(path)

            name = f"{ending}, {ids}"
            rows.append(paired(f"{name}: an epoch / plain loop to tensors", plain, ours, pairs, GATE))
            rows.append(paired(f"{name}: an epoch / decoding alone", decode, ours, pairs, None))
            rows.append(paired(f"{name}: first use (convert, check, read) / plain loop", plain, first, pairs, None))
    return rows


def main(args: list[str] | None = None) -> int:
    """Measure, print and write; return 1 where a gate is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recommendation_tables", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few pairs, nothing is written")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), QUICK_PAIRS if options.quick else PAIRS)
    table = Table("what", "ratio", "lowest", "highest", "gate")
    for row in rows:
        gate = "" if row["gate"] is None else f">= {row['gate']}{'' if row['ok'] else ' MISSED'}"
        table.add_row(row["name"], *(f"{row[key]:.2f}" for key in ("ratio", "lowest", "highest")), gate)
    Console().print(table)
    if not options.quick:
        about = {"command": "python -m benchmarks.recommendation_tables", "machine": describe_machine()}
        write_json(RESULTS, {**about, "pyarrow": pa.__version__, "rows_of_the_log": ROWS, "rows": rows})
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
