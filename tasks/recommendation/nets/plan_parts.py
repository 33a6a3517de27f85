# SPDX-License-Identifier: Apache-2.0
"""Helpers to write level plans: tables of which gate sees which expert, names, experts that are alike, checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from moeapps.moe import ActivationName
from moeapps.moe.counts import at_least_one
from moeapps.moe.normalised import Norm
from tasks.recommendation.nets.levels import ExpertSettings, LevelPlan, NetFactory, RankingNet, TaskTree


def table(gates: int, experts: int, allowed: Callable[[int, int], bool]) -> tuple[tuple[bool, ...], ...]:
    """Who sees what, [gates][experts]."""
    return tuple(tuple(allowed(g, e) for e in range(experts)) for g in range(gates))


def network(
    plans: Callable[[TaskTree], Sequence[LevelPlan]],
    gates: Mapping[str, Any],
    *,
    width: int = 32,
    hidden: int | None = None,
    norm: Norm = "none",
    activation: ActivationName = "relu",
    tower_dim: int = 16,
) -> NetFactory:
    """A factory of the network that runs these plans, with a tower per task; the options are those of every rival.

    A rival fixes what its experts do not have: an overlay on another network would keep what that one says of it.

    Args:
        plans: the levels; all towers read the last level's gate where it has only one.
        gates: ``mixing`` and ``residual``, as `ExpertSettings` knows them.
        width: units of an expert.
        hidden: units of a hidden layer in it; None for none.
        norm: normalisation of the experts' outputs (batch: half of what HoME adds).
        activation: of the experts.
        tower_dim: hidden width of a tower.
    """
    at_least_one(width=width, hidden=hidden, tower_dim=tower_dim)
    settings = ExpertSettings(width=width, hidden=hidden, norm=norm, activation=activation, **gates)

    def build(dim: int, facts: dict[str, Any]) -> nn.Module:
        tree = TaskTree.from_facts(facts)
        levels = plans(tree)
        towers = [0] * len(tree.tasks) if len(levels[-1].gates) == 1 else range(len(tree.tasks))
        return RankingNet(dim, levels, settings, towers, tower_dim)

    return build


def shared_names(num: int) -> tuple[str, ...]:
    """Names of shared experts."""
    return numbered(["shared"] * num)


def numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Make names unique: a repeated one gets a number."""
    return tuple(f"{n}.{names[:i].count(n)}" if names.count(n) > 1 else n for i, n in enumerate(names))
