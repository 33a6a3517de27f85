# SPDX-License-Identifier: Apache-2.0
"""The cost of a model: total and active parameters, FLOPs per token on an example batch, FLOPs of a training."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from moeapps.moe.experts import Experts
from moeapps.moe.joined import JoinedExperts
from moeapps.moe.module_experts import ModuleExperts
from moeapps.moe.presets.twins import DenseTwin, Match
from moeapps.moe.record import Record
from moeapps.moe.routing import Routing
from moeapps.training.flops import count_flops, counting
from moeapps.training.task import BaseTask

__all__ = ["Cost", "LayerCost", "TrainingCost", "count_flops", "layer_costs", "measure_cost", "measure_training"]


@dataclass(frozen=True)
class LayerCost:
    """One MoE layer.

    Args:
        name: qualified name.
        num_experts: experts of the bank, shared ones included.
        mean_k: experts that work per row, shared ones included.
        params: parameters of the whole bank.
        active: parameters of the bank that work for one row, on average.
    """

    name: str
    num_experts: int
    mean_k: float
    params: int
    active: float


@dataclass(frozen=True)
class Cost:
    """The cost of a model.

    Args:
        total: parameters.
        trainable: parameters with a gradient.
        active: parameters that work for one token: all but the experts that were not chosen.
        flops: forward floating point operations of the example batch (two per multiply-add).
        tokens: tokens of the example batch.
        layers: the MoE layers.
        twin: for a network of derived dense twins, what it is matched in and its share of the mixture's.
    """

    total: int
    trainable: int
    active: int
    flops: int
    tokens: int
    layers: tuple[LayerCost, ...]
    twin: tuple[Match, float] | None = None

    @property
    def flops_per_token(self) -> float:
        """Forward floating point operations per token."""
        return self.flops / max(1, self.tokens)


def measure_cost(task: BaseTask, batch: Any, precision: Precision | None = None) -> Cost:
    """Measure the cost of a task's network on a batch; random states and training modes are left as they were.

    Products, convolutions, attention and recurrent layers are counted as they run (`moeapps.training.flops`), also
    inside custom autograd functions; sums, activations, sorting and gathering are not.

    Args:
        task: the task, on its device.
        batch: an example batch; moved to the task's device.
        precision: the trainer's precision, under which the network runs; None means its own.
    """
    precision = precision or Precision()
    modes = [(module, module.training) for module in task.modules()]
    try:
        task.eval()
        moved = precision.convert_input(task.transfer_batch_to_device(batch, task.device, 0))
        with isolate_rng(), torch.no_grad(), precision.forward_context(), counting(task) as flops:
            task.recorded_step(moved, "val")
        layers, twins = layer_costs(task.last_records), missing_of_twins(task.last_records)
    finally:
        task.last_records = []
        for module, mode in modes:
            module.training = mode
    total = sum(parameter.numel() for parameter in task.parameters())
    trainable = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    idle = sum(layer.params - layer.active for layer in layers)
    twin = None
    if twins is not None:
        match, missing = twins
        own = flops.get_total_flops() if match == "flops" else total
        twin = (match, own / max(1, own + missing))
    return Cost(
        total, trainable, round(total - idle), flops.get_total_flops(), task.num_tokens(batch), tuple(layers), twin
    )


@dataclass(frozen=True)
class TrainingCost:
    """The FLOPs of a training: its steps, forward and backward, and what goes on between them; no evaluation.

    Args:
        step: kind of step -> FLOPs of one, of all processes together.
        planned: kind -> number of steps that the run is to take, or of whatever else it does between them.
        steps: training steps that the run is to take.
    """

    step: Mapping[str, int]
    planned: Mapping[str, int]
    steps: int

    def flops(self, steps: Mapping[str, int] | None = None) -> int:
        """Return the FLOPs of so many steps of each kind; None means those planned."""
        counts = self.planned if steps is None else steps
        return sum(self.step[kind] * count for kind, count in counts.items())


def measure_training(
    task: BaseTask, batch: Any, planned: int, precision: Precision | None = None, processes: int = 1
) -> TrainingCost:
    """Count one training step of each kind, forward and backward, on a copy of the task; nothing of it changes.

    Every step of a kind is taken to cost what it costs on this batch.

    Args:
        task: the task, on its device.
        batch: a training batch of one process.
        planned: steps of the whole run.
        precision: the trainer's precision; None means the task's own.
        processes: how many processes take such a step at once.
    """
    precision = precision or Precision()
    kinds = task.step_kinds(planned, planned)
    step: dict[str, int] = {}
    for kind in kinds:
        # The trainer belongs to the run: the copy asks the same one.
        twin = copy.deepcopy(task, {id(task._trainer): task._trainer})
        twin.train()
        moved = precision.convert_input(twin.transfer_batch_to_device(batch, task.device, 0))
        with isolate_rng(), torch.enable_grad(), precision.forward_context(), counting() as flops:
            twin.differentiate(moved, kind)
        step[kind] = processes * flops.get_total_flops()
    return TrainingCost(step, kinds, planned)


def layer_costs(records: Sequence[Record]) -> list[LayerCost]:
    """Return one entry per MoE layer that was called; of a layer called several times the mean over its calls."""
    calls: dict[str, list[Tensor]] = defaultdict(list)
    sizes: dict[str, Tensor] = {}
    for record in records:
        bank = getattr(record.layer, "experts", None)
        if isinstance(bank, Experts):
            sizes[record.name] = torch.tensor(expert_sizes(bank), dtype=torch.float64)
            calls[record.name].append(work_per_row(record, bank.num_experts))
    costs = []
    for name, size_E in sizes.items():
        share_E = torch.stack(calls[name]).mean(0)
        active = float((size_E * share_E.clamp_max(1.0)).sum())
        costs.append(LayerCost(name, len(size_E), float(share_E.sum()), int(size_E.sum().round()), active))
    return costs


def missing_of_twins(records: Sequence[Record]) -> tuple[Match, int] | None:
    """Return what the dense twins are matched in, and the ratio of the network with mixtures to the twin in it."""
    match: Match | None = None
    flops, params = 0, {}
    for record in records:
        layer = record.layer
        if isinstance(layer, DenseTwin):
            match = layer.twin_of.match
            flops += record.routing.num_rows * (layer.twin_of.flops_per_row - layer.experts.flops_per_row)
            params[record.name] = layer.twin_of.params - sum(p.numel() for p in layer.parameters())
    return None if match is None else (match, flops if match == "flops" else sum(params.values()))


def work_per_row(record: Record, bank_size: int) -> Tensor:
    """Return how often each expert of the bank works per row, float64 [bank_size]: counts over rows, 1 for shared ones.

    Where every expert runs on every row (dense and slot routing) all are 1.
    """
    routing = record.routing
    share_E = torch.ones(bank_size, dtype=torch.float64)
    if isinstance(routing, Routing):
        rows = routing.num_rows if record.token_mask is None else int(record.token_mask.sum())
        share_E[: routing.num_experts] = routing.counts().double().cpu() / max(1, rows)
    return share_E


def expert_sizes(bank: Experts) -> list[float]:
    """Return the parameters of each expert; stacked weights are shared out evenly."""
    if isinstance(bank, JoinedExperts):
        return [size for part in bank.banks if isinstance(part, Experts) for size in expert_sizes(part)]
    if isinstance(bank, ModuleExperts):
        return [float(sum(p.numel() for p in module.parameters())) for module in bank.experts]
    return [sum(p.numel() for p in bank.parameters()) / bank.num_experts] * bank.num_experts
