# SPDX-License-Identifier: Apache-2.0
"""Published multi-task networks as plans of one bank: single task to HoME, each a table of who reads and sees what.

Each function returns a factory for `RankingTask`. Experts of one network are alike: ``width`` units, one layer or, with
``hidden``, two. T tasks, C categories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from moeapps.moe import ActivationName
from moeapps.moe.normalised import Norm
from tasks.recommendation.gates import Mixing
from tasks.recommendation.model import ExpertSettings, LevelPlan, NetFactory, RankingNet, TaskTree

Rows = list[list[bool]]


def _table(gates: int, experts: int, allowed: Callable[[int, int], bool]) -> tuple[tuple[bool, ...], ...]:
    return tuple(tuple(allowed(g, e) for e in range(experts)) for g in range(gates))


def _network(
    plans: Callable[[TaskTree], Sequence[LevelPlan]],
    settings: ExpertSettings,
    tower_dim: int,
    *,
    one_gate: bool = False,
) -> NetFactory:
    def build(dim: int, facts: dict[str, Any]) -> nn.Module:
        tree = TaskTree.from_facts(facts)
        towers = [0] * len(tree.tasks) if one_gate else range(len(tree.tasks))
        return RankingNet(dim, plans(tree), settings, towers, tower_dim)

    return build


def _plain(width: int, hidden: int | None, norm: Norm, activation: ActivationName, **more: Any) -> ExpertSettings:
    return ExpertSettings(width=width, hidden=hidden, norm=norm, activation=activation, **more)


# --- one level ------------------------------------------------------------------------------------------------------


def shared_bottom(*, width: int = 64, hidden: int | None = None, tower_dim: int = 16) -> NetFactory:
    """Shared bottom: one expert for all tasks, a tower per task.

    Args:
        width: units of the expert.
        hidden: units of a hidden layer in it; None for none.
        tower_dim: hidden width of a tower.
    """
    one = LevelPlan((0,), (0,), ((True,),), ((0,),), experts=("shared",), gates=("all",))
    settings = _plain(width, hidden, "none", "relu", mixing="uniform")
    return _network(lambda tree: [one], settings, tower_dim, one_gate=True)


def single_task(*, width: int = 32, hidden: int | None = None, tower_dim: int = 16) -> NetFactory:
    """Single task: an expert and a tower for each task, nothing shared but the embeddings.

    Args:
        width: units of an expert.
        hidden: units of a hidden layer in it; None for none.
        tower_dim: hidden width of a tower.
    """

    def plans(tree: TaskTree) -> list[LevelPlan]:
        num = len(tree.tasks)
        own = _table(num, num, lambda g, e: g == e)
        return [LevelPlan((0,), (0,) * num, own, ((0,),) * num, experts=tree.tasks, gates=tree.tasks)]

    return _network(plans, _plain(width, hidden, "none", "relu", mixing="uniform"), tower_dim)


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
    plan = LevelPlan(
        (0,), (0,) * num_experts, ((True,) * num_experts,), ((0,),), experts=_shared(num_experts), gates=("all",)
    )
    return _network(lambda tree: [plan], _plain(width, hidden, norm, activation), tower_dim, one_gate=True)


def mmoe(
    *,
    num_experts: int = 8,
    width: int = 32,
    hidden: int | None = None,
    norm: Norm = "none",
    activation: ActivationName = "relu",
    mixing: Mixing = "softmax",
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

    Source: J. Ma et al., KDD 2018 (home card 2.2).
    """

    def plans(tree: TaskTree) -> list[LevelPlan]:
        num = len(tree.tasks)
        every = _table(num, num_experts, lambda g, e: True)
        return [
            LevelPlan((0,), (0,) * num_experts, every, ((0,),) * num, experts=_shared(num_experts), gates=tree.tasks)
        ]

    return _network(plans, _plain(width, hidden, norm, activation, mixing=mixing), tower_dim)


def cgc(
    *,
    shared_experts: int = 4,
    task_experts: int = 1,
    width: int = 32,
    hidden: int | None = None,
    norm: Norm = "none",
    activation: ActivationName = "relu",
    mask: bool = True,
    tower_dim: int = 16,
) -> NetFactory:
    """CGC: shared experts and experts of each task's own; a task's gate sees both.

    Args:
        shared_experts: experts that every task sees.
        task_experts: experts of each task's own.
        width: units of an expert.
        hidden: units of a hidden layer in it; None for none.
        norm: normalisation of the experts' outputs.
        activation: of the experts.
        mask: whether a task is kept from the experts of others; without, it is MMoE.
        tower_dim: hidden width of a tower.

    Source: H. Tang et al., RecSys 2020 (home card 2.2).
    """
    return ple(
        levels=1,
        shared_experts=shared_experts,
        task_experts=task_experts,
        width=width,
        hidden=hidden,
        norm=norm,
        activation=activation,
        mask=mask,
        tower_dim=tower_dim,
    )


