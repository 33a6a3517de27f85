# SPDX-License-Identifier: Apache-2.0
"""Plans of one level: shared bottom, a network per task, OMoE, MMoE."""

from __future__ import annotations

from typing import Any

from tasks.recommendation.nets.gates import GateMixing
from tasks.recommendation.nets.levels import LevelPlan, NetFactory, TaskTree
from tasks.recommendation.nets.plan_parts import network, shared_names, table


def shared_bottom(*, width: int = 64, **experts: Any) -> NetFactory:
    """Shared bottom: one expert for all tasks, a tower per task.

    Args:
        width: units of the expert.
        experts: options of `network`: what an expert is, and the towers.
    """
    fixed = {"mixing": "uniform"}
    return network(
        lambda tree: [_all_shared(1, ("all",))], fixed, width=width, norm="none", activation="relu", **experts
    )


def single_task(**experts: Any) -> NetFactory:
    """Single task: an expert and a tower for each task, nothing shared but the embeddings.

    Args:
        experts: options of `network`: what an expert is, and the towers.
    """

    def plans(tree: TaskTree) -> list[LevelPlan]:
        num = len(tree.tasks)
        own = table(num, num, lambda g, e: g == e)
        return [LevelPlan((0,), (0,) * num, own, ((0,),) * num, experts=tree.tasks, gates=tree.tasks)]

    return network(plans, {"mixing": "uniform"}, norm="none", activation="relu", **experts)


def omoe(*, num_experts: int = 8, **experts: Any) -> NetFactory:
    """One-gate mixture of experts: all tasks read one mixture.

    Args:
        num_experts: E.
        experts: options of `network`: what an expert is, and the towers.
    """
    return network(lambda tree: [_all_shared(num_experts, ("all",))], {}, **experts)


def mmoe(*, num_experts: int = 8, mixing: GateMixing = "softmax", **experts: Any) -> NetFactory:
    """MMoE: shared experts, a softmax gate per task.

    Args:
        num_experts: E.
        mixing: softmax, or a control.
        experts: options of `network`: what an expert is, and the towers.

    Source: J. Ma et al., KDD 2018 (docs/papers/home.md, equation 9).
    """
    return network(lambda tree: [_all_shared(num_experts, tree.tasks)], {"mixing": mixing}, **experts)


def _all_shared(num_experts: int, gates: tuple[str, ...]) -> LevelPlan:
    """A level whose gates all see all experts."""
    sees, reads = table(len(gates), num_experts, lambda g, e: True), ((0,),) * len(gates)
    return LevelPlan((0,), (0,) * num_experts, sees, reads, experts=shared_names(num_experts), gates=gates)
