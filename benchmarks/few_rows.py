# SPDX-License-Identifier: Apache-2.0
"""Layers of few rows: ``python -m benchmarks.few_rows [--before FOLDER] [--pairs N]``.

* A call of a layer on one row over that of a plain module of two linear layers of the active width; with ``--before``
  (a folder with another commit) by turns with the same there, each in a process of its own. What stands above the plain
  module, the calls of Python, may be at most half of what it was.
* Rows of `benchmarks.core` with narrower gates: 64 and 16 rows per expert, bfloat16 where the processor has it.
* ``auto`` over the best of the three backends at Point-MoE's two levels.

For a missed gate every other way is timed as well, with what the bare products cost. Pairs in alternating order, one
thread, CPU time, medians. Writes benchmarks/results/few_rows.json; three to five minutes on an idle core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from benchmarks.core_cases import Mode, Size, moe_step, paired_ratios

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "few_rows.json"
CALL_GATE, AUTO_GATE = 0.5, 1.05
GATES = {
    "R=64/*/auto/silu-mlp": 1.20,
    "R=64 small/*/auto/silu-mlp": 1.20,
    "R=16/*/auto/silu-mlp": 1.80,
    "bf16*": 1.20,
}
"""Name in the list of `benchmarks.core` -> gate."""


def call_over_plain(pairs: int, backend: Any = "auto") -> list[float]:
    """A call of a layer on one row over that of a plain module, both without gradients.

    It imports what every commit has, since ``--before`` runs it against another one.
    """
    from moeapps.moe import LinearScore, MLPExperts, MoELayer, Router, TopK

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = MoELayer(Router(LinearScore(256, 8), TopK(2)), MLPExperts(8, 256, 1024, activation="silu"), backend=backend)
    plain = nn.Sequential(nn.Linear(256, 2048, bias=False), nn.SiLU(), nn.Linear(2048, 256, bias=False))
    x_ND = torch.randn(1, 256)

    def many(module: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(40):
                module(x_ND)

    return paired_ratios(lambda: many(layer), lambda: many(plain), pairs=pairs)


def bare_over_plain(pairs: int) -> float:
    """The same calls of torch in one function, without a layer around them, over the plain module."""
    gate, w_in, w_out = torch.randn(8, 256), torch.randn(8, 256, 1024), torch.randn(8, 1024, 256)
    plain = nn.Sequential(nn.Linear(256, 2048, bias=False), nn.SiLU(), nn.Linear(2048, 256, bias=False))
    x_ND = torch.randn(1, 256)

    def bare() -> torch.Tensor:
        weight, chosen = (x_ND @ gate.t()).softmax(1).topk(2)
        shares = (weight / weight.sum(1, keepdim=True))[0]
        parts = [nn.functional.silu(x_ND @ w_in[e]) @ w_out[e] for e in chosen[0].tolist()]
        return shares[0] * parts[0] + shares[1] * parts[1]

    def many(call: Callable[[], object]) -> None:
        with torch.no_grad():
            for _ in range(40):
                call()

    return statistics.median(paired_ratios(lambda: many(bare), lambda: many(lambda: plain(x_ND)), pairs=pairs))


def call_elsewhere(tree: Path) -> float:
    """`call_over_plain` in a process of its own with the code of a tree; the median of five pairs."""
    variables = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--only-call"]
    done = subprocess.run(command, check=True, cwd=tree, env=variables, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def one_row(before: Path | None, pairs: int) -> dict[str, Any]:
    """The call on one row, and where there is a commit before it, how much of its Python is left."""
    if before is None:
        values = call_over_plain(pairs)
        return {"call_over_plain": round(statistics.median(values), 3)}
    ours: list[float] = []
    theirs: list[float] = []
    for pair in track(range(pairs), description="one row, by turns", transient=True):
        for tree in (ROOT, before) if pair % 2 else (before, ROOT):
            (ours if tree == ROOT else theirs).append(call_elsewhere(tree))
    left = [(o - 1) / (t - 1) for o, t in zip(ours, theirs, strict=True)]
    value = round(statistics.median(left), 3)
    over = statistics.median(theirs) - 1
    ways = () if value <= CALL_GATE else ("segments", "grouped_mm", "loop")
    return {
        "tried": {way: round((statistics.median(call_over_plain(pairs, way)) - 1) / over, 3) for way in ways},
        "limit": {"the same calls of torch in one function": round((bare_over_plain(pairs) - 1) / over, 3)},
        "call_over_plain": round(statistics.median(ours), 3),
        "before": round(statistics.median(theirs), 3),
        "python_left": value,
        "pairs": [round(v, 3) for v in left],
        "gate": CALL_GATE,
        "ok": value <= CALL_GATE,
    }


def core_rows(pairs: int) -> list[dict[str, Any]]:
    """The rows of the core benchmark that have few rows per expert, against narrower gates."""
    from fnmatch import fnmatchcase

    from benchmarks.core import explain
    from benchmarks.core_rows import all_rows

    found = []
    rows = [(row, gate) for row in all_rows() for name, gate in GATES.items() if fnmatchcase(row.name, f"{name}*")]
    for row, gate in track([r for r in rows if r[0].mode != "saved"], description="rows of the core", transient=True):
        row.gate = gate
        row.run(pairs)
        if row.ok is False:
            explain(row, pairs)
        found.append(row.as_json())
    return found


def auto_rows(pairs: int) -> list[dict[str, Any]]:
    """``auto`` over each backend at the levels of Point-MoE; the largest median counts."""
    from benchmarks.core_rows import BACKENDS

    found = []
    for name, size in (("finest", Size(15000, 4, 2, 32, 32)), ("deepest", Size(1500, 4, 2, 96, 96))):
        modes: tuple[Mode, Mode] = ("forward", "fwd+bwd")
        for mode in modes:
            auto = moe_step(size, "reglu", mode, "auto")
            over: dict[str, float] = {}
            for backend in BACKENDS[1:]:
                values = paired_ratios(auto, moe_step(size, "reglu", mode, backend), pairs=pairs)
                over[backend] = round(statistics.median(values), 3)
            value = max(over.values())
            row = {"name": f"Point-MoE, {name} level", "mode": mode, "auto_over": over, "ratio": value}
            gated = name == "finest" and mode == "fwd+bwd"
            found.append({**row, "gate": AUTO_GATE if gated else None, "ok": value <= AUTO_GATE if gated else None})
    return found


def main(args: list[str] | None = None) -> int:
    """Measure, print, write; 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_rows", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--before", type=Path, help="folder with the commit before")
    parser.add_argument("--pairs", type=int, default=9, help="alternated pairs per comparison (default 9)")
    parser.add_argument("--only-call", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    if options.only_call:
        print(statistics.median(call_over_plain(5)))
        return 0
    from benchmarks.core import machine
    from benchmarks.machines import known_here, with_elsewhere
    from benchmarks.timed import commit_of
    from moeapps.files import write_json

    before = options.before.resolve() if options.before else None
    report: dict[str, Any] = {
        "command": "python -m benchmarks.few_rows --before FOLDER" if before else "python -m benchmarks.few_rows",
        **({"before": commit_of(before)} if before else {}),
        "machine": machine(),
        "one_row": one_row(before, options.pairs),
        "rows": core_rows(options.pairs),
        "auto": auto_rows(options.pairs),
    }
    if before is None:
        report["one_row"] = {**known_here(report, RESULTS).get("one_row", {}), **report["one_row"]}
    write_json(RESULTS, with_elsewhere(report, RESULTS))
    console = Console(highlight=False)
    console.print("one row:", report["one_row"])
    rows = [*report["rows"], *report["auto"]]
    for row in rows:
        console.print(f"{row['name']} {row['mode']}: {row['ratio']} (gate {row['gate']}) {row['ok']}")
    return 0 if all(row.get("ok") is not False for row in (report["one_row"], *rows)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
