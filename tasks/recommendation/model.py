# SPDX-License-Identifier: Apache-2.0
"""The networks: HoME (levels of experts for several tasks) and AW-MoE (experts weighed by the user's history).

HoME: experts of categories on level 1, experts of tasks on level 2, and masks of which gate sees which expert.
AW-MoE: experts score candidates, a gate reads the history behaviour by behaviour and weighs the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from moeapps.moe import ActivationName, DenseRouting, MoELayer, presets
from moeapps.moe.counts import at_least_one, none_negative
from moeapps.moe.normalised import Norm
from moeapps.moe.routers.pairs import Pooling
from tasks.recommendation.data.batch import Interactions
from tasks.recommendation.data.lists import Lists
from tasks.recommendation.nets.activation_unit import ActivationUnit, InterestFactory
from tasks.recommendation.nets.behaviours import Encoded, ListEncoder
from tasks.recommendation.nets.embeddings import FeatureEncoder
from tasks.recommendation.nets.gates import GateMixing
from tasks.recommendation.nets.levels import ExpertSettings, LevelPlan, NetFactory, RankingNet, TaskTree
from tasks.recommendation.nets.list_banks import (
    BankFactory,
    BankSizes,
    ExpertOutput,
    GatedBank,
    GateNorm,
    ListScores,
    other_rows,
    output_width,
)
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
        ValueError: levels is not 1 or 2, a width below 1, a count below 0, a gate that would see nothing, or the data
            has other categories.

    Source: X. Wang et al., arXiv 2408.05430 (docs/papers/home.md, equations 1 to 7).
    """
    if levels not in (1, 2):
        raise ValueError(f"levels={levels}: HoME has 2 levels, or 1 in the ablation")
    at_least_one(width=width, tower_dim=tower_dim, feature_rank=feature_rank)
    none_negative(meta_shared=meta_shared, meta_category=meta_category, feature_gates=feature_gates)
    none_negative(task_shared=task_shared, task_category=task_category, task_own=task_own)
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


