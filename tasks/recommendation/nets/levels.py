# SPDX-License-Identifier: Apache-2.0
"""One masked bank of experts for every multi-task network: levels of experts, gates over them, a tower per task.

What tells MMoE, CGC, PLE, AdaTT, STEM and HoME apart is who reads what and who sees whom: a `LevelPlan` of plain
tables. The plans are in ``presets``; here is the one network that runs any of them.

Shape legend: N rows, S states, d width of a state, V views, E experts, G gates, o width of an expert, T tasks.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moeapps.moe import ActivationName, AnyRouting, Combiner, DenseRouting, MoELayer, NormalisedExperts, RouterBase
from moeapps.moe.combine import Work
from moeapps.moe.normalised import Norm
from moeapps.moe.record import record_experts
from moeapps.moe.view_linear import view_linear
from tasks.recommendation.nets.fast_gates import StackedGates
from tasks.recommendation.nets.feature_gates import FeatureGates
from tasks.recommendation.nets.gates import GateMixing, HomeGates, Residual


@dataclass(frozen=True)
class TaskTree:
    """The tasks and the category of each, as the data module gives them.

    Args:
        tasks: names of the T tasks.
        category: for each task its category, 0 .. C - 1.
        categories: names of the C categories.

    Raises:
        ValueError: no task, another number of categories than of tasks, or a category without a task.
    """

    tasks: tuple[str, ...]
    category: tuple[int, ...]
    categories: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.tasks or len(self.category) != len(self.tasks):
            raise ValueError(f"{len(self.category)} categories for {len(self.tasks)} tasks; give every task one")
        if sorted(set(self.category)) != list(range(len(self.categories))):
            raise ValueError(
                f"category {list(self.category)}: each of {list(self.categories)} needs a task, and no other"
            )

    @staticmethod
    def from_facts(facts: dict[str, Any], order: Sequence[str] | None = None) -> TaskTree:
        """Read the facts of a data module.

        Args:
            facts: with ``tasks`` and ``categories`` (the category of each task, by name).
            order: names of the categories, to state what is expected; None takes those of the data, in their order.

        Raises:
            ValueError: ``order`` and the data name different categories.
        """
        names = list(facts["categories"])
        found = list(dict.fromkeys(names))
        wanted = found if order is None else list(order)
        if sorted(wanted) != sorted(found):
            raise ValueError(
                f"the network expects categories {wanted}, but the tasks of the data have {found}; make them equal"
            )
        return TaskTree(tuple(facts["tasks"]), tuple(wanted.index(name) for name in names), tuple(wanted))

    def merged(self) -> TaskTree:
        """The same tasks in one category: the ablation C = 1."""
        return TaskTree(self.tasks, (0,) * len(self.tasks), ("all",))

    def shuffled(self, seed: int) -> TaskTree:
        """Control: categories of the same sizes, assigned at random, never the given partition.

        Raises:
            ValueError: there is no other partition of these sizes.
        """
        sides = [{frozenset(group) for group in _groups(c)} for c in (self.category,)]
        deal, generator = list(self.category), random.Random(seed)
        for _ in range(1000):
            generator.shuffle(deal)
            if {frozenset(group) for group in _groups(deal)} != sides[0]:
                return TaskTree(self.tasks, tuple(deal), self.categories)
        raise ValueError(f"categories {list(self.category)} cannot be assigned in another way; leave the control out")


def _groups(category: Sequence[int]) -> list[list[int]]:
    return [[t for t, c in enumerate(category) if c == group] for group in sorted(set(category))]


@dataclass(frozen=True)
class LevelPlan:
    """A level plan: which view each expert reads, and which experts each gate sees.

    Args:
        views: for each view the state it is made of; without feature-gates a view is its state.
        reads: for each expert the view it reads.
        sees: [G, E], which experts a gate mixes (the mask).
        gate_reads: for each gate the states (or views or inputs, see ``gates_read``) it reads, concatenated.
        gates_read: ``states``, ``views``, or ``inputs`` (those of the whole network, at whatever level).
        owns: [G, E], which experts a gate owns, for its self-gate or residual.
        trains: [G, E], through which pairs the gradient of a gate's output reaches the expert; None means all (STEM).
        experts: names of the experts, for reports.
        gates: names of the gates, for reports.
    """

    views: tuple[int, ...]
    reads: tuple[int, ...]
    sees: tuple[tuple[bool, ...], ...]
    gate_reads: tuple[tuple[int, ...], ...]
    gates_read: Literal["states", "views", "inputs"] = "states"
    owns: tuple[tuple[bool, ...], ...] | None = None
    trains: tuple[tuple[bool, ...], ...] | None = None
    experts: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()

    @property
    def num_states(self) -> int:
        """States of which the level reads any."""
        read = [*self.views, *(s for states in self.gate_reads for s in states if self.gates_read == "states")]
        return 1 + max(read)


@dataclass(frozen=True)
class ExpertSettings:
    """How experts are built and how gates weigh them, the same for all levels.

    Args:
        width: o, units of an expert's output.
        hidden: units of a hidden layer in each expert; None for a single layer.
        norm: normalisation at the output: batch, layer or none.
        activation: after the normalisation.
        mixing: how a gate weighs the experts it sees: softmax, or a control; see `StackedGates`.
        residual: what joins over a gate's own experts; see `StackedGates`.
        feature_gates: L, low-rank gates per view; 0 for none.
        feature_rank: r, their rank.
        fast_gates: all gates of a level at once (`StackedGates`), or one by one as the equation reads (`HomeGates`).

    Raises:
        ValueError: gates one by one with another mixing than softmax, or another residual than HoME's.
    """

    width: int = 32
    hidden: int | None = None
    norm: Norm = "none"
    activation: ActivationName = "relu"
    mixing: GateMixing = "softmax"
    residual: Residual = "none"
    feature_gates: int = 0
    feature_rank: int = 8
    fast_gates: bool = True

    def __post_init__(self) -> None:
        if not self.fast_gates and (self.mixing != "softmax" or self.residual not in ("none", "self_gate")):
            raise ValueError(
                f"fast_gates=False knows mixing='softmax' with residual='none' or 'self_gate' alone, but they are "
                f"{self.mixing!r} and {self.residual!r}; use fast_gates=True."
            )


class GateMix(Combiner):
    """Mix the experts' outputs for every gate, as one product per row.

    Args:
        trains: [G, E], pairs through which gradient reaches the expert; through the others only the gate learns.

    Shape:
        bank on [V, N, d] views, weight [G, N, E] -> [G, N, o].
    """

    keep: Tensor | None

    def __init__(self, trains: Sequence[Sequence[bool]] | None = None) -> None:
        super().__init__()
        self.register_buffer("keep", None if trains is None else torch.as_tensor(trains).float(), persistent=False)

    def forward(self, work: Work, routing: AnyRouting) -> Tensor:
        """The mixtures."""
        assert isinstance(routing, DenseRouting)
        h_NEo = record_experts(work.experts.every(work.x))
        weight_NGE = routing.weight.transpose(0, 1).to(h_NEo.dtype)
        if self.keep is None:
            return torch.bmm(weight_NGE, h_NEo).transpose(0, 1)
        y_NGo = torch.bmm(weight_NGE * self.keep, h_NEo) + torch.bmm(weight_NGE * (1 - self.keep), h_NEo.detach())
        return y_NGo.transpose(0, 1)


class ExpertLevel(nn.Module):
    """One level: feature-gates make views, experts read them, gates mix what they may see.

    Args:
        plan: the tables.
        dim: d.
        settings: what an expert is.
        input_dim: width of the network's inputs, for gates that read them; None means d.

    Shape:
        states [S, N, d], inputs of the network [S', N, input_dim] -> states of the next level [G, N, o].
    """

    def __init__(self, plan: LevelPlan, dim: int, settings: ExpertSettings, input_dim: int | None = None) -> None:
        super().__init__()
        self.plan = plan
        gated = settings.feature_gates > 0
        self.feature_gates = (
            FeatureGates(dim, plan.views, num_gates=settings.feature_gates, rank=settings.feature_rank)
            if gated
            else None
        )
        reads = plan.reads if gated else tuple(plan.views[view] for view in plan.reads)
        on_states = plan.gates_read != "views" or gated
        gate_reads = plan.gate_reads if on_states else [[plan.views[v] for v in views] for views in plan.gate_reads]
        read_dim = dim if input_dim is None or plan.gates_read != "inputs" else input_dim
        router: RouterBase
        if settings.fast_gates:
            router = StackedGates(
                read_dim, plan.sees, gate_reads, owns=plan.owns, mixing=settings.mixing, residual=settings.residual
            )
        else:
            owns = plan.owns if settings.residual == "self_gate" else None
            router = HomeGates(read_dim, plan.sees, gate_reads, owns=owns)
        bank = NormalisedExperts(
            len(plan.reads),
            dim,
            settings.width,
            hidden_dim=settings.hidden,
            activation=settings.activation,
            hidden_activation=settings.activation,
            norm=settings.norm,
            reads=reads,
        )
        self.moe = MoELayer(router, bank, combiner=GateMix(plan.trains))

    def forward(self, z_SNd: Tensor, inputs_SNd: Tensor | None = None) -> Tensor:
        """States of the next level; without ``inputs_SNd`` the states are the network's inputs."""
        view_VNd = z_SNd if self.feature_gates is None else self.feature_gates(z_SNd)  # [V, N, d]
        inputs_SNd = z_SNd if inputs_SNd is None else inputs_SNd
        read = {"views": view_VNd, "states": z_SNd, "inputs": inputs_SNd}[self.plan.gates_read]
        y_GNo: Tensor = self.moe(view_VNd, read, per_expert=True)
        return y_GNo


class Towers(nn.Module):
    r"""One perceptron per task on the state of its gate, :math:`logit_t = w_t \\cdot relu(z_t W_t + b_t) + c_t`.

    Args:
        dim: o.
        reads: for each task the state its tower reads.
        hidden: width of the hidden layer.

    Shape:
        states [G, N, o] -> logits [N, T].
    """

    def __init__(self, dim: int, reads: Sequence[int], hidden: int) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.w_in, self.b_in = (
            nn.Parameter(torch.empty(len(reads), dim, hidden)),
            nn.Parameter(torch.empty(len(reads), hidden)),
        )
        self.w_out, self.b_out = nn.Parameter(torch.empty(len(reads), hidden, 1)), nn.Parameter(torch.empty(len(reads)))
        for parameter, fan_in in ((self.w_in, dim), (self.b_in, dim), (self.w_out, hidden), (self.b_out, hidden)):
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, z_GNo: Tensor) -> Tensor:
        """Logits."""
        h_NTh = torch.relu(view_linear(z_GNo, self.w_in, self.reads) + self.b_in)
        return view_linear(h_NTh.transpose(0, 1), self.w_out, range(len(self.reads))).squeeze(2) + self.b_out


