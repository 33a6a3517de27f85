# SPDX-License-Identifier: Apache-2.0
"""AdamW with parameter groups chosen by name patterns, and learning-rate schedules over the whole run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from typing_extensions import override

from moeapps.training.placement import split_by_mesh


@dataclass
class ParamGroup:
    """Parameters that are trained with numbers of their own.

    Args:
        pattern: shell-style pattern on the full parameter name, e.g. ``*.router.*`` or ``net.enc.*``.
        lr: learning rate; None means the optimizer's.
        lr_mult: factor on the learning rate, > 0.
        weight_decay: decay of the group; None means the optimizer's.
    """

    pattern: str
    lr: float | None = None
    lr_mult: float = 1.0
    weight_decay: float | None = None


@dataclass
class OptimizerConfig:
    """AdamW and its parameter groups; a parameter belongs to the first group whose pattern matches its name.

    Args:
        lr: learning rate per step (the peak, where a schedule has one).
        weight_decay: decoupled decay per step, multiplied by the learning rate.
        betas: decay rates of the two moment averages.
        eps: added to the root of the second moment.
        groups: exceptions by name pattern.
        fused: update each parameter in one pass, on a CPU several times faster where parameters are many and small; it
            rounds otherwise. None leaves it to torch.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    groups: list[ParamGroup] = field(default_factory=list)
    fused: bool | None = None

    def __post_init__(self) -> None:
        rates: list[tuple[str, float | None]] = [("lr", self.lr)]
        for group in self.groups:
            rates += [(f"{group.pattern}: lr_mult", group.lr_mult), (f"{group.pattern}: lr", group.lr)]
        for name, rate in rates:
            if rate is not None and not 0 < rate < math.inf:  # nan is neither
                raise ValueError(
                    f"{name}={rate}: lr and lr_mult must be positive and finite; freeze parameters with requires_grad "
                    "instead of lr 0"
                )
        decays = [self.weight_decay, *(g.weight_decay for g in self.groups if g.weight_decay is not None)]
        if not all(0 <= decay < math.inf for decay in decays):  # a negative one lets weights grow without a word
            raise ValueError(f"weight_decay={next(d for d in decays if not 0 <= d < math.inf)}; use 0 or more")
        if not 0 <= self.eps < math.inf or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"eps={self.eps}, betas={self.betas}; eps is 0 or more, betas lie in [0, 1)")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Sort trainable parameters into AdamW's groups; groups without parameters are left out.

    Args:
        named: (full name, parameter) pairs, as of ``module.named_parameters()``.
        config: learning rates, decays and patterns.

    Returns:
        Dictionaries with ``params``, ``lr``, ``weight_decay`` and ``name``; the rest (``default``) comes first.

    Raises:
        ValueError: a pattern matches no parameter, or no parameter is trainable.
    """
    members: list[list[nn.Parameter]] = [[] for _ in range(len(config.groups) + 1)]
    matched: set[int] = set()
    for name, parameter in named:
        hits = [i for i, group in enumerate(config.groups) if fnmatchcase(name, group.pattern)]
        matched.update(hits)
        if parameter.requires_grad:
            members[hits[0] + 1 if hits else 0].append(parameter)
    for i, group in enumerate(config.groups):
        if i not in matched:
            raise ValueError(f"optimizer group pattern {group.pattern!r} matches no parameter; correct or remove it")
    if not any(members):
        raise ValueError("no parameter is trainable; leave at least one with requires_grad")
    groups = [{"params": members[0], "lr": config.lr, "weight_decay": config.weight_decay, "name": "default"}]
    for group, params in zip(config.groups, members[1:], strict=True):
        lr = (config.lr if group.lr is None else group.lr) * group.lr_mult
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        groups.append({"params": params, "lr": lr, "weight_decay": decay, "name": group.pattern})
    return [group for group in groups if group["params"]]


def build_adamw(module: nn.Module, config: OptimizerConfig) -> AdamW:
    """Return AdamW over the trainable parameters of a module.

    Raises:
        ValueError: see ``parameter_groups``.
    """
    groups = split_by_mesh(parameter_groups(module.named_parameters(), config))
    return clippable(AdamW(groups, **adamw_numbers(config)))


def adamw_numbers(config: OptimizerConfig) -> dict[str, Any]:
    """Return what AdamW is built with besides its groups."""
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": config.fused}


def clippable(optimizer: AdamW) -> AdamW:
    """Let gradients be scaled back before the step also where the step is fused, and return the optimizer.

    A fused step offers to divide by the loss scale itself, and then there is no moment at which gradients of their true
    size could be clipped: under any mixed precision Lightning refuses the pair, under bfloat16, which scales nothing,
    too. Without the offer (read by ``torch.amp.GradScaler`` and Lightning) gradients are scaled back first, as for any
    other optimizer; the step is the same.
    """
    optimizer._step_supports_amp_scaling = False
    return optimizer


class Schedule:
    """How learning rates move over the run; called with the optimizer and the number of optimizer steps."""

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Return a scheduler that is stepped once per optimizer step."""
        return LambdaLR(optimizer, lambda step: 1.0)


class Constant(Schedule):
    """Learning rates stay as they are."""


class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to ``final`` times the learning rate.

    Args:
        warmup: share of the steps that climb linearly from 0, in [0, 1).
        final: factor at the last step, in [0, 1].

    Raises:
        ValueError: a share outside its range.
    """

    def __init__(self, warmup: float = 0.0, final: float = 0.0) -> None:
        if not 0 <= warmup < 1 or not 0 <= final <= 1:
            raise ValueError(f"warmup={warmup} must lie in [0, 1) and final={final} in [0, 1]")
        self.warmup = warmup
        self.final = final

    @override
    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        warm = round(self.warmup * total_steps)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            done = min(1.0, (step - warm) / max(1, total_steps - warm))
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))

        return LambdaLR(optimizer, factor)


class OneCycle(Schedule):
    """One cycle: climb to each group's learning rate, then anneal far below it (torch's OneCycleLR).

    Args:
        pct_start: share of the steps that climb, in [0, 1].
        div_factor: first rate = peak / div_factor.
        final_div_factor: last rate = first rate / final_div_factor.
        anneal: shape of both slopes, ``cos`` or ``linear``.
        cycle_momentum: move AdamW's first beta against the rate between 0.85 and 0.95.
    """

    def __init__(
        self,
        pct_start: float = 0.05,
        div_factor: float = 10.0,
        final_div_factor: float = 1000.0,
        anneal: str = "cos",
        cycle_momentum: bool = True,
    ) -> None:
        if anneal not in ("cos", "linear"):
            raise ValueError(f"anneal={anneal!r} is unknown; use cos or linear")
        self.options: dict[str, Any] = {
            "pct_start": pct_start,
            "div_factor": div_factor,
            "final_div_factor": final_div_factor,
            "anneal_strategy": anneal,
            "cycle_momentum": cycle_momentum,
        }

    @override
    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        return OneCycleLR(
            optimizer,
            max_lr=[float(group["lr"]) for group in optimizer.param_groups],
            # One step more than is taken: Lightning steps the schedule after the last optimizer step as well.
            total_steps=total_steps + 1,
            **self.options,
        )
