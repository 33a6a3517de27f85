# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.scale``: bytes that processes exchange beside those of the cost model, and docs/scale.md.

``measure`` starts 2 and 4 processes over gloo (under a minute), trains a step of a small network in each division and
adds up what its collectives are given; ``page`` computes the tables of docs/scale.md from that and from the cost model
for the published sizes. Without a word both are done. Fails where a count differs.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import sys
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from benchmarks.markdown import wrapped
from benchmarks.readme import ROOT
from benchmarks.scale_sizes import Size, sizes
from moeapps.bounds import read_json
from moeapps.evaluation.scale import Division, ProcessCost, cost_of, shape_of
from moeapps.files import write_json, write_text
from moeapps.moe import GLUExperts, JoinedExperts, LinearScore, MLPExperts, MoELayer, Router, TopK
from moeapps.moe.parallel import split_banks
from moeapps.moe.surgery import one_process_state
from moeapps.training.parallel import ModelParallel

RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
PAGE = ROOT / "docs" / "scale.md"
BLOCK = re.compile(r"(<!-- scale:begin -->\n).*?(<!-- scale:end -->)", re.DOTALL)
ROWS, WIDTH, TOP_K = 24, 16, 2
DIVISIONS = (
    *(Division(2, 1, False), Division(2, 1, True), Division(2, 2, False), Division(2, 2, True)),
    *(Division(4, 1, True), Division(4, 4, False), Division(4, 4, True), Division(4, 2, False), Division(4, 2, True)),
)
_KINDS = {
    "all_to_all_single": "all_to_all",
    "alltoall_base_": "all_to_all",
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


class SmallNet(nn.Module):
    """Layers with shared experts, in the bank of the routed ones or in their own, and one of few; what is not cut.

    Args:
        few: experts of the last layer: one for each of the processes that share them.
    """

    def __init__(self, few: int) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        bank = MLPExperts(9, WIDTH, 12)
        self.plain = MoELayer(Router(LinearScore(WIDTH, 8), TopK(TOP_K)), bank, num_shared=1)
        joined = JoinedExperts([GLUExperts(8, WIDTH, 10), GLUExperts(1, WIDTH, 6)])
        self.shared = MoELayer(Router(LinearScore(WIDTH, 8), TopK(TOP_K)), joined, num_shared=1)
        self.few = MoELayer(Router(LinearScore(WIDTH, few), TopK(TOP_K)), MLPExperts(few, WIDTH, 8))
        self.odd = nn.Parameter(torch.ones(1, 3))
        self.scale = nn.Parameter(torch.ones(()))
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, 3]."""
        y_ND = self.few(self.plain(self.first(x_ND)))
        out: Tensor = self.last(self.norm(self.scale * self.shared(y_ND)))
        return out * self.odd

    training_step = validation_step = test_step = predict_step = forward


class Exchanged(TorchDispatchMode):
    """Adds up the bytes of every collective of two processes or more that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _KINDS.get(func._schema.name.partition("::")[2])
        if kind is not None and func.namespace in ("c10d", "_c10d_functional") and _size(args) > 1:
            held = args[0] if isinstance(args[0], list) else [args[0]]  # the output of a gather, else the input
            source = [args[1]] if kind == "reduce_scatter" else held
            self.bytes[kind] += sum(tensor.numel() * tensor.element_size() for tensor in source)
        return func(*args, **(kwargs or {}))


def _size(args: Any) -> int:
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                return int(ProcessGroup.unbox(value).size())
            except (RuntimeError, TypeError):
                continue
    return 2  # functional collectives name their group; ours are called in groups of several only


class _Placed(ModelParallel):
    """The strategy on a mesh that is there already."""

    def __init__(self, division: Division) -> None:
        super().__init__(experts=division.experts, rest="sharded" if division.sharded else "replicated")
        shape, names = (division.copies, division.experts), ("data_parallel", "tensor_parallel")
        self.mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)

    @property
    @override
    def device_mesh(self) -> DeviceMesh:
        return self.mesh

    @property
    @override
    def root_device(self) -> torch.device:
        return torch.device("cpu")


def exchanged(division: Division) -> dict[str, int]:
    """Return the bytes of a step by kind, in a process group that is there already."""
    torch.manual_seed(0)
    net = SmallNet(_few(division))
    strategy = _Placed(division)
    strategy.spread(net)
    torch.manual_seed(distributed.get_rank())
    x_ND = torch.randn(ROWS, WIDTH)
    with Exchanged() as seen:
        loss = net.training_step(x_ND).square().mean()
        loss.backward()
        strategy.post_backward(loss)
    apart = _apart(net, x_ND)
    if not apart < 1e-5:
        raise RuntimeError(f"{division}: gradients are {apart} from those of one process")
    return dict(seen.bytes)


