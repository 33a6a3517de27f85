# SPDX-License-Identifier: Apache-2.0
"""Share of the MoE layers in a training step of every system: ``python -m benchmarks.system_share [--before REF]``.

A step is forward with recording, loss, backward and AdamW on the first training batch of the default config. The calls
of its MoE layers (routers included where the layer routes) are run again alone, forward and backward, on the inputs
that the step gave them; share is their CPU time over that of the step: one thread, median of nine pairs in alternating
order. With ``--before`` the step of another commit is timed too, by turns with that of this tree, each in a process of
its own. Writes benchmarks/results/system_share.json; fails when a step costs more than 1.03 times what it did before.
About two minutes on an idle core, fifteen with ``--before``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.core_cases import median_ms, paired_ratios
from moeapps.commands.run import Cli, import_tasks, quiet
from moeapps.files import write_json
from moeapps.moe import MoELayer
from moeapps.training.task import BaseTask

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "system_share.json"
GATE = 1.03
"""A step over that of the commit before; what the noise of the clock allows."""

Work = Callable[[], object]


def systems() -> list[str]:
    """Every system that has a config and a golden first loss."""
    return sorted(path.stem for path in (ROOT / "tests" / "golden").glob("*.json"))


def build(system: str, flags: list[str] | None = None) -> tuple[BaseTask, Any]:
    """Return a freshly initialised task and the first training batch of its data.

    It stays in this file, which ``--before`` runs against the code of commits that know no newer module.

    Args:
        system: name of a base config.
        flags: further flags of ``moeapps fit``.
    """
    words = ["--config", f"configs/{system}.yaml", "--trainer.callbacks", "null", *(flags or [])]
    quiet()
    import_tasks(words)
    built = Cli(words, run=False)
    built.datamodule.prepare_data()
    built.datamodule.setup("fit")
    task = built.model
    assert isinstance(task, BaseTask)
    return task.train(), next(iter(built.datamodule.train_dataloader()))


def loss_of(task: BaseTask, batch: Any) -> Tensor:
    """The loss of a training step, recorded."""
    own = getattr(task, "training_loss", None)  # MixER scores one solver step in training and roll-outs in evaluation
    loss: Tensor = task.recorded_step(batch, "train").loss if own is None else own(batch, rollout=False)
    return loss


def train_step(task: BaseTask, batch: Any) -> Work:
    """Forward with recording, loss, backward and AdamW."""
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(task, batch).backward()
        optimizer.step()

    return step


def fixed(value: Any) -> Any:
    """A call's argument, cut off from the graph of the step; what had a gradient there gets one again."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(fixed(member) for member in value)
    if is_dataclass(value) and not isinstance(value, type):  # a routing that was made outside of the layer
        members = {field.name: fixed(getattr(value, field.name)) for field in fields(value) if field.init}
        return replace(value, **members)
    return value


def moe_calls(task: BaseTask, batch: Any) -> list[Work]:
    """Run one step and return work that repeats each call of a MoE layer alone, forward and backward."""
    found: list[Work] = []

    def remember(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args, kwargs = fixed(args), {name: fixed(value) for name, value in kwargs.items()}
        leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
        wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
        learning = torch.is_grad_enabled()  # Meta-DMoE asks frozen experts

        def work() -> None:
            with torch.set_grad_enabled(learning):
                y = module(*args, **kwargs)
            if not learning:
                return
            y = y if isinstance(y, Tensor) else y[0]
            torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)

        found.append(work)

    layers = [module for module in task.modules() if isinstance(module, MoELayer)]
    handles = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in layers]
    banks = [layer.experts for layer in layers if hasattr(layer.experts, "bind")]
    for bank in banks:
        remember_solves(bank, found)
    loss_of(task, batch)
    for handle in handles:
        handle.remove()
    for bank in banks:
        del bank.bind  # the method of the class is back
    return found


def remember_solves(bank: Any, found: list[Work]) -> None:
    """Have a bank that is bound once per solve (MixER's) add the work of each: binding, and all evaluations."""
    bind = bank.bind

    def remember(*args: Tensor) -> Callable[[Tensor], Tensor]:
        again, states, bound = fixed(args), [], bind(*args)
        wanted = [t for t in (*again, *bank.parameters()) if t.requires_grad]

        def evaluate(x: Tensor) -> Tensor:
            states.append(fixed(x))
            y: Tensor = bound(x)
            return y

        def work() -> None:
            network = bind(*again)
            y = torch.cat([network(x).flatten() for x in states])
            learned = [*(x for x in states if x.requires_grad), *wanted]  # the first state is data
            torch.autograd.grad(y, learned, torch.ones_like(y), allow_unused=True)

        found.append(work)
        return evaluate

    bank.bind = remember


