# SPDX-License-Identifier: Apache-2.0
"""Helpers to write level plans: tables of which gate sees which expert, names, settings of plain experts, checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from moeapps.moe import ActivationName
from moeapps.moe.normalised import Norm
from tasks.recommendation.nets.levels import ExpertSettings, LevelPlan, NetFactory, RankingNet, TaskTree

Rows = list[list[bool]]


def table(gates: int, experts: int, allowed: Callable[[int, int], bool]) -> tuple[tuple[bool, ...], ...]:
    """Who sees what, [gates][experts]."""
    return tuple(tuple(allowed(g, e) for e in range(experts)) for g in range(gates))


def network(
    plans: Callable[[TaskTree], Sequence[LevelPlan]],
    settings: ExpertSettings,
    tower_dim: int,
    *,
    one_gate: bool = False,
) -> NetFactory:
    """A factory of the network that runs these plans, with a tower per task."""

    def build(dim: int, facts: dict[str, Any]) -> nn.Module:
        tree = TaskTree.from_facts(facts)
        towers = [0] * len(tree.tasks) if one_gate else range(len(tree.tasks))
        return RankingNet(dim, plans(tree), settings, towers, tower_dim)

    return build


def plain(width: int, hidden: int | None, norm: Norm, activation: ActivationName, **more: Any) -> ExpertSettings:
    """Settings of experts that are alike."""
    return ExpertSettings(width=width, hidden=hidden, norm=norm, activation=activation, **more)


def shared_names(num: int) -> tuple[str, ...]:
    """Names of shared experts."""
    return numbered(["shared"] * num)


def numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Make names unique: a repeated one gets a number."""
    return tuple(f"{n}.{names[:i].count(n)}" if names.count(n) > 1 else n for i, n in enumerate(names))


def at_least(**limits: tuple[int, int]) -> None:
    """Refuse a count below its least value."""
    for name, (value, least) in limits.items():
        if value < least:
            raise ValueError(f"{name}={value}, but it must be at least {least}")
