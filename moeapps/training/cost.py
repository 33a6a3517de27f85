# SPDX-License-Identifier: Apache-2.0
"""What a model costs: total and active parameters, and FLOPs per token, measured on one example batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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
    """

    name: str
    num_experts: int
    mean_k: float
    params: int

    @property
    def active(self) -> float:
        """Parameters of the bank that work for one row."""
        return self.params * min(1.0, self.mean_k / self.num_experts)


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


def measure_cost(task: BaseTask, batch: Any) -> Cost:
    """Measure the cost of a task's network on a batch; random states and training modes are left as they were.

    Matrix products, convolutions and attention are counted as they run, also inside custom autograd functions; sums,
    activations, sorting and gathering are not.

    Args:
        task: the task, on its device.
        batch: an example batch; moved to the task's device.
    """
    modes = [(module, module.training) for module in task.modules()]
    counter = FlopCounterMode(display=False, custom_mapping=_extra_formulas())
    try:
        task.eval()
        with isolate_rng(), torch.no_grad(), counter:
            moved = task.transfer_batch_to_device(batch, task.device, 0)
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
    """Return one entry per MoE layer that was called; a layer called several times counts with its mean k."""
    calls: dict[str, list[float]] = defaultdict(list)
    banks: dict[str, nn.Module] = {}
    for record in records:
        bank = getattr(record.layer, "experts", None)
        if isinstance(bank, nn.Module):
            banks[record.name] = bank
            calls[record.name].append(experts_per_row(record, int(getattr(bank, "num_experts", 1))))
    return [
        LayerCost(
            name,
            int(getattr(bank, "num_experts", 1)),
            sum(calls[name]) / len(calls[name]),
            sum(parameter.numel() for parameter in bank.parameters()),
        )
        for name, bank in banks.items()
    ]


def experts_per_row(record: Record, bank_size: int) -> float:
    """Return how many experts of the bank work per row: chosen ones plus shared ones; all of them for soft routing."""
    routing = record.routing
    if not isinstance(routing, Routing):
        return float(bank_size)
    rows = routing.num_rows if record.token_mask is None else int(record.token_mask.sum())
    return float(routing.counts().sum()) / max(1, rows) + (bank_size - routing.num_experts)


def _extra_formulas() -> dict[Any, Any]:
    """Formulas of products that torch's counter does not know yet."""

    def grouped_mm(a_shape: torch.Size, b_shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        # rows sorted by group (M, K) times (G, K, N): every row meets one matrix of the stack
        return 2 * a_shape[0] * a_shape[1] * b_shape[-1]

    operation = getattr(torch.ops.aten, "_grouped_mm", None)
    return {} if operation is None else {operation: grouped_mm}