def share(system: str, pairs: int, flags: list[str] | None = None) -> dict[str, Any]:
    """Milliseconds of a step, how often it calls MoE layers, and their share of it."""
    torch.manual_seed(0)
    task, batch = build(system, flags)
    step, calls = train_step(task, batch), moe_calls(task, batch)
    if not calls:
        raise ValueError(f"no MoE layer was called in a step of {system}: there is no share to measure.")

    def alone() -> None:
        for work in calls:
            work()

    values = paired_ratios(alone, step, pairs=pairs)
    return {
        "step_ms": round(median_ms(step, samples=max(3, pairs // 2)), 2),
        "moe_calls": len(calls),
        "moe_share": round(statistics.median(values), 4),
        "spread": [round(min(values), 4), round(max(values), 4)],
    }


def over_before(system: str, ref: str, pairs: int) -> dict[str, Any]:
    """The step of this tree over that of another commit: processes in alternating order, the median of their pairs.

    Where it is over the gate, two more series are run and the median of the three counts: processes of the same code
    differ by more than pairs do.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), ref], check=True)
        try:
            if not (tree / "configs" / f"{system}.yaml").exists():
                return {"before": ref, "over_before": None, "note": f"not there at {ref}"}
            series = [ratio_to(tree, system, pairs)]
            if series[0] > GATE:
                series += [ratio_to(tree, system, pairs) for _ in range(2)]
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
    ratio = statistics.median(series)
    return {"before": ref, "over_before": ratio, "series": series, "gate": GATE, "ok": ratio <= GATE}


def ratio_to(tree: Path, system: str, pairs: int) -> float:
    """The median of so many pairs of processes, this tree's step over that of another."""
    ratios = []
    for pair in range(pairs):
        trees = (ROOT, tree) if pair % 2 else (tree, ROOT)
        ms = {place: step_elsewhere(system, place) for place in trees}
        ratios.append(ms[ROOT] / ms[tree])
    return round(statistics.median(ratios), 4)


def step_elsewhere(system: str, tree: Path) -> float:
    """Median milliseconds of a step in a process of its own, with the code of a tree."""
    variables = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--only-step", system]
    done = subprocess.run(command, check=True, cwd=tree, env=variables, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print the report as a table."""
    table = Table("system", "CPU ms per step", "calls of MoE layers", "their share", "over the step before")
    for system, row in rows.items():
        before = row.get("note", "") if row.get("over_before") is None else f"{row['over_before']:.3f}"
        table.add_row(system, f"{row['step_ms']:.1f}", str(row["moe_calls"]), f"{row['moe_share']:.0%}", before)
    Console(highlight=False).print(table)


def main(args: list[str] | None = None) -> int:
    """Measure, print, write; 1 when a step has become slower."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.system_share", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where to write the report")
    parser.add_argument("--pairs", type=int, default=9, help="alternated pairs per comparison (default 9)")
    parser.add_argument("--before", metavar="REF", help="commit whose step is timed too")
    parser.add_argument("--only", nargs="+", choices=systems(), help="measure these, keep what is known of the others")
    parser.add_argument("--only-step", metavar="SYSTEM", help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    if options.only_step:
        print(median_ms(train_step(*build(options.only_step)), samples=9))
        return 0
    from benchmarks.core import machine
    from benchmarks.machines import known_here, with_elsewhere  # not there at every commit that this is run against

    command = "python -m benchmarks.system_share" + (f" --before {options.before}" if options.before else "")
    report: dict[str, Any] = {"command": command, "machine": machine(), "threads": 1}
    rows = report["systems"] = known_here(report, options.json).get("systems", {}) if options.only else {}
    for system in track(options.only or systems(), description="systems", transient=True):
        rows[system] = share(system, options.pairs)
        if options.before:
            rows[system] |= over_before(system, options.before, options.pairs)
        write_json(options.json, with_elsewhere(report, options.json))
    show(rows)
    return 0 if all(row.get("ok", True) for row in rows.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