def _apart(net: SmallNet, x_ND: Tensor) -> float:
    """The largest difference of a gradient to that of one process with the rows of all, over the largest gradient."""
    rows: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(rows, x_ND)
    torch.manual_seed(0)
    whole = SmallNet(net.few.num_experts)
    whole(torch.cat(rows)).square().mean().backward()
    grads: dict[str, Any] = {name: cast(Tensor, parameter.grad) for name, parameter in net.named_parameters()}
    full = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    found = one_process_state(full, split_banks(net))
    wanted = {name: cast(Tensor, parameter.grad) for name, parameter in whole.named_parameters()}
    if found.keys() != wanted.keys():
        raise RuntimeError(f"{sorted(found)} is not {sorted(wanted)}")
    top = max(float(grad.abs().max()) for grad in wanted.values())
    return max(float((found[name] - grad).abs().max()) for name, grad in wanted.items()) / top


def _few(division: Division) -> int:
    return max(2, division.experts)


def predicted(division: Division) -> ProcessCost:
    """Return what the model says of the same step."""
    with torch.device("meta"):
        net = SmallNet(_few(division))
    return cost_of(shape_of(net, lambda name, layer: ROWS * TOP_K), division)


def _process(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=120)
    place = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=world, timeout=wait)
    found = [exchanged(division) for division in DIVISIONS if division.processes == world]
    write_json(folder / f"{rank}.json", found)
    distributed.barrier()
    distributed.destroy_process_group()


def measure(worlds: tuple[int, ...] = (2, 4)) -> list[dict[str, Any]]:
    """Start processes and return, per division, what each exchanged and what the model says."""
    fork = multiprocessing.get_context("fork")
    rows = []
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            processes = [fork.Process(target=_process, args=(rank, world, Path(folder))) for rank in range(world)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(300)
            told = [read_json(Path(folder) / f"{rank}.json") for rank in range(world)]
        for i, division in enumerate(part for part in DIVISIONS if part.processes == world):
            model = {kind: count for kind, count in predicted(division).calls.items() if count}
            rows.append({**vars(division), "measured": [found[i] for found in told], "model": model})
    return rows


def agrees(row: dict[str, Any]) -> bool:
    """Whether each kind's mean over processes is what the model says, to the byte.

    What comes back for experts depends on where rows went, so that processes differ; all of them together do not.
    """
    kinds = {kind for found in row["measured"] for kind in found} | set(row["model"])
    total = {kind: sum(found.get(kind, 0) for found in row["measured"]) for kind in kinds}
    return all(total[kind] == row["processes"] * row["model"].get(kind, 0) for kind in kinds)


# Page -----------------------------------------------------------------------------------------------------------------


def division_of(size: Size, devices: int) -> Division:
    """Experts over the 8 devices of a machine, or as many as divide 8 and leave none without; the rest cut over all."""
    share = max(n for n in (1, 2, 4, 8) if all(_fits(layer.experts, n) for layer in size.shape.layers))
    return Division(devices, share, sharded=devices > 8)


def _fits(experts: int, processes: int) -> bool:
    return math.ceil(experts / processes) * (processes - 1) < experts


def tables(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown of both tables."""
    lines = [
        "| processes | experts over | rest | all_to_all | all_gather | reduce_scatter | all_reduce | model |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kinds = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
    for row in rows:
        means = [sum(found.get(kind, 0) for found in row["measured"]) / row["processes"] for kind in kinds]
        cells = [f"{mean:,.0f}" for mean in means]
        rest = "sharded" if row["sharded"] else "replicated"
        lines.append(
            f"| {row['processes']} | {row['experts']} | {rest} | {' | '.join(cells)} | "
            f"{'equal to the byte' if agrees(row) else 'DIFFERS'} |"
        )
    lines += [
        "",
        "| size | parameters | step of one | devices | experts over | sent for experts (MB) | sent for the rest (MB) "
        "| weights, gradients, AdamW (GB) | fetched (GB) | TFLOP |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in sizes():
        for devices in (8, 64, 1024):
            division = division_of(size, devices)
            cost = cost_of(size.shape, division, number_bytes=2)
            others = sum(cost.sent.values()) - cost.sent["all_to_all"]
            lines.append(
                f"| {size.name} | {size.shape.parameters / 1e6:,.0f}M | {size.step} | {devices} | {division.experts} | "
                f"{cost.sent['all_to_all'] / 1e6:,.0f} | {others / 1e6:,.0f} | {cost.held / 1e9:.2f} | "
                f"{cost.fetched / 1e9:.2f} | {cost.flops / 1e12:.1f} |"
            )
    return "\n".join(lines) + "\n"


def write_page(rows: list[dict[str, Any]]) -> None:
    """Put the tables into docs/scale.md."""
    text = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, wrapped(BLOCK.sub(lambda found: f"{found[1]}\n{tables(rows)}\n{found[2]}", text)))


def main(words: list[str]) -> int:
    """Measure, write the page, or both."""
    if not set(words) <= {"measure", "page"}:
        print("usage: python -m benchmarks.scale [measure] [page]", file=sys.stderr)
        return 2
    if not words or "measure" in words:
        write_json(RESULTS, {"rows": measure()})
    rows = read_json(RESULTS)["rows"]
    if not words or "page" in words:
        write_page(rows)
    wrong = [row for row in rows if not agrees(row)]
    for row in wrong:
        print(f"the model differs: {row}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
