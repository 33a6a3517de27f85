# SPDX-License-Identifier: Apache-2.0
"""Speed of multi-task ranking: ``python -m benchmarks.recommendation_speed [--quick] [--rows PATTERN]``.

Ratios of CPU time in one process on one thread: pairs in alternating order, median of nine (``--quick``: five). A step
is forward, loss, backward and AdamW, of the network of configs/home.yaml (features included) on batches of its size.
Writes benchmarks/results/recommendation_speed.json; fails when a gate is missed, and says what was tried for one of
HoME's. The last rows keep freed memory, as the training commands do; the others do not, as before that was so. About
five minutes on an idle core.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.limits import product_flops
from benchmarks.machines import with_elsewhere
from moeapps.allocator import keep_freed_memory
from moeapps.evidence.cells import describe_machine
from moeapps.files import write_json
from moeapps.moe.backends.table import capability
from moeapps.training.optim import OptimizerConfig
from moeapps.training.sparse import build_optimizer
from tasks.recommendation.data.batch import Interactions
from tasks.recommendation.data.multitask_log import MultitaskLog
from tasks.recommendation.metrics import gauc
from tasks.recommendation.model import Ranker, home
from tasks.recommendation.module import RankingTask, masked_losses
from tasks.recommendation.nets.embeddings import EmbeddingBackend, FeatureEncoder, PlainTable
from tasks.recommendation.rivals import mmoe

RESULTS = Path(__file__).parent / "results" / "recommendation_speed.json"
PAIRS, QUICK_PAIRS, STEPS = 9, 5, 12
BATCH = 512
FEATURE_RANK = 8
HOME, MMOE = home(width=64, feature_rank=FEATURE_RANK), mmoe(num_experts=23, width=64)
"""The banks of configs/home.yaml and configs/baselines/home_mmoe.yaml, of equal parameters."""


@dataclass(frozen=True)
class Row:
    """One line of the result: what is measured, and its gate.

    Args:
        name: what ``--rows`` is matched with.
        text: what is compared.
        gate: the bound; None for a row that explains another.
        at_least: whether the value must be at least the gate, else at most.
        measure: number of pairs -> values; their median counts.
    """

    name: str
    text: str
    gate: float | None
    at_least: bool
    measure: Callable[[int], list[float]]


def facts() -> dict[str, Any]:
    """Facts of the generated log."""
    return {**MultitaskLog().schema.facts(), "domains": {"seen": ["s"], "validation": [], "unseen": []}}


def make_batch(rows: int = BATCH, *, bag: int = 0, size: int = 0) -> Interactions:
    """Random rows with the columns of the generated log, or with a bag of ``bag`` ids out of ``size``."""
    known, g = facts(), torch.Generator().manual_seed(0)
    ids = [torch.randint(0, n, (rows,), generator=g) for n in known["fields"].values()]
    bags = {"items": (torch.randint(1, size, (rows, bag), generator=g), torch.ones(rows, bag))} if bag else {}
    return Interactions(
        dense=torch.randn(rows, known["dense_dim"], generator=g),
        ids=torch.stack(ids, 1),
        bags=bags,
        label=(torch.rand(rows, 6, generator=g) < 0.1).float(),
        mask=torch.ones(rows, 6, dtype=torch.bool),
        user=torch.randint(0, 600, (rows,), generator=g),
        row=torch.arange(rows),
    )


def stepper(
    module: nn.Module, answer: Callable[[], Tensor], batch: Interactions, config: OptimizerConfig | None = None
) -> Callable[[], None]:
    """A training step."""
    optimizer: Optimizer = build_optimizer(module, config or OptimizerConfig())
    ones = torch.ones(batch.label.shape[1])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        masked_losses(answer(), batch.label, batch.mask, ones).sum().backward()
        optimizer.step()

    return step


def ranking_step(bank: Any, batch: Interactions, config: OptimizerConfig | None = None) -> Callable[[], None]:
    """A training step of a ranking network."""
    task = RankingTask(net=partial(Ranker, bank=bank), facts=facts()).train()
    return stepper(task, lambda: task(batch), batch, config)


class Dense(nn.Module):
    """The dense network of equal FLOPs: one hidden layer for all tasks, on the same features."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.encoder = FeatureEncoder(facts())
        self.net = nn.Sequential(nn.Linear(self.encoder.out_dim, hidden), nn.ReLU(), nn.Linear(hidden, 6))

    def forward(self, batch: Interactions) -> Tensor:
        """Logits."""
        logits: Tensor = self.net(self.encoder(batch))
        return logits


