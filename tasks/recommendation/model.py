# SPDX-License-Identifier: Apache-2.0
"""HoME: experts of categories on level 1, experts of tasks on level 2, and masks of which gate sees which expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from moeapps.moe import ActivationName
from moeapps.moe.normalised import Norm
from tasks.recommendation.data.batch import Interactions
from tasks.recommendation.nets.embeddings import FeatureEncoder
from tasks.recommendation.nets.gates import GateMixing
from tasks.recommendation.nets.levels import ExpertSettings, LevelPlan, NetFactory, RankingNet, TaskTree
from tasks.recommendation.nets.plan_parts import numbered, table


class Ranker(nn.Module):
    """An encoder of features, and the levels of experts and towers behind it.

    Args:
        facts: from the data module: tasks, categories and the sizes of the features.
        bank: the experts, as a factory from width and facts; one of `tasks.recommendation.rivals`. None means HoME.
        encoder: features to one vector, as a factory from facts; None means `FeatureEncoder`.

    Shape:
        a batch of N rows -> logits [N, T].
    """

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        bank: NetFactory | None = None,
        encoder: Callable[[dict[str, Any]], FeatureEncoder] | None = None,
    ) -> None:
        super().__init__()
        encoder = encoder or FeatureEncoder
        first = encoder(facts)
        self.bank = cast(RankingNet, (bank or home())(first.out_dim, facts))
        # One for all tasks, but for banks with a table per task (STEM).
        self.encoders = nn.ModuleList([first, *(encoder(facts) for _ in range(self.bank.num_inputs - 1))])

    def forward(self, batch: Interactions) -> Tensor:
        """Logits."""
        states = [encoder(batch) for encoder in self.encoders]
        z_SNd = states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)
        logits: Tensor = self.bank(z_SNd)
        return logits


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
    mixing: GateMixing = "softmax",
    category_order: list[str] | None = None,
    category_choice: Literal["given", "one", "random"] = "given",
    category_seed: int = 0,
    tower_dim: int = 16,
    fast_gates: bool = True,
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
        category_choice: categories as given; all tasks in one; or assigned at random (control).
        category_seed: seed of the random deal.
        tower_dim: hidden width of a tower.
        fast_gates: all gates of a level in one product; False computes them one by one, as the equation reads.

    Raises:
        ValueError: levels is not 1 or 2, a gate would see nothing, or the data has other categories.

    Source: X. Wang et al., arXiv 2408.05430 (docs/papers/home.md, equations 1 to 7).
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
        fast_gates=fast_gates,
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
        sees=table(len(side), len(group), lambda g, e: not mask or side[g] == num or group[e] in (side[g], num)),
        gate_reads=tuple((c,) for c in side),
        gates_read="views",
        owns=table(len(side), len(group), lambda g, e: group[e] == side[g]),
        experts=numbered([(*tree.categories, "shared")[g] for g in group]),
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
        sees=table(num_t, len(reads), seen),
        gate_reads=tuple((c, num_c) for c in tree.category),
        owns=table(num_t, len(reads), lambda t, e: views[reads[e]][1] == t),
        experts=numbered([names[v] for v in reads]),
        gates=tree.tasks,
    )
