# SPDX-License-Identifier: Apache-2.0
"""Rivals of AW-MoE as banks for `ListRanker`: the same inputs and experts under another gate, or one dense network.

With `averaged_experts` the network is DIN, or with `PlainSum` as its interest a DNN.
"""

from __future__ import annotations

from typing import Literal

from moeapps.moe import ConstantScore, Dense, LinearScore, MoELayer, Router, TableScore
from moeapps.moe.presets.twins import Match, dense_twin
from tasks.recommendation.model import aw_moe
from tasks.recommendation.nets.list_banks import (
    BankFactory,
    BankSizes,
    ExpertOutput,
    GatedBank,
    list_experts,
    weighing_of,
)

GateNorm = Literal["none", "softmax", "sigmoid"]


def averaged_experts(
    *, num_experts: int = 4, hidden_dim: int = 64, expert_output: ExpertOutput = "score"
) -> BankFactory:
    """The mean of K experts: DIN of the mixture's size, and the control of uniform gates.

    Args:
        num_experts: K.
        hidden_dim: units of an expert's hidden layer.
        expert_output: as in AW-MoE.
    """

    def build(sizes: BankSizes) -> GatedBank:
        experts = list_experts(sizes, num_experts, hidden_dim, expert_output)
        return GatedBank(MoELayer(Router(ConstantScore(num_experts), Dense("softmax")), experts), "nothing")

    return build


def category_gate(
    *,
    num_experts: int = 4,
    hidden_dim: int = 64,
    expert_output: ExpertOutput = "score",
    gate_norm: GateNorm = "softmax",
) -> BankFactory:
    """A gate that knows the category of the request (or, where requests have none, of the item), and nothing else.

    Args:
        num_experts: K.
        hidden_dim: units of an expert's hidden layer.
        expert_output: as in AW-MoE.
        gate_norm: as in AW-MoE.

    Source: Z. Xiao et al., Category-MoE, arXiv 2007.12349 (its idea; without the adversarial term).
    """

    def build(sizes: BankSizes) -> GatedBank:
        experts = list_experts(sizes, num_experts, hidden_dim, expert_output)
        score = TableScore(max(1, sizes.num_categories), num_experts)
        return GatedBank(MoELayer(Router(score, Dense(weighing_of(gate_norm))), experts), "category")

    return build


def input_gate(
    *,
    num_experts: int = 4,
    hidden_dim: int = 64,
    expert_output: ExpertOutput = "score",
    gate_norm: GateNorm = "softmax",
) -> BankFactory:
    """MMoE's gate for one task: a linear function of what the experts read.

    Args:
        num_experts: K.
        hidden_dim: units of an expert's hidden layer.
        expert_output: as in AW-MoE.
        gate_norm: as in AW-MoE.

    Source: J. Ma et al., KDD 2018 (docs/papers/home.md).
    """

    def build(sizes: BankSizes) -> GatedBank:
        experts = list_experts(sizes, num_experts, hidden_dim, expert_output)
        score = LinearScore(sizes.dim, num_experts, bias=True)
        return GatedBank(MoELayer(Router(score, Dense(weighing_of(gate_norm))), experts), "input")

    return build


def dense_bank(*, of: BankFactory | None = None, match: Match = "flops") -> BankFactory:
    """The dense twin: one expert that is always on, as wide as all experts of the mixture together.

    The gate is not made up for; run summaries say what it comes to.

    Args:
        of: the mixture; None means `tasks.recommendation.model.aw_moe` with nothing said.
        match: equal FLOPs of the experts or equal parameters; the same where all experts run.
    """
    mixture = of or aw_moe()

    def build(sizes: BankSizes) -> GatedBank:
        def layer_of(dim: int) -> MoELayer:
            return mixture(sizes).layer

        twin = dense_twin(moe=layer_of, match=match)(sizes.dim)
        assert isinstance(twin, MoELayer)
        return GatedBank(twin, "nothing")

    return build
