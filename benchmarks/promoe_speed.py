# SPDX-License-Identifier: Apache-2.0
"""Cost of a training step of ProMoE: ``python -m benchmarks.promoe_speed --json FILE [--pairs 9]``.

Four questions, each answered by CPU time on one thread, in pairs of alternating order where two things are compared:

* What does a step cost beside the dense twin of equal active FLOPs (one expert that is always on), and beside a plain
  diffusion transformer, which has timm's Mlp there?
* Which part of the step takes how long? Every part is run again alone, forward and backward, on the very inputs that a
  step gave it; what the parts do not explain is ``rest``.
* Does a step get cheaper in bfloat16 (autocast, as ``trainer.precision: bf16-mixed`` does)?
* What does a mixture spend on routing, on the experts' products, and on bringing tokens to experts and back?

Fails (exit status 1) when the step costs more than `GATE` times the dense twin's. About two minutes on one idle core.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from benchmarks.core import machine
from benchmarks.core_cases import median_ms, paired_ratios
from benchmarks.steps import Work, alone, command, ratio_of, shares, show_step, step_over
from benchmarks.system_share import build as build_system
from benchmarks.system_share import fixed
from moeapps.data.images.batch import ImageBatch
from moeapps.moe import MLPExperts, MoELayer
from moeapps.training.sparse import build_optimizer
from tasks.image_diffusion.module import ImageDiffusionTask
from tasks.image_diffusion.nets.blocks import Block

DENSE = ["--config", "configs/baselines/promoe_dense.yaml"]
RIVALS = ("dense", "dit")
GATE = 1.15
"""A step over a step of the dense twin; agreed beforehand."""

# --- steps ------------------------------------------------------------------------------------------------------------


def build(words: list[str] | None = None, flags: list[str] | None = None) -> tuple[ImageDiffusionTask, ImageBatch]:
    """Return a freshly initialised task and the first training batch of its data."""
    task, batch = build_system("promoe", [*(words or []), *(flags or [])])
    assert isinstance(task, ImageDiffusionTask)
    return task, batch


def build_rival(name: str, flags: list[str] | None = None) -> ImageDiffusionTask:
    """Return the dense twin, or for ``dit`` the same with timm's Mlp in the place of its one expert."""
    task = build(DENSE, flags)[0]
    if name == "dit":
        for block in task.net.blocks:
            if isinstance(block, Block) and isinstance(block.mlp, MoELayer):
                bank = block.mlp.experts
                assert isinstance(bank, MLPExperts)
                block.mlp = Mlp(bank.in_dim, bank.hidden_dim, act_layer=partial(nn.GELU, approximate="tanh"))
    return task


def train_step(task: ImageDiffusionTask, batch: ImageBatch, *, bf16: bool = False) -> Work:
    """Forward with recording, losses on the routing, backward, clipping and AdamW."""
    optimizer = build_optimizer(task, task.optimizer_config)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = task.recorded_step(batch, "train").loss
            for aux in task.aux_losses:
                loss = loss + aux(task.last_records)
        loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()

    return step


# --- parts ------------------------------------------------------------------------------------------------------------


def part_of(module: nn.Module, name: str) -> str | None:
    """Return the part of the step that a module is, or None."""
    if isinstance(module, Attention):
        return "attention"
    if isinstance(module, MoELayer):
        return "mixtures"
    if isinstance(module, Mlp):
        return "MLPs"
    if name.endswith("modulation"):
        return "modulations"
    return "patches and last layer" if name.endswith((".patches", ".last.linear")) else None


def captured_parts(task: ImageDiffusionTask, batch: ImageBatch) -> dict[str, list[Work]]:
    """Run one step and return, per part, work that repeats each of its calls alone, forward and backward."""
    found: dict[str, list[Work]] = {}
    handles = []
    for name, module in task.named_modules():
        part = part_of(module, name)
        if part is None:
            continue

        def remember(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], *, part: str = part) -> None:
            found.setdefault(part, []).append(alone(lambda x: module(x, **options), args[0], module))

        handles.append(module.register_forward_pre_hook(remember, with_kwargs=True))
    task.recorded_step(batch, "train")
    for handle in handles:
        handle.remove()
    if len(task.aux_losses):
        found["losses on the routing"] = [routing_losses(task)]
    found["optimizer"] = [optimizer_step(task)]
    return found


def routing_losses(task: ImageDiffusionTask) -> Work:
    """All auxiliary losses on the records of a step, forward and backward as far as what the routers gave.

    The records are cut off from the step: between the features of two layers lie a block and its backward.
    """
    records = fixed(task.last_records)
    given = [getattr(record.routing, name) for record in records for name in ("features_ND", "logits_NE", "probs_NE")]
    learned = [p for record in records for p in record.layer.router.parameters()]
    wanted = [t for t in (*given, *learned) if t is not None and t.requires_grad]

    def work() -> None:
        total = torch.stack([aux(records) for aux in task.aux_losses]).sum()
        torch.autograd.grad(total, wanted, allow_unused=True)

    return work


