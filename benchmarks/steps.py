# SPDX-License-Identifier: Apache-2.0
"""What benchmarks of a training step share: a step over its rivals', its parts alone, tables, and the command line."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from benchmarks.core_cases import median_ms, paired_ratios
from benchmarks.limits import check_parts
from benchmarks.machines import with_elsewhere
from moeapps.allocator import keep_freed_memory
from moeapps.files import write_json

Work = Callable[[], object]
Report = dict[str, Any]


def alone(call: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Work:
    """Forward and backward of one call on a copy of its input, which gets a gradient only where the step gives one."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    x = x.detach().clone().requires_grad_(x.requires_grad)
    wanted = [x, *parameters] if x.requires_grad else parameters

    def work() -> None:
        y = call(x)
        torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)

    return work


def step_over(ours: Work, rivals: Mapping[str, Callable[[], Work]], *, gate: float, pairs: int) -> Report:
    """Return, for every rival, our CPU time over its own; the dense twin has the gate.

    Args:
        ours: our step.
        rivals: name -> what makes the step of a rival, called when its turn comes.
        gate: most that a step may cost beside that of ``dense``.
        pairs: alternated pairs.
    """
    rows: Report = {}
    with Progress(transient=True) as progress:
        for name, make in progress.track(rivals.items(), description="steps"):
            rows[name] = ratio_of(paired_ratios(ours, make(), pairs=pairs))
    rows["dense"] |= {"gate": gate, "ok": rows["dense"]["ratio"] <= gate}
    return rows


def ratio_of(pairs: list[float]) -> Report:
    """The median of pairs, beside them."""
    return {"ratio": round(statistics.median(pairs), 3), "pairs": [round(value, 3) for value in pairs]}


def shares(step: Work, parts_of: Callable[[], Mapping[str, list[Work]]], *, samples: int) -> Report:
    """Return milliseconds and share of the step of every part, the dearest first; ``rest`` is what they leave.

    The rest is below 0 where the clock says so: parts are apart by `check_parts`, which needs no clock.

    Args:
        step: the whole step.
        parts_of: gives the calls of each part; called after the step was timed, whose optimizer changes the network.
        samples: times that each is run.

    Raises:
        ValueError: parts that together multiply more than the step.
    """
    whole, found = median_ms(step, samples=samples), parts_of()
    check_parts(step, found)
    cost = {part: sum(median_ms(work, samples=samples) for work in calls) for part, calls in found.items()}
    cost["rest"] = whole - sum(cost.values())
    ordered = sorted(cost.items(), key=lambda entry: -entry[1])
    return {part: {"ms": round(ms, 1), "share": round(ms / whole, 3)} for part, ms in ordered}


def show_step(report: Report, system: str) -> Console:
    """Print both tables and return what printed them."""
    console = Console(highlight=False)
    table = Table(f"a step of {system} over one of", "ratio", "gate")
    for name, row in report["step_over"].items():
        table.add_row(name, f"{row['ratio']:.2f}", f"{row['gate']:.2f}" if "gate" in row else "")
    console.print(table)
    table = Table("part of the step", "CPU ms", "share")
    for name, row in report["parts"].items():
        table.add_row(name, f"{row['ms']:.0f}", f"{row['share']:.0%}")
    console.print(table)
    return console


def command(
    name: str,
    doc: str | None,
    args: list[str] | None,
    *,
    measure: Callable[..., Report],
    show: Callable[[Report], None],
    ok: Callable[[Report], bool] = lambda report: bool(report["step_over"]["dense"]["ok"]),
) -> int:
    """Measure, print, write; 1 when a gate is missed. Freed memory is kept, as the training commands keep it.

    Args:
        name: of the module below ``benchmarks``.
        doc: what ``--help`` says, up to the first empty line.
        args: words of the command line; None means those of the process.
        measure: takes ``pairs`` and gives the report.
        show: prints it.
        ok: whether it meets its gates; by default that of a step beside the dense twin's.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument("--pairs", type=int, default=9, help="alternated pairs per comparison (default 9)")
    options = parser.parse_args(args)
    keep_freed_memory()
    report = measure(pairs=options.pairs)
    show(report)
    if options.json:
        write_json(options.json, with_elsewhere(report, options.json))
    return 0 if ok(report) else 1