def dense_twin(batch: Interactions) -> Dense:
    """The dense network whose FLOPs are those of MMoE."""
    task = RankingTask(net=partial(Ranker, bank=MMOE), facts=facts()).eval()
    wanted = product_flops(lambda: task(batch)) / len(batch)
    width = FeatureEncoder(facts()).out_dim
    return Dense(round(wanted / 2 / (width + 6)))


def cpu_s(function: Callable[[], object], times: int) -> float:
    """CPU seconds of some calls."""
    start = time.process_time()
    for _ in range(times):
        function()
    return time.process_time() - start


def paired(first: Callable[[], None], second: Callable[[], None], pairs: int, steps: int = STEPS) -> list[float]:
    """Ratios of CPU time, first over second, in alternating order."""
    for warm in (first, second):
        cpu_s(warm, 3)
    ratios = []
    for i in range(pairs):
        order = (first, second) if i % 2 == 0 else (second, first)
        spent = {id(function): cpu_s(function, steps) for function in order}
        ratios.append(spent[id(first)] / spent[id(second)])
    return ratios


def home_over_mmoe(pairs: int) -> list[float]:
    """HoME's step over that of MMoE of equal parameters."""
    batch = make_batch()
    return paired(ranking_step(HOME, batch), ranking_step(MMOE, batch), pairs)