# --- several levels -------------------------------------------------------------------------------------------------


def ple(
    *,
    levels: int = 2,
    shared_experts: int = 4,
    task_experts: int = 1,
    width: int = 32,
    hidden: int | None = None,
    norm: Norm = "none",
    activation: ActivationName = "relu",
    mask: bool = True,
    tower_dim: int = 16,
) -> NetFactory:
    """PLE: CGC in levels; below the last one a shared gate mixes all experts for the shared experts above.

    Args:
        levels: number of levels, at least 1.
        shared_experts: experts that every task sees, per level.
        task_experts: experts of each task's own, per level.
        width: units of an expert.
        hidden: units of a hidden layer in it; None for none.
        norm: normalisation of the experts' outputs.
        activation: of the experts.
        mask: whether a task is kept from the experts of others.
        tower_dim: hidden width of a tower.

    Source: H. Tang et al., RecSys 2020 (home card 2.2).
    """
    _at_least(levels=(levels, 1), experts=(shared_experts + task_experts, 1))

    def plans(tree: TaskTree) -> list[LevelPlan]:
        num = len(tree.tasks)
        owner = [t for t in range(num) for _ in range(task_experts)] + [num] * shared_experts
        return [
            _unit_level(tree, owner, level, levels, lambda g, e: not mask or owner[e] in (g, num))
            for level in range(levels)
        ]

    return _network(plans, _plain(width, hidden, norm, activation), tower_dim)


def ml_mmoe(
    *,
    levels: int = 2,
    num_experts: int = 8,
    width: int = 32,
    norm: Norm = "none",
    activation: ActivationName = "relu",
    tower_dim: int = 16,
) -> NetFactory:
    """Multi-level MMoE: below the last level every expert of the level above has a gate of its own.

    Args:
        levels: number of levels, at least 1.
        num_experts: E per level.
        width: units of an expert.
        norm: normalisation of the experts' outputs.
        activation: of the experts.
        tower_dim: hidden width of a tower.

    Source: the multi-level MMoE that AdaTT is compared with (recalled: a gate per expert of the next level).
    """
    _at_least(levels=(levels, 1), num_experts=(num_experts, 1))

    def plans(tree: TaskTree) -> list[LevelPlan]:
        found = []
        for level in range(levels):
            gates = tree.tasks if level == levels - 1 else _shared(num_experts)
            every = _table(len(gates), num_experts, lambda g, e: True)
            # Below, all read the one input and each gate feeds one expert; above, a gate reads all the states.
            states = (0,) if level == 0 else tuple(range(num_experts))
            reads = (0,) * num_experts if level == 0 else states
            found.append(
                LevelPlan(states, reads, every, (states,) * len(gates), experts=_shared(num_experts), gates=gates)
            )
        return found

    return _network(plans, _plain(width, None, norm, activation), tower_dim)


def adatt(
    *,
    levels: int = 2,
    task_experts: int = 1,
    shared_experts: int = 0,
    width: int = 32,
    hidden: int | None = None,
    residual: bool = True,
    tower_dim: int = 16,
) -> NetFactory:
    """AdaTT: a unit per task owns experts; its gate mixes all experts, and its own ones are added once more.

    Args:
        levels: number of levels, at least 1.
        task_experts: experts of each task unit; with one the residual is the identity, with more a learned mix.
        shared_experts: experts of a shared unit, which has no gate on the last level; 0 is AdaTT-sp.
        width: units of an expert.
        hidden: units of a hidden layer in it; None for none.
        residual: the added mix of a unit's own experts.
        tower_dim: hidden width of a tower.

    Source: D. Li et al., KDD 2023 (home card 2.2).
    """
    _at_least(levels=(levels, 1), task_experts=(task_experts, 1))

    def plans(tree: TaskTree) -> list[LevelPlan]:
        num = len(tree.tasks)
        owner = [t for t in range(num) for _ in range(task_experts)] + [num] * shared_experts
        return [_unit_level(tree, owner, level, levels, lambda g, e: True) for level in range(levels)]

    settings = _plain(width, hidden, "none", "relu", residual="constant" if residual else "none")
    return _network(plans, settings, tower_dim)


