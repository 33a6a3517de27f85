# SPDX-License-Identifier: Apache-2.0
"""Plans of one level: shared bottom, a network per task, OMoE, MMoE."""

from __future__ import annotations

from moeapps.moe import ActivationName
from moeapps.moe.normalised import Norm
from tasks.recommendation.nets.gates import GateMixing
from tasks.recommendation.nets.levels import LevelPlan, NetFactory, TaskTree
from tasks.recommendation.nets.plan_parts import network, plain, shared_names, table


def shared_bottom(*, width: int = 64, hidden: int | None = None, tower_dim: int = 16) -> NetFactory:
    """Shared bottom: one expert for all tasks, a tower per task.

    Args:
        width: units of the expert.
        hidden: units of a hidden layer in it; None for none.
        tower_dim: hidden width of a tower.
    """
    settings = plain(width, hidden, "none", "relu", mixing="uniform")
    return network(lambda tree: [_all_shared(1, ("all",))], settings, tower_dim, one_gate=True)


def single_task(*, width: int = 32, hidden: int | None = None, tower_dim: int = 16) -> NetFactory:
    """Single task: an expert and a tower for each task, nothing shared but the embeddings.

    Args:
        width: units of an expert.
        hidden: units of a hidden layer in it; None for none.
        tower_dim: hidden width of a tower.
    """

    def plans(tree: TaskTree) -> list[LevelPlan]:
        num = len(tree.tasks)
        own = table(num, num, lambda g, e: g == e)
        return [LevelPlan((0,), (0,) * num, own, ((0,),) * num, experts=tree.tasks, gates=tree.tasks)]

    return network(plans, plain(width, hidden, "none", "relu", mixing="uniform"), tower_dim)


def omoe(
    *,
    num_experts: int = 8,
    width: int = 32,
    hidden: int | None = None,
    norm: Norm = "none",
    activation: ActivationName = "relu",
    tower_dim: int = 16,
) -> NetFactory:
    """One-gate mixture of experts: all tasks read one mixture.

    Args:
        num_experts: E.
        width: units of an expert.
        hidden: units of a hidden layer in it; None for none.
        norm: normalisation of the experts' outputs.
        activation: of the experts.
        tower_dim: hidden width of a tower.
    """
    settings = plain(width, hidden, norm, activation)
    return network(lambda tree: [_all_shared(num_experts, ("all",))], settings, tower_dim, one_gate=True)


def mmoe(
    *,
    num_experts: int = 8,
    width: int = 32,
    hidden: int | None = None,
    norm: Norm = "none",
    activation: ActivationName = "relu",
    mixing: GateMixing = "softmax",
    tower_dim: int = 16,
) -> NetFactory:
    """MMoE: shared experts, a softmax gate per task.

    Args:
        num_experts: E.
        width: units of an expert.
        hidden: units of a hidden layer in it; None for none.
        norm: normalisation of the experts' outputs (batch: half of what HoME adds).
        activation: of the experts.
        mixing: softmax, or a control.
        tower_dim: hidden width of a tower.

    Source: J. Ma et al., KDD 2018 (docs/papers/home.md, equation 9).
    """
    settings = plain(width, hidden, norm, activation, mixing=mixing)
    return network(lambda tree: [_all_shared(num_experts, tree.tasks)], settings, tower_dim)


def _all_shared(num_experts: int, gates: tuple[str, ...]) -> LevelPlan:
    """A level whose gates all see all experts."""
    sees, reads = table(len(gates), num_experts, lambda g, e: True), ((0,),) * len(gates)
    return LevelPlan((0,), (0,) * num_experts, sees, reads, experts=shared_names(num_experts), gates=gates)
