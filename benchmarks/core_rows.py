# SPDX-License-Identifier: Apache-2.0
"""The rows that the core benchmark must have: what is measured, against what, and the gate of each.

``all_rows`` is the list that a committed result is held to. Gates and stretch goals were set before anything was tuned.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch

from benchmarks.core_cases import (
    EXPERT_KINDS,
    FIELDS,
    NORMALISED,
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
from moeapps.moe.backends import Backend, choose_backend, run, sort_assignments
from moeapps.moe.experts import Experts
from moeapps.moe.objectives import switch_balance

MODES: tuple[Mode, Mode] = ("forward", "fwd+bwd")
BACKENDS: tuple[Backend, ...] = ("auto", "segments", "grouped_mm", "loop")
SAVED_GATES = {"segments": 0.6, "other": 1.45}
PEERS = ("mixtral-eager", "mixtral-grouped")
PEER_GATE = 1.03

Measure = Callable[[int, Backend], list[float]]
"""(pairs, backend) -> values; the median counts."""


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
SYSTEMS: list[tuple[str, str, Size]] = [
    ("Point-MoE, finest level", "reglu", Size(15000, 4, 2, 32, 32)),
    ("Point-MoE, deepest level", "reglu", Size(1500, 4, 2, 96, 96)),
    ("HoME, level 1", NORMALISED, Size(512, 9, 9, 128, 64)),
    ("HoME, all at once", NORMALISED, Size(4096, 9, 9, 128, 64)),
    ("MixER, a stage of a step", FIELDS, Size(1520, 4, 1, 2)),
    ("MixER, few rows", FIELDS, Size(80, 4, 1, 2)),
]
"""(name, experts, size) of what the systems of this repository run, from their default configs; not gated."""


@dataclass
class Row:
    """One line of the result.

    Attributes:
        ratio: What is compared with the gate; None where the row does not apply, for the reason in ``note``.
        unit: ``x dense`` unless the row compares something else.
        gated: Whether missing the gate fails the command.
        ok: Whether the gate is met; None without a gate.
        tried: For a gated row that misses: every way that was tried, with its ratio.
        reason: For such a row: what stands in the way.
    """

    regime: str
    size: Size
    mode: str
    backend: Backend
    expert: str
    gate: float | None
    measure: Measure | None
    stretch: float | None = None
    gated: bool = False
    dtype: str = "float32"
    threads: int = 1
    unit: str = "x dense"
    note: str = ""
    ratio: float | None = field(default=None, init=False)
    spread: tuple[float, float] | None = field(default=None, init=False)
    tried: list[dict[str, Any]] = field(default_factory=list, init=False)
    reason: str = field(default="", init=False)

    @property
    def name(self) -> str:
        """What ``--rows`` is matched with."""
        return "/".join((self.regime, self.mode, self.backend, self.expert, self.dtype, f"{self.threads}t"))

    @property
    def ok(self) -> bool | None:
        """Whether the gate is met; None for a row that has none or does not apply."""
        return None if self.ratio is None or self.gate is None else self.ratio <= self.gate

    def run(self, pairs: int) -> None:
        """Measure the row."""
        if self.measure is not None:
            self.take(self.measure(pairs, self.backend))

    def take(self, values: list[float]) -> None:
        """Note what was measured."""
        self.ratio = round(statistics.median(values), 4)
        self.spread = (round(min(values), 4), round(max(values), 4))

    def as_json(self) -> dict[str, Any]:
        """The row as plain values."""
        names = [f.name for f in fields(self) if f.name not in ("measure", "size")]
        plain = {name: getattr(self, name) for name in names}
        return {"name": self.name, **plain, **asdict(self.size), "ok": self.ok}


def all_rows() -> list[Row]:
    """Every row that a complete result has."""
    return [*regime_rows(), *system_rows(), *special_rows(), *peer_rows()]


def regime_rows(*, quick: bool = False) -> Iterator[Row]:
    """Every regime with every expert kind and backend: forward, forward + backward, bytes kept for backward."""
    for regime in REGIMES:
        for kind in ["silu-mlp"] if quick else EXPERT_KINDS:
            for backend in BACKENDS[:1] if quick else BACKENDS:
                for mode in MODES:
                    yield Row(
                        regime.name,
                        regime.size,
                        mode,
                        backend,
                        kind,
                        regime.gates[mode],
                        against_dense(regime.size, kind, mode),
                        stretch=regime.stretch if mode == "fwd+bwd" else None,
                        gated=backend == "auto",
                    )
                yield saved_row(regime, kind, backend)


def saved_row(regime: Regime, kind: str, backend: Backend) -> Row:
    """Bytes kept for backward over those of the dense roof; no clock involved."""
    size = regime.size
    gate = SAVED_GATES["segments" if _chosen(size, kind, backend) == "segments" else "other"]
    return Row(
        regime.name, size, "saved", backend, kind, gate, _stored(size, kind), gated=backend in ("auto", "segments")
    )


def _chosen(size: Size, kind: str, backend: Backend) -> str:
    """The backend that runs; decided on meta tensors, since building all banks of the list would take seconds."""
    if backend != "auto":
        return backend
    with torch.device("meta"):
        ffn = make_bank(size, kind).feed_forward()
    plan = sort_assignments(make_routing(size))
    return choose_backend(ffn, torch.empty(size.n, size.d), plan)


def against_dense(size: Size, kind: str, mode: Mode, dtype: torch.dtype = torch.float32, threads: int = 1) -> Measure:
    """Time of the bank under a routing over that of the dense roof."""

    def measure(pairs: int, backend: Backend) -> list[float]:
        torch.set_num_threads(threads)
        candidate = moe_step(size, kind, mode, backend, dtype=dtype)
        reference = dense_step(size, kind, mode, dtype=dtype)
        try:
            return paired_ratios(candidate, reference, pairs=pairs, threads=threads)
        finally:
            torch.set_num_threads(1)

    return measure


def system_rows() -> Iterator[Row]:
    """The layers of the systems at the sizes they run, against one dense network of the same active work."""
    for name, kind, size in SYSTEMS:
        for mode in MODES:
            yield Row(name, size, mode, "auto", kind, None, against_dense(size, kind, mode))


def special_rows() -> Iterator[Row]:
    """Scaling in E, skewed and padded routings, bfloat16, two threads, overheads."""
    few, many = Size(4096, 8, 2), Size(4096, 64, 2)
    both: Mode = "fwd+bwd"

    def compare(top: Callable[[Backend], Any], bottom: Callable[[Backend], Any]) -> Measure:
        return lambda pairs, backend: paired_ratios(top(backend), bottom(backend), pairs=pairs)

    def work(size: Size, spread: Literal["uniform", "zipf", "top_p"] = "uniform") -> Callable[[Backend], Any]:
        return lambda backend: moe_step(size, "silu-mlp", both, backend, spread=spread)

    def row(regime: str, size: Size, mode: str, gate: float, measure: Measure | None, **more: Any) -> Row:
        return Row(regime, size, mode, "auto", "silu-mlp", gate, measure, gated=True, **more)

    yield row("scaling E=64/E=8", many, both, 1.5, compare(work(many), work(few)), unit="x E=8")
    yield row("zipf(1)/uniform", many, both, 1.15, compare(work(many, "zipf"), work(many)), unit="x uniform")
    yield row("top-p/top-k, mean k 2", few, both, 1.15, compare(work(few, "top_p"), work(few)), unit="x top-k")
    for size, gate, stretch in ((few, 1.25, 1.10), (many, 1.60, 1.45)):
        native = torch.cpu._is_avx512_bf16_supported()
        measure = against_dense(size, "silu-mlp", both, torch.bfloat16) if native else None
        note = "" if native else "n/a: this CPU has no avx512_bf16, bfloat16 is emulated"
        yield row(f"bf16 E={size.e}", size, both, gate, measure, stretch=stretch, dtype="bfloat16", note=note)
    two, note = against_dense(many, "silu-mlp", both, threads=2), "wall time: idle machine only"
    yield row("2 threads", many, both, 1.6, two, stretch=1.45, threads=2, note=note)
    yield row("routing share", many, both, 0.10, _routing_share, unit="x layer")
    yield row("call at N=1", Size(1, 8, 2), "forward", 0.5, _single_call, unit="ms")


def peer_rows() -> Iterator[Row]:
    """Our whole layer over those of other projects, of equal work and dropless; measured in their own environment."""
    for regime in REGIMES:
        for mode in MODES:
            for peer in PEERS:
                name = f"{regime.name} / {peer}"
                yield Row(name, regime.size, mode, "auto", "swiglu", PEER_GATE, None, gated=True, unit="x peer")
    for peer, kind, size in (
        ("mixture-of-experts", "gelu-mlp", Size(1024, 8, 2)),
        ("mixture-of-experts small", "gelu-mlp", Size(256, 8, 2)),
        ("soft-moe-pytorch", "gelu-mlp-bias", Size(1024, 8, 2)),
        ("soft-moe-pytorch small", "gelu-mlp-bias", Size(256, 8, 2)),
    ):
        for mode in MODES:
            yield Row(peer, size, mode, "auto", kind, PEER_GATE, None, gated=True, unit="x peer")


def _stored(size: Size, kind: str) -> Measure:
    def measure(_: int, backend: Backend) -> list[float]:
        experts, routing = make_bank(size, kind), make_routing(size)
        once, wide = make_routing(Size(size.n, 1, 1)), make_bank(Size(size.n, 1, 1, size.d, size.k * size.hidden), kind)
        x_ND = torch.randn(size.n, size.d, requires_grad=True)
        plan, plan_once = sort_assignments(routing), sort_assignments(once)
        known = [x_ND, *experts.parameters(), *wide.parameters()]
        ours = saved_bytes(lambda: run(experts, x_ND, plan, backend=backend), known)
        dense = saved_bytes(lambda: run(wide, x_ND, plan_once), known)
        return [ours / dense]

    return measure


def _layer(size: Size) -> MoELayer:
    torch.manual_seed(0)
    experts: Experts = make_bank(size, "silu-mlp")
    return MoELayer(Router(LinearScore(size.d, size.e), TopK(size.k)), experts)


def _routing_share(pairs: int, _: Backend) -> list[float]:
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


def _single_call(pairs: int, backend: Backend) -> list[float]:
    """Milliseconds of one forward call of a layer on one row."""
    layer, x_ND = _layer(Size(1, 8, 2)), torch.randn(1, 256)
    layer.backend = backend
    with torch.no_grad():
        return [median_ms(lambda: layer(x_ND), samples=50) for _ in range(pairs)]