def cross_stitch(*, levels: int = 2, width: int = 32, tower_dim: int = 16) -> NetFactory:
    """Cross-stitch: a layer per task and level; between levels the tasks' states are mixed by learned numbers.

    Args:
        levels: number of levels, at least 1.
        width: units of a layer.
        tower_dim: hidden width of a tower.

    Source: I. Misra et al., CVPR 2016, one number per pair of tasks instead of one per pair of channels.
    """
    _at_least(levels=(levels, 1))

    def plans(tree: TaskTree) -> list[LevelPlan]:
        owner = list(range(len(tree.tasks)))
        return [_unit_level(tree, owner, level, levels, lambda g, e: True) for level in range(levels)]

    return _network(plans, _plain(width, None, "none", "relu", mixing="constant"), tower_dim)


def stem(
    *,
    shared_experts: int = 4,
    task_experts: int = 1,
    width: int = 32,
    hidden: int | None = None,
    stop_gradient: bool = True,
    tower_dim: int = 16,
) -> NetFactory:
    """STEM: embeddings per task and shared ones; a task sees all experts but trains its own and shared ones.

    Args:
        shared_experts: experts on the shared embeddings.
        task_experts: experts of each task, on its own embeddings.
        width: units of an expert.
        hidden: units of a hidden layer in it; None for none.
        stop_gradient: keep a task's loss from the experts and embeddings of other tasks.
        tower_dim: hidden width of a tower.

    Source: L. Su et al., AAAI 2024 (recalled in home card 8).
    """
    _at_least(experts=(shared_experts + task_experts, 1))

    def plans(tree: TaskTree) -> list[LevelPlan]:
        num = len(tree.tasks)
        owner = [t for t in range(num) for _ in range(task_experts)] + [num] * shared_experts
        trains = _table(num, len(owner), lambda g, e: owner[e] in (g, num))
        plan = _unit_level(tree, owner, 1, 2, lambda g, e: True)
        return [replace(plan, views=tuple(range(num + 1)), trains=trains if stop_gradient else None)]

    return _network(plans, _plain(width, hidden, "none", "relu"), tower_dim)


def _unit_level(
    tree: TaskTree, owner: Sequence[int], level: int, levels: int, allowed: Callable[[int, int], bool]
) -> LevelPlan:
    """A level of units: one per task and, as number T, a shared one. ``owner`` gives the unit of each expert."""
    num = len(tree.tasks)
    units = [*tree.tasks, *(["shared"] if num in owner else [])]
    gates = tree.tasks if level == levels - 1 else tuple(units)
    states = (0,) * len(units) if level == 0 else tuple(range(len(units)))
    sees = _table(len(gates), len(owner), lambda g, e: g == num or allowed(g, e))
    return LevelPlan(
        views=states,
        reads=tuple(owner),
        sees=sees,
        gate_reads=tuple((states[g],) for g in range(len(gates))),
        owns=_table(len(gates), len(owner), lambda g, e: owner[e] == g),
        experts=_numbered([units[unit] for unit in owner]),
        gates=gates,
    )


# --- HoME -----------------------------------------------------------------------------------------------------------