class ListRanker(nn.Module):
    r"""Rank the candidates of a list for a user: :math:`x = [v_u, h_t, h_q, h_o]`, experts on x, weighed by a gate.

    Every expert runs on every candidate. The gate is computed once per list unless it reads the candidates.

    Args:
        facts: from the data module: the fields of items, requests and profiles.
        bank: experts and gate, as a factory from their sizes; None means `aw_moe`, rivals are in
            `tasks.recommendation.rivals.list_banks`.
        encoder: columns to vectors, as a factory from facts; None means `ListEncoder`.
        interest: the history to v_u, as a factory from the width; None means `ActivationUnit` (DIN).
        category: the field that a gate on categories reads, of the request or else of the item.
        tower_dim: hidden width of the tower behind experts that give vectors.

    Shape:
        a batch of B lists of N candidates -> `ListScores` with logits [B, N].

    Raises:
        ValueError: the gate reads requests or a category that the data does not have, or a tower without a unit.

    Source: AW-MoE (docs/papers/aw_moe.md, equations 1 to 4).
    """

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        bank: BankFactory | None = None,
        encoder: Callable[[dict[str, Any]], ListEncoder] | None = None,
        interest: InterestFactory | None = None,
        category: str = "category",
        tower_dim: int = 16,
    ) -> None:
        super().__init__()
        at_least_one(tower_dim=tower_dim)
        self.encoder = (encoder or ListEncoder)(facts)
        self.interest = (interest or ActivationUnit)(self.encoder.dim)
        fields = {**self.encoder.items, **self.encoder.queries}
        width = 2 * self.encoder.dim + self.encoder.rest_dim
        sizes = BankSizes(width, self.encoder.dim, fields.get(category, 0), requests=bool(self.encoder.queries))
        built = (bank or aw_moe())(sizes)
        self.moe, self.reads, self.category = built.layer, built.reads, category
        if self.reads == "query" and not self.encoder.queries:
            raise ValueError("the gate's key is the query, but requests of this data have no field; use target or none")
        if self.reads == "category" and category not in fields:
            raise ValueError(f"category={category!r}: the gate reads a field of this name; the data has {list(fields)}")
        out_dim = int(self.moe.experts.out_dim)
        self.tower: nn.Module = nn.Identity()
        if out_dim > 1:
            self.tower = nn.Sequential(nn.Linear(out_dim, tower_dim), nn.ReLU(), nn.Linear(tower_dim, 1))

    def forward(self, batch: Lists, *, history_mask: Tensor | None = None) -> ListScores:
        """Scores of a batch.

        Args:
            batch: the lists.
            history_mask: bool [B, H], which past items to look at; None means all real ones.
        """
        encoded = self.encoder(batch)
        if history_mask is not None:
            encoded = replace(encoded, mask_BH=history_mask)
        v_BNd, x_BND = self.read(encoded)
        routing = self.route(batch, encoded, x_BND)
        whole = routing if self.gates_candidates else routing.repeat_rows(x_BND.shape[1])
        y_BNo = self.moe(x_BND, routing=whole, token_mask=batch.candidate_mask)
        gate_BNK = routing.weight.unflatten(0, (len(batch), -1))
        return ListScores(self.tower(y_BNo).squeeze(-1), gate_BNK, v_BNd, encoded)

    @property
    def gates_candidates(self) -> bool:
        """Whether each candidate has a gate of its own, else all of a list share one."""
        of_item = self.reads == "category" and self.category not in self.encoder.queries
        return self.reads in ("target", "input") or of_item

    def read(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return v_u [B, N, d] and what the experts read, [B, N, D]."""
        v_BNd = self.interest(encoded.history_BHd, encoded.mask_BH, encoded.target_BNd)
        rest_BNo = encoded.rest_Bo.unsqueeze(1).expand(-1, v_BNd.shape[1], -1)
        return v_BNd, torch.cat([v_BNd, encoded.target_BNd, rest_BNo], -1)

    def view(self, batch: Lists, encoded: Encoded, history_mask: Tensor, place_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate [B, K] and v_u [B, d] of one candidate of each list; the experts do not run.

        Args:
            batch: the lists.
            encoded: their vectors.
            history_mask: bool [B, H], the past items to look at.
            place_B: int64, which candidate.
        """
        row_B = torch.arange(len(batch), device=place_B.device)
        one = replace(
            batch,
            candidates=batch.candidates[row_B, place_B].unsqueeze(1),
            candidate_mask=batch.candidate_mask[row_B, place_B].unsqueeze(1),
        )
        seen = replace(encoded, mask_BH=history_mask, target_BNd=encoded.target_BNd[row_B, place_B].unsqueeze(1))
        v_B1d, x_B1D = self.read(seen)
        return self.route(one, seen, x_B1D).weight, v_B1d[:, 0]

    def route(self, batch: Lists, encoded: Encoded, x_BND: Tensor) -> DenseRouting:
        """Weights of the experts for B * N candidates or, where these share them, for B lists.

        Args:
            batch: the lists.
            encoded: their vectors; a smaller ``mask_BH`` shows the gate a part of the history.
            x_BND: what the experts read.
        """
        history_BHd, mask_BH, target_BNd = encoded.history_BHd, encoded.mask_BH, encoded.target_BNd
        if self.reads == "input":
            return cast(DenseRouting, self.moe.route(x_BND, token_mask=batch.candidate_mask))
        if self.reads == "category":
            if self.category in self.encoder.queries:
                group_B = batch.query[:, list(self.encoder.queries).index(self.category)]
                return cast(DenseRouting, self.moe.route(target_BNd[:, 0], group=group_B))
            group_BN = batch.candidates[..., list(self.encoder.items).index(self.category)]
            return cast(DenseRouting, self.moe.route(target_BNd, group=group_BN, token_mask=batch.candidate_mask))
        if self.reads == "target":
            num = target_BNd.shape[1]
            history, mask = (part.repeat_interleave(num, 0) for part in (history_BHd, mask_BH))
            features = (history, target_BNd.flatten(0, 1), mask)
            return cast(DenseRouting, self.moe.route(features, token_mask=batch.candidate_mask.flatten()))
        key_Bd = encoded.query_Bd if self.reads == "query" else torch.zeros_like(target_BNd[:, 0])
        return cast(DenseRouting, self.moe.route((history_BHd, cast(Tensor, key_Bd), mask_BH)))


def aw_moe(
    *,
    num_experts: int = 4,
    hidden_dim: int = 64,
    expert_output: ExpertOutput = "score",
    key: Literal["auto", "target", "query", "none"] = "auto",
    gate_norm: GateNorm = "none",
    pooling: Pooling = "sqrtn",
    mixing: Literal["attention", "shuffled"] = "attention",
    **units: Any,
) -> BankFactory:
    """AW-MoE: experts weighed by an attention-weighted sum of gate vectors, one per past item.

    An empty history has the learned prior alone, which starts at equal weights of all experts.

    Args:
        num_experts: K.
        hidden_dim: units of an expert's hidden layer.
        expert_output: ``score``: experts score and the gate weighs scores (recalled); ``vector``: a joint tower scores
            the weighted sum of vectors as wide as the hidden layer.
        key: what past items are held against: the request (``query``: search, recalled; one gate per list), each
            candidate (``target``: recommendation, recalled), or nothing (``none``; one gate per list). ``auto`` is
            the request where requests have fields, else the candidate.
        gate_norm: ``none`` leaves the weights free (recalled).
        pooling: ``sqrtn`` divides the sum by the root of the number of past items; ``sum`` (recalled) and ``mean``.
        mixing: ``shuffled`` gives each row the gate of another (control).
        units: options of `moeapps.moe.presets.aw_moe` for the gate unit and the activation unit; DIN's own also has
            the part ``difference`` and the activation `tasks.recommendation.nets.dice.Dice`.

    Raises:
        ValueError: an unknown choice.

    Source: J. Gong et al., arXiv 2306.05011 (docs/papers/aw_moe.md, equations 3 and 4).
    """
    reads: dict[str, Literal["target", "query", "history"]] = {"target": "target", "query": "query", "none": "history"}
    if key not in (*reads, "auto") or mixing not in ("attention", "shuffled"):
        raise ValueError(
            f"key={key!r}, mixing={mixing!r}: key is auto, target, query or none, mixing is attention or shuffled"
        )

    def build(sizes: BankSizes) -> GatedBank:
        layer = presets.aw_moe(
            num_experts=num_experts,
            behaviour_dim=sizes.behaviour_dim,
            hidden_dim=hidden_dim,
            out_dim=output_width(expert_output, hidden_dim),
            gate_norm=gate_norm,
            activation="relu",
            pooling=pooling,
            prior=1 / num_experts if gate_norm == "none" else 0.0,
            **units,
        )(sizes.dim)
        made = cast(MoELayer, layer)
        if mixing == "shuffled":
            made.router.adjust = other_rows
        return GatedBank(made, reads[("query" if sizes.requests else "target") if key == "auto" else key])

    return build
