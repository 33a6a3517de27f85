# SPDX-License-Identifier: Apache-2.0
"""Speed of the core against the dense roof: ``python -m benchmarks.core --json FILE [--rows PATTERN] [--quick]``.

Each row is the time of an expert layer under a given routing (sorting included) divided by the time of one dense
network of the same active FLOPs in the same process: median of at least five pairs in alternating order, one thread,
CPU time.
Rows marked ``gated`` make the command fail when they miss their gate; ``stretch`` is the goal beyond it; the others are
printed for comparison. About five minutes on one CPU core; ``--quick`` about one.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.core_cases import (
    EXPERT_KINDS,
    Mode,
    Size,
    dense_step,
    make_bank,
    make_routing,
    median_ms,
    moe_step,
    paired_ratios,
    saved_bytes,
    step,
)
from moeapps.moe import LinearScore, MoELayer, MoERecorder, Router, TopK
from moeapps.moe.backends import Backend, run, sort_assignments
from moeapps.moe.losses import switch_balance

PAIRS, QUICK_PAIRS = 9, 5
MODES: tuple[Mode, Mode] = ("forward", "fwd+bwd")


@dataclass(frozen=True)
class Regime:
    """A size with the gate of each mode and the stretch goal of fwd+bwd."""

    name: str
    size: Size
    gates: dict[Mode, float]
    stretch: float


REGIMES = [
    Regime("R=1024", Size(4096, 8, 2), {"forward": 1.15, "fwd+bwd": 1.15}, 1.00),
    Regime("R=128", Size(4096, 64, 2), {"forward": 1.25, "fwd+bwd": 1.40}, 1.20),
    Regime("R=64", Size(4096, 64, 1), {"forward": 1.40, "fwd+bwd": 1.70}, 1.45),
    Regime("R=64 small", Size(256, 8, 2), {"forward": 1.50, "fwd+bwd": 1.60}, 1.35),
    Regime("R=16", Size(64, 8, 2), {"forward": 2.40, "fwd+bwd": 2.60}, 2.00),
]
GATED_FROM = 128  # rows per expert


@dataclass
class Row:
    """One line of the result.

    Attributes:
        ratio: What is compared with the gate; None where the row does not apply, for the reason in ``note``.
        unit: ``x dense`` unless the row compares something else.
        gated: Whether missing the gate fails the command.
        ok: Whether the gate is met.
    """

    regime: str
    size: Size
    mode: str
    backend: str
    expert: str
    gate: float
    measure: Callable[[int], list[float]] | None
    stretch: float | None = None
    gated: bool = False
    dtype: str = "float32"
    threads: int = 1
    unit: str = "x dense"
    note: str = ""
    ratio: float | None = field(default=None, init=False)
    spread: tuple[float, float] | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        """What ``--rows`` is matched with."""
        return "/".join((self.regime, self.mode, self.backend, self.expert, self.dtype, f"{self.threads}t"))

    @property
    def ok(self) -> bool | None:
        """Whether the gate is met; None for a row that does not apply."""
        return None if self.ratio is None else self.ratio <= self.gate

    def run(self, pairs: int) -> None:
        """Measure the row."""
        if self.measure is None:
            return
        values = self.measure(pairs)
        self.ratio = round(statistics.median(values), 4)
        self.spread = (round(min(values), 4), round(max(values), 4))

    def as_json(self) -> dict[str, Any]:
        """The row as plain values."""
        plain = {k: v for k, v in vars(self).items() if k not in ("measure", "size")}
        return {**plain, **asdict(self.size), "ok": self.ok}


def regime_rows(quick: bool) -> Iterator[Row]:
    """Every regime with ``auto`` and all expert kinds; all backends for the first kind."""
    for regime in REGIMES:
        size, gated = regime.size, regime.size.rows_per_expert >= GATED_FROM
        kinds = ["silu-mlp"] if quick or not gated else list(EXPERT_KINDS)
        backends: list[Backend] = ["auto"] if quick else ["auto", "segments", "grouped_mm", "loop"]
        for mode in MODES:
            cases = [(kind, "auto") for kind in kinds] + [("silu-mlp", b) for b in backends[1:]]
            for kind, backend in cases:
                yield Row(
                    regime.name,
                    size,
                    mode,
                    backend,
                    kind,
                    regime.gates[mode],
                    _against_dense(size, kind, mode, backend),
                    stretch=regime.stretch if mode == "fwd+bwd" else None,
                    gated=gated and backend == "auto",
                )


def _against_dense(
    size: Size, kind: str, mode: Mode, backend: str, dtype: torch.dtype = torch.float32, threads: int = 1
) -> Callable[[int], list[float]]:
    def measure(pairs: int) -> list[float]:
        torch.set_num_threads(threads)
        candidate = moe_step(size, kind, mode, backend, dtype=dtype)  # type: ignore[arg-type]
        reference = dense_step(size, kind, mode, dtype=dtype)
        try:
            return paired_ratios(candidate, reference, pairs=pairs, threads=threads)
        finally:
            torch.set_num_threads(1)

    return measure


def special_rows() -> Iterator[Row]:
    """Scaling in E, skewed and padded routings, bfloat16, two threads, stored bytes, overheads."""
    few, many = Size(4096, 8, 2), Size(4096, 64, 2)

    def compare(top: Callable[[], Any], bottom: Callable[[], Any]) -> Callable[[int], list[float]]:
        return lambda pairs: paired_ratios(top(), bottom(), pairs=pairs)

    both: Mode = "fwd+bwd"
    scaling = compare(lambda: moe_step(many, "silu-mlp", both, "auto"), lambda: moe_step(few, "silu-mlp", both, "auto"))
    yield Row("scaling E=64/E=8", many, both, "auto", "silu-mlp", 1.5, scaling, gated=True, unit="x E=8")
    yield Row("saved bytes", few, both, "segments", "silu-mlp", 0.6, _stored, gated=True)
    zipf = compare(
        lambda: moe_step(many, "silu-mlp", both, "auto", spread="zipf"),
        lambda: moe_step(many, "silu-mlp", both, "auto"),
    )
    yield Row("zipf(1)/uniform", many, both, "auto", "silu-mlp", 1.15, zipf, unit="x uniform")
    top_p = compare(
        lambda: moe_step(few, "silu-mlp", both, "auto", spread="top_p"),
        lambda: moe_step(few, "silu-mlp", both, "auto"),
    )
    yield Row("top-p/top-k, mean k 2", few, both, "auto", "silu-mlp", 1.15, top_p, unit="x top-k")
    for size, gate, stretch in ((few, 1.25, 1.10), (many, 1.60, 1.45)):
        native = torch.cpu._is_avx512_bf16_supported()
        measure = _against_dense(size, "silu-mlp", both, "auto", torch.bfloat16) if native else None
        note = "" if native else "n/a: this CPU has no avx512_bf16, bfloat16 is emulated"
        regime = f"bf16 E={size.e}"
        yield Row(regime, size, both, "auto", "silu-mlp", gate, measure, stretch=stretch, dtype="bfloat16", note=note)
    two = _against_dense(many, "silu-mlp", both, "auto", threads=2)
    note = "wall time: idle machine only"
    yield Row("2 threads", many, both, "auto", "silu-mlp", 1.6, two, stretch=1.45, threads=2, note=note)
    yield Row("routing share", many, both, "auto", "silu-mlp", 0.10, _routing_share, unit="x layer")
    yield Row("call at N=1", Size(1, 8, 2), "forward", "auto", "silu-mlp", 0.5, _single_call, unit="ms")


def _stored(_: int) -> list[float]:
    """Bytes kept for backward by ``segments`` over those of the dense roof; no clock involved."""
    size = Size(4096, 8, 2)
    experts, routing = make_bank(size, "silu-mlp"), make_routing(size)
    once, twin = make_routing(Size(4096, 1, 1)), make_bank(Size(4096, 1, 1, 256), "silu-mlp")
    wide = type(twin)(1, size.d, size.k * 4 * size.d, activation="silu", bias=False)  # type: ignore[call-arg]
    x_ND = torch.randn(size.n, size.d, requires_grad=True)
    plan, plan_once = sort_assignments(routing), sort_assignments(once)
    known = [x_ND, *experts.parameters(), *wide.parameters()]
    ours = saved_bytes(lambda: run(experts, x_ND, plan, backend="segments"), known)
    dense = saved_bytes(lambda: run(wide, x_ND, plan_once), known)
    return [ours / dense]


def _layer(size: Size) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(Router(LinearScore(size.d, size.e), TopK(size.k)), make_bank(size, "silu-mlp"))


def _routing_share(pairs: int) -> list[float]:
    """Gate, top-k, record, balance loss and sort, over the whole layer with the same loss."""
    size = Size(4096, 64, 2)
    layer = _layer(size)
    x_ND = torch.randn(size.n, size.d, requires_grad=True)
    parameters = [x_ND, *layer.parameters()]
    gate = [x_ND, *layer.router.parameters()]

    def whole() -> torch.Tensor:
        with MoERecorder(layer) as recorder:
            y: torch.Tensor = layer(x_ND).sum()
        return y + switch_balance(recorder.records[0])

    def routing() -> torch.Tensor:
        with MoERecorder(layer) as recorder:
            made = layer.route(x_ND)
        plan = sort_assignments(made)  # type: ignore[arg-type]
        return plan.weight_M.sum() + switch_balance(recorder.records[0])

    return paired_ratios(step(routing, gate, "fwd+bwd"), step(whole, parameters, "fwd+bwd"), pairs=pairs)


def _single_call(pairs: int) -> list[float]:
    """Milliseconds of one forward call of a layer on one row."""
    layer, x_ND = _layer(Size(1, 8, 2)), torch.randn(1, 256)
    with torch.no_grad():
        return [median_ms(lambda: layer(x_ND), samples=50) for _ in range(pairs)]


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": platform.processor() or platform.machine(),
        "huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(rows: list[Row]) -> None:
    """Print the rows as a table."""
    table = Table("regime", "mode", "backend", "experts", "ratio", "min-max", "gate", "stretch", "result")
    words = {None: "n/a", True: "ok", False: "missed"}
    for row in rows:
        result = words[row.ok] if row.gated or row.ok is not False else "missed (not gated)"
        spread = "" if row.spread is None else f"{row.spread[0]:.2f}-{row.spread[1]:.2f}"
        ratio = row.note if row.ratio is None else f"{row.ratio:.2f} {row.unit}"
        stretch = "" if row.stretch is None else f"{row.stretch:.2f}"
        table.add_row(row.regime, row.mode, row.backend, row.expert, ratio, spread, f"{row.gate:.2f}", stretch, result)
    Console(width=max(120, Console().width)).print(table)


def main(args: list[str] | None = None) -> int:
    """Measure, print, write the JSON file; 1 when a gated row misses its gate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--rows", default="*", help="only rows whose name matches, e.g. '*R=128*auto*'")
    parser.add_argument("--quick", action="store_true", help="one expert kind, auto only, fewest pairs")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    rows = [*regime_rows(options.quick), *special_rows()]
    rows = [row for row in rows if fnmatch.fnmatchcase(row.name, f"*{options.rows.strip('*')}*")]
    if not rows:
        parser.error(f"no row matches {options.rows!r}")
    with Progress(transient=True) as progress:
        for row in progress.track(rows, description="core"):
            row.run(QUICK_PAIRS if options.quick else PAIRS)
    show(rows)
    missed = [row for row in rows if row.gated and row.ok is False]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"command": "python -m benchmarks.core", "quick": options.quick, "machine": machine()}
        text = json.dumps({**result, "rows": [row.as_json() for row in rows]}, indent=1)
        options.json.write_text(text + "\n")
    for row in missed:
        print(f"gate missed: {row.name}: {row.ratio} > {row.gate}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