def home(
    *,
    levels: int = 2,
    meta_shared: int = 3,
    meta_category: int = 3,
    task_shared: int = 1,
    task_category: int = 1,
    task_own: int = 1,
    width: int = 64,
    hidden: int | None = None,
    norm: Norm = "batch",
    activation: ActivationName = "silu",
    mask: bool = True,
    feature_gates: int = 2,
    feature_rank: int = 8,
    self_gates: bool = True,
    mixing: Mixing = "softmax",
    category_order: list[str] | None = None,
    category_choice: Literal["given", "one", "random"] = "given",
    category_seed: int = 0,
    tower_dim: int = 16,
) -> NetFactory:
    """HoME: normalised Swish experts in two levels, categories then tasks, with feature-gates and self-gates.

    Level 1 makes one state per category, from shared experts and its own, and a shared one from all. Level 2 makes one
    state per task from experts on the shared state, on its category's, and its own. Every switch is an ablation.

    Args:
        levels: 2, or 1: the tasks' gates stand on the experts of level 1 and see shared ones and their category's.
        meta_shared: experts of level 1 that all see.
        meta_category: experts of level 1 of each category.
        task_shared: experts of level 2 on the shared state.
        task_category: experts of level 2 of each category.
        task_own: experts of level 2 of each task.
        width: units of an expert.
        hidden: units of a hidden layer in it; None for none.
        norm: batch (paper), layer or none.
        activation: silu (Swish, paper) or relu.
        mask: the hierarchy; without, every gate sees every expert of its level.
        feature_gates: L, low-rank gates per group of experts; 0 leaves them out.
        feature_rank: r, their rank.
        self_gates: every group adds its own experts once more, by a gate of its own.
        mixing: softmax, or a control: uniform gates, shuffled gates.
        category_order: names of the categories, to state what is expected; None takes those of the data.
        category_choice: categories as given; all tasks in one; or dealt out at random (control).
        category_seed: seed of the random deal.
        tower_dim: hidden width of a tower.

    Raises:
        ValueError: levels is not 1 or 2, a gate would see nothing, or the data has other categories.

    Source: X. Wang et al., arXiv 2408.05430 (home card 2).
    """
    if levels not in (1, 2):
        raise ValueError(f"levels={levels}: HoME has 2 levels, or 1 in the ablation")
    settings = ExpertSettings(
        width=width,
        hidden=hidden,
        norm=norm,
        activation=activation,
        mixing=mixing,
        residual="self_gate" if self_gates else "none",
        feature_gates=feature_gates,
        feature_rank=feature_rank,
    )

    def build(dim: int, facts: dict[str, Any]) -> nn.Module:
        tree = TaskTree.from_facts(facts, category_order)
        if category_choice != "given":
            tree = tree.merged() if category_choice == "one" else tree.shuffled(category_seed)
        plans = [_meta_level(tree, meta_shared, meta_category, mask, last=levels == 1)]
        if levels == 2:
            plans.append(_task_level(tree, task_shared, task_category, task_own, mask))
        return RankingNet(dim, plans, settings, range(len(tree.tasks)), tower_dim)

    return build


def _meta_level(tree: TaskTree, shared: int, per_category: int, mask: bool, *, last: bool) -> LevelPlan:
    """Level 1. Views, and gates unless it is the last level: one per category, then the shared one."""
    num = len(tree.categories)
    group = [c for c in range(num) for _ in range(per_category)] + [num] * shared
    side = tree.category if last else (*range(num), num)  # the group of each gate
    return LevelPlan(
        views=(0,) * (num + 1),
        reads=tuple(group),
        sees=_table(len(side), len(group), lambda g, e: not mask or side[g] == num or group[e] in (side[g], num)),
        gate_reads=tuple((c,) for c in side),
        gates_read="views",
        owns=_table(len(side), len(group), lambda g, e: group[e] == side[g]),
        experts=_numbered([(*tree.categories, "shared")[g] for g in group]),
        gates=tree.tasks if last else (*tree.categories, "shared"),
    )


def _task_level(tree: TaskTree, shared: int, per_category: int, own: int, mask: bool) -> LevelPlan:
    """Level 2. Views by category: the category's own, then its tasks'; last the shared one. Gates: one per task."""
    num_c, num_t = len(tree.categories), len(tree.tasks)
    views: list[tuple[int, int]] = []  # (state, task; -1 for the category's and the shared one)
    for c in range(num_c):
        views += [(c, -1)] * bool(per_category) + [(c, t) for t in range(num_t) if own and tree.category[t] == c]
    views += [(num_c, -1)] * bool(shared)
    count = [own if t >= 0 else shared if state == num_c else per_category for state, t in views]
    reads = [v for v in range(len(views)) for _ in range(count[v])]

    def seen(t: int, e: int) -> bool:
        state, task = views[reads[e]]
        return not mask or task == t or (task < 0 and state in (tree.category[t], num_c))

    names = [tree.tasks[t] if t >= 0 else (*tree.categories, "shared")[state] for state, t in views]
    return LevelPlan(
        views=tuple(state for state, _ in views),
        reads=tuple(reads),
        sees=_table(num_t, len(reads), seen),
        gate_reads=tuple((c, num_c) for c in tree.category),
        owns=_table(num_t, len(reads), lambda t, e: views[reads[e]][1] == t),
        experts=_numbered([names[v] for v in reads]),
        gates=tree.tasks,
    )


def _shared(num: int) -> tuple[str, ...]:
    return _numbered(["shared"] * num)


def _numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Names made unlike: a repeated one gets a number."""
    return tuple(f"{n}.{names[:i].count(n)}" if names.count(n) > 1 else n for i, n in enumerate(names))


def _at_least(**limits: tuple[int, int]) -> None:
    for name, (value, least) in limits.items():
        if value < least:
            raise ValueError(f"{name}={value}, but it must be at least {least}")
