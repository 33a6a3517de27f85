# SPDX-License-Identifier: Apache-2.0
"""Plans of several levels: PLE and CGC (its case of one level), multi-level MMoE, AdaTT, cross-stitch, STEM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from moeapps.moe.counts import at_least_one
from tasks.recommendation.nets.gates import Residual
from tasks.recommendation.nets.levels import LevelPlan, NetFactory, TaskTree
from tasks.recommendation.nets.plan_parts import network, numbered, shared_names, table


def ple(
    *,
    levels: int = 2,
    shared_experts: int = 4,
    task_experts: int = 1,
    mask: bool = True,
    **experts: Any,
) -> NetFactory:
    """PLE: CGC in levels; below the last one a shared gate mixes all experts for the shared experts above.

    Args:
        levels: number of levels, at least 1.
        shared_experts: experts that every task sees, per level.
        task_experts: experts of each task's own, per level.
        mask: whether a task is kept from the experts of others.
        experts: options of `network`: what an expert is, and the towers.

    Source: H. Tang et al., RecSys 2020 (docs/papers/home.md, equation 10).
    """
    at_least_one(levels=levels, experts=shared_experts + task_experts)
    plans = _unit_levels(levels, task_experts, shared_experts, mask=mask)
    return network(plans, {}, **experts)


def cgc(**options: Any) -> NetFactory:
    """CGC: shared experts and experts of each task's own; a task's gate sees both; without its mask it is MMoE.

    Args:
        options: those of `ple` but for its levels, of which there is one.

    Source: H. Tang et al., RecSys 2020 (docs/papers/home.md, equation 10).
    """
    return ple(levels=1, **options)


def ml_mmoe(*, levels: int = 2, num_experts: int = 8, **experts: Any) -> NetFactory:
    """Multi-level MMoE: below the last level every expert of the level above has a gate of its own.

    Every gate, at whatever level, reads the network's input.

    Args:
        levels: number of levels, at least 1.
        num_experts: E per level.
        experts: options of `network`: what an expert is, and the towers.

    Source: the multi-level MMoE that AdaTT is compared with, facebookresearch/AdaTT ``mtl_lib.py``.
    """
    at_least_one(levels=levels, num_experts=num_experts)

    def plans(tree: TaskTree) -> list[LevelPlan]:
        found = []
        for level in range(levels):
            gates = tree.tasks if level == levels - 1 else shared_names(num_experts)
            # Below, all experts read the one input; above, each reads the state that its own gate made.
            states = (0,) if level == 0 else tuple(range(num_experts))
            found.append(
                LevelPlan(
                    views=states,
                    reads=(0,) * num_experts if level == 0 else states,
                    sees=table(len(gates), num_experts, lambda g, e: True),
                    gate_reads=((0,),) * len(gates),
                    gates_read="inputs",
                    experts=shared_names(num_experts),
                    gates=gates,
                )
            )
        return found

    return network(plans, {}, hidden=None, **experts)


def adatt(
    *,
    levels: int = 2,
    task_experts: int = 1,
    shared_experts: int = 0,
    residual: bool = True,
    **experts: Any,
) -> NetFactory:
    """AdaTT: a unit per task owns experts; its gate mixes all experts, and its own ones are added once more.

    Args:
        levels: number of levels, at least 1.
        task_experts: experts of each task unit.
        shared_experts: experts of a shared unit, which has no gate on the last level; 0 is AdaTT-sp.
        residual: the added mix of a unit's own experts: the expert itself where every unit has one, else learned
            numbers in every unit, of one expert as well.
        experts: options of `network`: what an expert is, and the towers.

    Source: D. Li et al., KDD 2023 (docs/papers/home.md, equation 11); facebookresearch/AdaTT ``mtl_lib.py``.
    """
    at_least_one(levels=levels, task_experts=task_experts)
    one_each = task_experts == 1 and shared_experts in (0, 1)
    kind: Residual = ("ones" if one_each else "constant") if residual else "none"
    plans = _unit_levels(levels, task_experts, shared_experts)
    return network(plans, {"residual": kind}, norm="none", activation="relu", **experts)


def cross_stitch(*, levels: int = 2, **experts: Any) -> NetFactory:
    """Cross-stitch: a layer per task and level; between levels the tasks' states are mixed by learned numbers.

    Args:
        levels: number of levels, at least 1.
        experts: options of `network`: what an expert is, and the towers.

    Source: I. Misra et al., CVPR 2016, one number per pair of tasks instead of one per pair of channels.
    """
    at_least_one(levels=levels)
    plans = _unit_levels(levels, 1, 0)
    return network(plans, {"mixing": "constant"}, hidden=None, norm="none", activation="relu", **experts)


def stem(*, shared_experts: int = 4, task_experts: int = 1, stop_gradient: bool = True, **experts: Any) -> NetFactory:
    """STEM: embeddings per task and shared ones; a task sees all experts but trains its own and shared ones.

    Args:
        shared_experts: experts on the shared embeddings.
        task_experts: experts of each task, on its own embeddings.
        stop_gradient: keep a task's loss from the experts and embeddings of other tasks.
        experts: options of `network`: what an expert is, and the towers.

    Source: L. Su et al., AAAI 2024 (docs/papers/home.md, equation 13; recalled).
    """
    at_least_one(experts=shared_experts + task_experts)

    def plans(tree: TaskTree) -> list[LevelPlan]:
        num = len(tree.tasks)
        owner = _owners(num, task_experts, shared_experts)
        trains = table(num, len(owner), lambda g, e: owner[e] in (g, num))
        plan = _unit_level(tree, owner, 1, 2, lambda g, e: True)
        return [replace(plan, views=tuple(range(num + 1)), trains=trains if stop_gradient else None)]

    return network(plans, {}, norm="none", activation="relu", **experts)


def _owners(num_tasks: int, task_experts: int, shared_experts: int) -> list[int]:
    """The unit of each expert: its task's, or as number T the shared one."""
    return [t for t in range(num_tasks) for _ in range(task_experts)] + [num_tasks] * shared_experts


def _unit_levels(
    levels: int, task_experts: int, shared_experts: int, *, mask: bool = False
) -> Callable[[TaskTree], list[LevelPlan]]:
    """Levels of units that are alike; with ``mask`` a task is kept from the experts of others."""

    def plans(tree: TaskTree) -> list[LevelPlan]:
        num = len(tree.tasks)
        owner = _owners(num, task_experts, shared_experts)
        return [
            _unit_level(tree, owner, level, levels, lambda g, e: not mask or owner[e] in (g, num))
            for level in range(levels)
        ]

    return plans


def _unit_level(
    tree: TaskTree, owner: Sequence[int], level: int, levels: int, allowed: Callable[[int, int], bool]
) -> LevelPlan:
    """A level of units: one per task and, as number T, a shared one. ``owner`` gives the unit of each expert."""
    num = len(tree.tasks)
    units = [*tree.tasks, *(["shared"] if num in owner else [])]
    gates = tree.tasks if level == levels - 1 else tuple(units)
    states = (0,) * len(units) if level == 0 else tuple(range(len(units)))
    sees = table(len(gates), len(owner), lambda g, e: g == num or allowed(g, e))
    return LevelPlan(
        views=states,
        reads=tuple(owner),
        sees=sees,
        gate_reads=tuple((states[g],) for g in range(len(gates))),
        owns=table(len(gates), len(owner), lambda g, e: owner[e] == g),
        experts=numbered([units[unit] for unit in owner]),
        gates=gates,
    )
