# SPDX-License-Identifier: Apache-2.0
"""What a model costs: total and active parameters, and FLOPs per token, measured on one example batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moeapps.moe.experts import Experts
from moeapps.moe.joined import JoinedExperts
from moeapps.moe.module_experts import ModuleExperts
from moeapps.moe.record import Record
from moeapps.moe.routing import Routing
from moeapps.training.task import BaseTask


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
    """

    total: int
    trainable: int
    active: int
    flops: int
    tokens: int
    layers: tuple[LayerCost, ...]

    @property
    def flops_per_token(self) -> float:
        """Forward floating point operations per token."""
        return self.flops / max(1, self.tokens)


def measure_cost(task: BaseTask, batch: Any, precision: Precision | None = None) -> Cost:
    """Measure the cost of a task's network on a batch; random states and training modes are left as they were.

    Matrix products, convolutions and attention are counted as they run, also inside custom autograd functions; sums,
    activations, sorting and gathering are not.

    Args:
        task: the task, on its device.
        batch: an example batch; moved to the task's device.
        precision: the trainer's precision, under which the network runs; None means its own.
    """
    precision = precision or Precision()
    modes = [(module, module.training) for module in task.modules()]
    counter = FlopCounterMode(display=False, custom_mapping=_extra_formulas())
    try:
        task.eval()
        moved = precision.convert_input(task.transfer_batch_to_device(batch, task.device, 0))
        with isolate_rng(), torch.no_grad(), precision.forward_context(), counter:
            task.recorded_step(moved, "val")
        layers = layer_costs(task.last_records)
    finally:
        task.last_records = []
        for module, mode in modes:
            module.training = mode
    total = sum(parameter.numel() for parameter in task.parameters())
    trainable = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    idle = sum(layer.params - layer.active for layer in layers)
    return Cost(total, trainable, round(total - idle), counter.get_total_flops(), task.num_tokens(batch), tuple(layers))


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


def _extra_formulas() -> dict[Any, Any]:
    """Formulas of products that torch's counter does not know yet."""

    def grouped_mm(a_shape: torch.Size, b_shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        # rows sorted by group (M, K) times (G, K, N): every row meets one matrix of the stack
        return 2 * a_shape[0] * a_shape[1] * b_shape[-1]

    operation = getattr(torch.ops.aten, "_grouped_mm", None)
    return {} if operation is None else {operation: grouped_mm}