def home_over_mmoe_at(rows: int, bank: Any = HOME, *, fused: bool = False) -> Callable[[int], list[float]]:
    """HoME's step over that of MMoE of equal parameters, on so many rows."""

    def measure(pairs: int) -> list[float]:
        batch = make_batch(rows)
        ours, other = (ranking_step(b, batch, OptimizerConfig(fused=fused or None)) for b in (bank, MMOE))
        return paired(ours, other, pairs, steps=max(1, STEPS * 512 // rows))

    return measure


def kept(measure: Callable[[int], list[float]]) -> Callable[[int], list[float]]:
    """The same, from here on with memory that is freed kept for the next step."""

    def measure_kept(pairs: int) -> list[float]:
        keep_freed_memory()
        return measure(pairs)

    return measure_kept


def over_limit(bank: Any, rows: int, *, step: bool = False) -> Callable[[int], list[float]]:
    """CPU time of scoring, or of a step, over its limit: its products at the speed of one large product.

    A step takes three times the products of scoring. Both times are taken by turns; the large product is 1024 cubed.
    """

    def measure(pairs: int) -> list[float]:
        batch = make_batch(rows)
        task = RankingTask(net=partial(Ranker, bank=bank), facts=facts()).train(step)
        share = (3 if step else 1) * product_flops(lambda: task(batch)) / (2 * 1024**3)
        a, b, out = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)

        def score() -> None:
            with torch.no_grad():
                task(batch)

        ours = stepper(task, lambda: task(batch), batch) if step else score
        times = max(4, STEPS * 512 // rows)
        cpu_s(ours, 3)
        ratios = []
        for _ in range(pairs):
            product = min(cpu_s(lambda: torch.mm(a, b, out=out), 1) for _ in range(6))
            ratios.append(cpu_s(ours, times) / times / (share * product))
        return ratios

    return measure


BY_OPERATIONS = {"feature_gates.needs_operations": lambda: True}
ONE_CHUNK = {"feature_views._CHUNK_ELEMENTS": 1 << 40}
"""Other ways to compute the feature gates: name below ``tasks.recommendation.nets`` -> what stands in its place."""


def instead(names: dict[str, Any], measure: Callable[[int], list[float]], pairs: int) -> float:
    """The median of a measure with other things under these names."""
    with ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(patch(f"tasks.recommendation.nets.{name}", value))
        return round(statistics.median(measure(pairs)), 4)


def elementwise_over_products(pairs: int, rows: int) -> float:
    """CPU time of HoME's hyperbolic tangents and Swish functions alone, over that of its products at full speed."""
    task = RankingTask(net=partial(Ranker, bank=HOME), facts=facts()).eval()
    share = product_flops(lambda: task(make_batch(rows))) / (2 * 1024**3)
    sizes = {name: p.numel() for name, p in task.named_parameters()}
    num_tanh = sum(n for name, n in sizes.items() if name.endswith("feature_gates.up")) // FEATURE_RANK
    num_swish = sum(n for name, n in sizes.items() if name.endswith("experts.beta"))
    tanh, swish = torch.randn(rows, num_tanh), torch.randn(rows, num_swish)
    a, b, out = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)

    def alone() -> None:
        torch.tanh(tanh, out=tanh)
        torch.ops.aten.silu.out(swish, out=swish)

    product = min(cpu_s(lambda: torch.mm(a, b, out=out), 1) for _ in range(6))
    return round(statistics.median(cpu_s(alone, 4) / 4 for _ in range(pairs)) / (share * product), 4)


def explain(name: str, pairs: int) -> dict[str, Any]:
    """Of a missed row of HoME's: what was tried, each measured now, and how far one could come."""
    kind, _, size = name.partition(" ")
    if kind not in ("home", "scoring"):
        return {}
    rows = int(size or BATCH)
    measure = home_over_mmoe_at(rows) if kind == "home" else over_limit(HOME, rows)
    tried = {
        "feature gates by ordinary operations": instead(BY_OPERATIONS, measure, pairs),
        "feature gates in one chunk": instead(ONE_CHUNK, measure, pairs),
    }
    if kind == "scoring":
        tried["blocks of 512 rows"] = instead({}, over_limit(HOME, 512), pairs)
        return {"tried": tried, "limit": {"its tanh and Swish alone": elementwise_over_products(pairs, rows)}}
    tried["AdamW fused in both"] = instead({}, home_over_mmoe_at(rows, fused=True), pairs)
    bare = {
        "without feature gates": home(width=64, feature_gates=0),
        "without feature gates and batch norm, ReLU": home(width=64, feature_gates=0, norm="none", activation="relu"),
    }
    limit = {what: instead({}, home_over_mmoe_at(rows, bank), pairs) for what, bank in bare.items()}
    batch, nets = make_batch(rows), [RankingTask(net=partial(Ranker, bank=b), facts=facts()) for b in (HOME, MMOE)]
    ours, other = (product_flops(partial(net.eval(), batch)) for net in nets)
    return {"tried": tried, "limit": {**limit, "products alone, by FLOPs": round(ours / other, 4)}}


def mmoe_throughput(pairs: int) -> list[float]:
    """Throughput of MMoE over that of the dense network of equal FLOPs: the dense step over MMoE's."""
    batch = make_batch()
    dense = dense_twin(batch).train()
    return paired(stepper(dense, lambda: dense(batch), batch), ranking_step(MMOE, batch), pairs)


def gauc_seconds(pairs: int) -> list[float]:
    """CPU seconds of GAUC over a million rows of 20,000 users."""
    g = torch.Generator().manual_seed(0)
    score, label = torch.randn(1_000_000, generator=g), (torch.rand(1_000_000, generator=g) < 0.1).float()
    user = torch.randint(0, 20_000, (1_000_000,), generator=g)
    return [cpu_s(lambda: gauc(score, label, user), 1) for _ in range(pairs)]


def sparse_over_dense(pairs: int) -> list[float]:
    """A step with sparse gradients over one with dense gradients: a table of 500,000 ids, 20 of them a row."""
    size, rows = 500_000, 2048
    batch = make_batch(rows, bag=20, size=size)
    known = {**facts(), "bags": {"items": size}}

    def tower(*, sparse: bool) -> Callable[[], None]:
        def table(sizes: list[int], dim: int) -> EmbeddingBackend:
            return PlainTable(sizes, dim, sparse=sparse)

        encoder = FeatureEncoder(known, dim=16, table=table)
        module = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(encoder.out_dim, 6)})
        return stepper(module, lambda: module["head"](module["encoder"](batch)), batch)

    return paired(tower(sparse=True), tower(sparse=False), pairs, steps=1)