class RankingNet(nn.Module):
    """Levels of one masked bank, and a tower per task.

    Args:
        dim: width of the input.
        plans: the levels, first one first; it reads ``num_inputs`` states (more than one: STEM's tables).
        settings: what an expert is.
        tower_reads: for each task the last level's gate that its tower reads.
        tower_dim: hidden width of a tower.

    Shape:
        inputs [S, N, d] -> logits [N, T].

    Raises:
        ValueError: a level reads a state that the level before does not make, or there is no level.
    """

    def __init__(
        self,
        dim: int,
        plans: Sequence[LevelPlan],
        settings: ExpertSettings,
        tower_reads: Sequence[int],
        tower_dim: int = 16,
    ) -> None:
        super().__init__()
        if not plans:
            raise ValueError("a network needs at least one level of experts")
        for below, above in itertools.pairwise(plans):
            if above.num_states > len(below.sees):
                raise ValueError(f"a level reads {above.num_states} states, but the one before makes {len(below.sees)}")
        self.num_inputs = plans[0].num_states
        dims = [dim] + [settings.width] * (len(plans) - 1)
        self.levels = nn.ModuleList([ExpertLevel(plan, d, settings, dim) for plan, d in zip(plans, dims, strict=True)])
        self.towers = Towers(settings.width, tower_reads, tower_dim)

    def forward(self, z_SNd: Tensor) -> Tensor:
        """Logits."""
        inputs_SNd = z_SNd
        for level in self.levels:
            z_SNd = level(z_SNd, inputs_SNd)
        logits: Tensor = self.towers(z_SNd)
        return logits


NetFactory = Callable[[int, dict[str, Any]], nn.Module]
"""Width of the input and facts of the data module -> network, inputs [S, N, d] -> logits [N, T]."""