def optimizer_step(task: ImageDiffusionTask) -> Work:
    """Clipping and AdamW on a copy of the parameters."""
    copies = [nn.Parameter(p.detach().clone()) for p in task.parameters()]
    optimizer = torch.optim.AdamW(copies, fused=task.optimizer_config.fused)
    for copy in copies:
        copy.grad = torch.randn_like(copy)

    def work() -> None:
        nn.utils.clip_grad_norm_(copies, 1.0)
        optimizer.step()

    return work


def mixture_parts(task: ImageDiffusionTask, batch: ImageBatch, *, samples: int) -> dict[str, float]:
    """Return CPU milliseconds of the mixtures of a step: routing, products of the experts, transport (the rest)."""
    parts = captured_parts(task, batch)
    whole = sum(median_ms(work, samples=samples) for work in parts["mixtures"])
    route, products = ([make(*call) for call in mixture_calls(task, batch)] for make in (routing_alone, products_alone))
    route_ms, products_ms = (sum(median_ms(work, samples=samples) for work in works) for works in (route, products))
    return {
        "routing": round(route_ms, 1),
        "products of experts": round(products_ms, 1),
        "transport": round(whole - route_ms - products_ms, 1),
    }


def mixture_calls(task: ImageDiffusionTask, batch: ImageBatch) -> list[tuple[MoELayer, Tensor, Any]]:
    """Run one step and return layer, input and groups of each call of a mixture."""
    calls: list[tuple[MoELayer, Tensor, Any]] = []
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, options: calls.append((module, args[0].detach(), options["group"])), with_kwargs=True
        )
        for module in task.modules()
        if isinstance(module, MoELayer)
    ]
    task.recorded_step(batch, "train")
    for handle in handles:
        handle.remove()
    return calls


def routing_alone(layer: MoELayer, x: Tensor, group: Tensor) -> Work:
    """Routing of one call, forward and backward."""
    x = x.clone().requires_grad_()
    parameters = list(layer.router.parameters())

    def work() -> None:
        weight = layer.route(x, group=group).weight_M  # type: ignore[union-attr]
        torch.autograd.grad(weight.sum(), [x, *parameters], allow_unused=True)

    return work


def products_alone(layer: MoELayer, x: Tensor, group: Tensor) -> Work:
    """The experts' products on rows that are sorted already, forward and backward."""
    routing = layer.route(x, group=group)
    counts = [*routing.counts().tolist(), *[x.flatten(0, -2).shape[0]] * layer.num_shared]
    rows = torch.randn(sum(counts), x.shape[-1], requires_grad=True)
    parameters = list(layer.experts.parameters())

    def work() -> None:
        y = layer.experts.grouped(rows, counts)
        torch.autograd.grad(y, [rows, *parameters], torch.ones_like(y))

    return work


# --- the command ------------------------------------------------------------------------------------------------------


def measure(*, pairs: int, flags: list[str] | None = None) -> dict[str, Any]:
    """Measure everything and return the report."""
    torch.set_num_threads(1)
    task, batch = build(flags=flags)
    ours = train_step(task, batch)
    rivals = {name: lambda name=name: train_step(build_rival(name, flags), batch) for name in RIVALS}
    over = step_over(ours, rivals, gate=GATE, pairs=pairs)
    half = paired_ratios(train_step(task, batch, bf16=True), ours, pairs=pairs)
    samples = max(3, pairs // 2)
    parts = shares(ours, lambda: captured_parts(task, batch), samples=samples)
    return {
        "command": "python -m benchmarks.promoe_speed --json benchmarks/results/promoe_speed.json",
        "machine": machine(),
        "images": len(batch.label),
        "tokens": len(batch.label) * task.net.num_tokens,
        "step_over": over,
        "bf16_over_float32": ratio_of(half),
        "parts": parts,
        "largest": next(iter(parts)),
        "mixtures_ms": mixture_parts(task, batch, samples=samples),
    }


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    console = show_step(report, "ProMoE")
    console.print(f"a step in bfloat16 over one in float32: {report['bf16_over_float32']['ratio']:.2f}")
    for name, ms in report["mixtures_ms"].items():
        console.print(f"mixtures, {name}: {ms:.0f} ms")


def main(args: list[str] | None = None) -> int:
    """Measure, print, write; 1 when the gate is missed."""
    return command("promoe_speed", __doc__, args, measure=measure, show=show)


if __name__ == "__main__":
    raise SystemExit(main())