SIZES = (256, 1024, 4096)
ROWS = (
    Row("home", "HoME's step / MMoE's of equal parameters", 2.0, False, home_over_mmoe),
    *(Row(f"home {n}", f"the same, {n} rows", 1.5, False, home_over_mmoe_at(n)) for n in SIZES),
    *(
        Row(f"scoring {n}", f"HoME's scoring / its products at full speed, {n} rows", 3.0, False, over_limit(HOME, n))
        for n in SIZES
    ),
    *(
        Row(f"{name} {n}", f"{text}, {n} rows", None, False, over_limit(bank, n, step=step))
        for n in SIZES
        for name, text, bank, step in (
            ("step limit", "HoME's step / its products at full speed", HOME, True),
            ("mmoe scoring", "MMoE's scoring / its products at full speed", MMOE, False),
            ("mmoe step limit", "MMoE's step / its products at full speed", MMOE, True),
        )
    ),
    Row("mmoe", "MMoE's throughput / that of a dense network of equal FLOPs", 0.5, True, mmoe_throughput),
    Row("gauc", "CPU seconds of GAUC, 1,000,000 rows of 20,000 users", 3.0, False, gauc_seconds),
    Row("sparse", "step with sparse / with dense gradients, 500,000 x 16 embeddings", 0.5, False, sparse_over_dense),
    *(
        Row(f"kept {n}", f"HoME's step / MMoE's, {n} rows, memory kept", None, False, kept(home_over_mmoe_at(n)))
        for n in (256, 512, 1024, 4096)
    ),
)


def main(words: list[str] | None = None) -> int:
    """Measure, print, write; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recommendation_speed", description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="alternated pairs per comparison (default 9)")
    parser.add_argument("--quick", action="store_true", help="five pairs instead of nine; writes nothing")
    parser.add_argument("--rows", default="*", metavar="PATTERN", help="measure only these rows; writes nothing")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    console, found = Console(highlight=False), []
    chosen = [row for row in ROWS if fnmatch.fnmatch(row.name, options.rows)]
    for row in track(chosen, description="measuring", console=console, transient=True):
        values = row.measure(QUICK_PAIRS if options.quick else options.pairs)
        value = statistics.median(values)
        ok = row.gate is None or (value >= row.gate if row.at_least else value <= row.gate)
        found.append(
            {
                **({} if ok or options.quick else explain(row.name, min(QUICK_PAIRS, options.pairs))),
                **{"name": row.name, "text": row.text, "value": round(value, 4), "gate": row.gate},
                **{"at_least": row.at_least, "ok": ok, "spread": [round(min(values), 4), round(max(values), 4)]},
                "pairs": len(values),
            }
        )
        bound = "" if row.gate is None else f" ({'at least' if row.at_least else 'at most'} {row.gate:g})"
        console.print(f"{row.name}: {value:.3g}{bound} {'ok' if ok else 'MISSED'}  {row.text}")
    if not options.quick and len(chosen) == len(ROWS):
        about = {"machine": describe_machine(), "cpu": capability(), "torch": torch.__version__, "threads": 1}
        write_json(RESULTS, with_elsewhere({**about, "batch": BATCH, "rows": found}, RESULTS))
    else:
        console.print(json.dumps(found))
    return 0 if all(row["ok"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
