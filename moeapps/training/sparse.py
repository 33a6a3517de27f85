# SPDX-License-Identifier: Apache-2.0
"""Large embedding tables: gradients that hold the touched rows only, stepped beside dense ones as ONE optimizer.

Lightning's automatic optimisation knows one optimizer per step, AdamW refuses sparse gradients and SparseAdam refuses
dense ones: `JoinedOptimizer` is one to Lightning and both inside. Norm clipping, which torch has for dense gradients
only, counts the touched rows here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, SparseAdam

from moeapps.training.optim import OptimizerConfig, adamw_numbers, build_adamw, parameter_groups
from moeapps.training.placement import placement_of, squares


def sparse_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of embeddings built with ``sparse=True``, each once."""
    found: dict[int, nn.Parameter] = {}
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse and part.weight.requires_grad:
            found[id(part.weight)] = cast(nn.Parameter, part.weight)
    return list(found.values())


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Return AdamW; with sparse embeddings AdamW and SparseAdam joined.

    SparseAdam moves touched rows only (lazy Adam) and knows no weight decay, so none is applied to those tables.

    Raises:
        ValueError: see ``parameter_groups``.
    """
    sparse = {id(parameter) for parameter in sparse_parameters(module)}
    if not sparse:
        return build_adamw(module, config)
    groups = parameter_groups(module.named_parameters(), config)
    dense_groups = [_only(group, lambda p: id(p) not in sparse) for group in groups]
    table_groups = [_only(group, lambda p: id(p) in sparse) for group in groups]
    parts: list[Optimizer] = []
    if any(group["params"] for group in dense_groups):
        dense = [group for group in dense_groups if group["params"]]
        parts.append(AdamW(dense, **adamw_numbers(config)))
    kept = [{key: group[key] for key in ("params", "lr", "name")} for group in table_groups if group["params"]]
    parts.append(SparseAdam(kept, lr=config.lr, betas=config.betas, eps=config.eps))
    return JoinedOptimizer(parts)


def _only(group: dict[str, Any], wanted: Callable[[nn.Parameter], bool]) -> dict[str, Any]:
    return {**group, "params": [parameter for parameter in group["params"] if wanted(parameter)]}


class JoinedOptimizer(Optimizer):
    """Several optimizers over disjoint parameters as one: groups in order, one state, one step.

    Learning-rate schedules, checkpoints and Lightning's hooks see an ordinary optimizer.

    Args:
        parts: the optimizers, at least one.

    Raises:
        ValueError: no part, or a parameter in two parts.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        if not parts:
            raise ValueError("parts=[] is not allowed; give at least one optimizer")
        self.parts = list(parts)
        groups = [group for part in self.parts for group in part.param_groups]
        # Schedules look for the momentum's name among the defaults (OneCycleLR).
        super().__init__(groups, {key: parts[0].defaults[key] for key in ("lr", "betas") if key in parts[0].defaults})

    def _link(self) -> None:
        """Let the parts use this optimizer's groups and state: loading a checkpoint replaces both."""
        start = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[start : start + count]
            part.state = self.state
            start += count

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of every part.

        Args:
            closure: computes loss and gradients anew; called once, before the first part.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._link()
        for part in self.parts:
            part.step()
        return loss


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, algorithm: str = "norm") -> None:
    """Clip dense, sparse and spread gradients in place; spread ones by the norm of all processes, which must all call.

    Args:
        parameters: those with a gradient count.
        limit: largest total norm, or largest absolute value; > 0.
        algorithm: ``norm`` scales all by min(1, limit / (total norm + 1e-6)), as torch does; ``value`` cuts numbers.

    Raises:
        ValueError: unknown algorithm.
    """
    if algorithm not in ("norm", "value"):
        raise ValueError(f"gradient_clip_algorithm={algorithm!r} is unknown; use norm or value")
    held = [parameter for parameter in parameters if parameter.grad is not None]
    for parameter in held:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # a row touched twice counts once, with its summed gradient
    values = [_values(parameter) for parameter in held]
    if algorithm == "value":
        for value in values:
            value.clamp_(-limit, limit)
        return
    total = math.sqrt(sum(squares(parameter.grad for parameter in held)))
    factor = limit / (total + 1e-6)
    if factor < 1:
        for value in values:
            value.mul_(factor)


def _values(parameter: nn.Parameter) -> Tensor:
    gradient: Any = parameter.grad
    if placement_of(gradient) is not None:
        return cast(Tensor, gradient.to_local())
    return cast(Tensor, gradient.values() if gradient.is_sparse else gradient)
