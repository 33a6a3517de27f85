# SPDX-License-Identifier: Apache-2.0
"""Cost of a training step of Point-MoE: ``python -m benchmarks.point_moe_speed --json FILE [--pairs 9]``.

Three questions, each answered by CPU time on one thread, in pairs of alternating order where two things are compared:

* What does a step cost beside the dense twin of equal active FLOPs, and beside Point Transformer V3 itself?
* Which part of the step takes how long? Every part is run again alone, forward and backward, on the very inputs that
  a step gave it; what the parts do not explain is ``rest``.
* What would other ways to compute the largest part cost? They are written here and must give the shipped numbers.

Fails (exit status 1) when the step costs more than `GATE` times the dense twin's. About four minutes on one core.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch_geometric.data import Batch

from benchmarks.core import machine
from benchmarks.core_cases import paired_ratios
from benchmarks.steps import Work, alone, command, shares, show_step, step_over
from benchmarks.system_share import build as build_system
from tasks.point_cloud.module import PointCloudTask
from tasks.point_cloud.nets.attention import PatchAttention
from tasks.point_cloud.nets.sparse_conv import NeighbourTable, SubmanifoldConv3d, submanifold_conv

RIVALS = {"dense": "configs/baselines/point_moe_dense.yaml", "ptv3": "configs/baselines/point_moe_ptv3.yaml"}
GATE = 1.25
"""A step over a step of the dense twin; agreed beforehand."""

# --- steps ------------------------------------------------------------------------------------------------------------


def build(overlay: str | None = None, flags: list[str] | None = None) -> tuple[PointCloudTask, Batch]:
    """Return a freshly initialised task and the first training batch of its data."""
    task, batch = build_system("point_moe", [*(["--config", overlay] if overlay else []), *(flags or [])])
    assert isinstance(task, PointCloudTask)
    return task, batch


def train_step(task: PointCloudTask, batch: Batch) -> Work:
    """Forward with recording, loss, backward and AdamW."""
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        task.recorded_step(batch, "train").loss.backward()
        optimizer.step()

    return step


# --- parts ------------------------------------------------------------------------------------------------------------


def part_of(module: nn.Module, name: str) -> str | None:
    """Return the part of the step that a module is, or None."""
    if isinstance(module, SubmanifoldConv3d):
        return "convolutions"
    if isinstance(module, PatchAttention):
        return "attention"
    if name.endswith("attn.proj"):
        return "mixtures"
    return "MLPs" if isinstance(module, Mlp) else None


def captured_parts(task: PointCloudTask, batch: Batch) -> dict[str, list[Work]]:
    """Run one step and return, per part, work that repeats each of its calls alone, forward and backward."""
    found: dict[str, list[Work]] = {}
    handles = []
    for name, module in task.named_modules():
        part = part_of(module, name)
        if part is None:
            continue

        def remember(module: nn.Module, inputs: tuple[Any, ...], *, part: str = part) -> None:
            x, rest = inputs[0], inputs[1:]
            found.setdefault(part, []).append(alone(lambda x: module(x, *rest), x, module))

        def remember_attention(module: nn.Module, inputs: tuple[Any, ...], *, part: str = part) -> None:
            assert isinstance(module, PatchAttention)
            x, rest = inputs[0], inputs[1:]
            found.setdefault(part, []).append(alone(lambda x: heads_only(module, x, *rest), x, module))

        hook = remember_attention if part == "attention" else remember
        handles.append(module.register_forward_pre_hook(hook))
    task.recorded_step(batch, "train")
    for handle in handles:
        handle.remove()
    found["curves and tables"] = [lambda: geometry(task, batch)]
    found["head and loss"] = [head_and_loss(task, batch)]
    return found


def heads_only(attention: PatchAttention, x_ND: Tensor, *rest: Any) -> Tensor:
    """Attention without what merges the heads."""
    proj, attention.proj = attention.proj, nn.Identity()
    try:
        y_ND: Tensor = attention(x_ND, *rest[:2])
        return y_ND
    finally:
        attention.proj = proj


@torch.no_grad()
def geometry(task: PointCloudTask, batch: Batch) -> None:
    """Sort voxels along the curves, cut runs and find neighbours, for all resolutions."""
    levels, _ = task.net._levels(batch)
    for level, kernel in zip(levels, (5, 3, 3), strict=False):
        level.neighbours(kernel)
        level.neighbours(3)
        level.patches(task.net.orders[0], 128)


def head_and_loss(task: PointCloudTask, batch: Batch) -> Work:
    """Project, match with class names, cross-entropy and Lovász, forward and backward."""
    z_ND = task.net(batch).detach().requires_grad_()

    def work() -> None:
        with patch.object(task.net, "forward", lambda _: z_ND):
            task.shared_step(batch, "train").loss.backward()

    return work


# --- other ways to convolve -------------------------------------------------------------------------------------------


def conv_all_pairs(x_NC: Tensor, weight_TCO: Tensor, table: NeighbourTable) -> Tensor:
    """Gather the rows of all pairs at once, one matrix product per tap on slices, one scatter of everything."""
    taps = [(tap, out, source) for tap, (out, source) in table.taps.items() if len(out)]
    rows = x_NC.index_select(0, torch.cat([source for _, _, source in taps]))
    parts = rows.split([len(out) for _, out, _ in taps])
    products = torch.cat([part @ weight_TCO[tap] for part, (tap, _, _) in zip(parts, taps, strict=True)])
    y_NO = x_NC @ weight_TCO[len(weight_TCO) // 2]
    return y_NO.index_add(0, torch.cat([out for _, out, _ in taps]), products)


def conv_grouped(x_NC: Tensor, weight_TCO: Tensor, table: NeighbourTable) -> Tensor:
    """The same with ``torch.nn.functional.grouped_mm`` over the taps."""
    taps = [(tap, out, source) for tap, (out, source) in table.taps.items() if len(out)]
    rows = x_NC.index_select(0, torch.cat([source for _, _, source in taps]))
    ends = torch.tensor([len(out) for _, out, _ in taps], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    products = F.grouped_mm(rows, weight_TCO[torch.tensor([tap for tap, _, _ in taps])], offs=ends)
    y_NO = x_NC @ weight_TCO[len(weight_TCO) // 2]
    return y_NO.index_add(0, torch.cat([out for _, out, _ in taps]), products)


def conv_padded(x_NC: Tensor, weight_TCO: Tensor, table: NeighbourTable) -> Tensor:
    """Gather all taps of all voxels, absent neighbours as zeros, and multiply once ("im2col")."""
    (num_rows, dim), taps = x_NC.shape, len(weight_TCO)
    at_NT = torch.full((num_rows, taps), num_rows)
    at_NT[:, taps // 2] = torch.arange(num_rows)
    for tap, (out, source) in table.taps.items():
        at_NT[out, tap] = source
    padded = torch.cat([x_NC, x_NC.new_zeros(1, dim)])
    columns = padded.index_select(0, at_NT.flatten()).view(num_rows, taps * dim)
    return columns @ weight_TCO.flatten(0, 1)


OTHER_CONVS: dict[str, Callable[[Tensor, Tensor, NeighbourTable], Tensor]] = {
    "all pairs gathered at once, a product per tap": conv_all_pairs,
    "all pairs gathered at once, grouped_mm": conv_grouped,
    "all 27 taps gathered, one product": conv_padded,
}


def conv_tries(task: PointCloudTask, batch: Batch, *, pairs: int) -> dict[str, float]:
    """Return, for every other way, its time over that of the shipped convolution at the finest level's width."""
    level = task.net._levels(batch)[0][0]
    table = level.neighbours(3)
    torch.manual_seed(0)
    x_NC, weight = torch.randn(len(level.batch_N), 64, requires_grad=True), torch.randn(27, 64, 64, requires_grad=True)

    def work(convolve: Callable[[Tensor, Tensor, NeighbourTable], Tensor]) -> Work:
        def run() -> None:
            y = convolve(x_NC, weight, table)
            torch.autograd.grad(y, [x_NC, weight], torch.ones_like(y))

        return run

    shipped = work(submanifold_conv)
    return {
        name: round(statistics.median(paired_ratios(work(other), shipped, pairs=pairs)), 3)
        for name, other in OTHER_CONVS.items()
    }


# --- the command ------------------------------------------------------------------------------------------------------


def measure(*, pairs: int, flags: list[str] | None = None) -> dict[str, Any]:
    """Measure everything and return the report."""
    torch.set_num_threads(1)
    task, batch = build(flags=flags)
    ours = train_step(task, batch)
    rivals = {name: lambda file=file: train_step(build(file, flags)[0], batch) for name, file in RIVALS.items()}
    over = step_over(ours, rivals, gate=GATE, pairs=pairs)
    parts = shares(ours, lambda: captured_parts(task, batch), samples=max(3, pairs // 2))
    return {
        "command": "python -m benchmarks.point_moe_speed --json benchmarks/results/point_moe_speed.json",
        "machine": machine(),
        "voxels": int(batch.num_nodes),
        "step_over": over,
        "parts": parts,
        "largest": next(iter(parts)),
        "conv_tries": conv_tries(task, batch, pairs=pairs),
    }


def show(report: dict[str, Any]) -> None:
    """Print the report as two tables."""
    console = show_step(report, "Point-MoE")
    for name, ratio in report["conv_tries"].items():
        console.print(f"convolution, {name}: {ratio:.2f} x the shipped one")


def main(args: list[str] | None = None) -> int:
    """Measure, print, write; 1 when the gate is missed."""
    return command("point_moe_speed", __doc__, args, measure=measure, show=show)


if __name__ == "__main__":
    raise SystemExit(main())
