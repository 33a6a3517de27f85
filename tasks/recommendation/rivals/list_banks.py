# SPDX-License-Identifier: Apache-2.0
"""Rivals of AW-MoE as banks for `ListRanker`: the same inputs and experts under another gate, or one dense network.

With `averaged_experts` the network is DIN, or with `PlainSum` as its interest a DNN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeapps.moe import ConstantScore, Dense, LinearScore, MoELayer, Router, Score, TableScore
from moeapps.moe.presets.twins import Match, dense_twin
from tasks.recommendation.model import aw_moe
from tasks.recommendation.nets.list_banks import (
    BankFactory,
    BankSizes,
    ExpertOutput,
    GatedBank,
    GateNorm,
    GateReads,
    list_experts,
    weighing_of,
)


def bank(
    reads: GateReads,
    score_of: Callable[[BankSizes, int], Score],
    gate_norm: GateNorm,
    *,
    num_experts: int = 4,
    hidden_dim: int = 64,
    expert_output: ExpertOutput = "score",
) -> BankFactory:
    """A factory of AW-MoE's experts behind another gate; the options are those of every rival.

    Args:
        reads: what the gate reads.
        score_of: sizes and K -> what the gate computes.
        gate_norm: as in AW-MoE.
        num_experts: K.
        hidden_dim: units of an expert's hidden layer.
        expert_output: as in AW-MoE.
    """
    weighing = weighing_of(gate_norm)

    def build(sizes: BankSizes) -> GatedBank:
        experts = list_experts(sizes, num_experts, hidden_dim, expert_output)
        return GatedBank(MoELayer(Router(score_of(sizes, num_experts), Dense(weighing)), experts), reads)

    return build


def averaged_experts(**experts: Any) -> BankFactory:
    """The mean of K experts: DIN of the mixture's size, and the control of uniform gates.

    Args:
        experts: options of `bank`.
    """
    return bank("nothing", lambda sizes, num: ConstantScore(num), "softmax", **experts)


def category_gate(*, gate_norm: GateNorm = "softmax", **experts: Any) -> BankFactory:
    """A gate that knows the category of the request (or, where requests have none, of the item), and nothing else.

    Args:
        gate_norm: as in AW-MoE.
        experts: options of `bank`.

    Source: Z. Xiao et al., Category-MoE, arXiv 2007.12349 (its idea; without the adversarial term).
    """

    def score_of(sizes: BankSizes, num: int) -> Score:
        return TableScore(max(1, sizes.num_categories), num)

    return bank("category", score_of, gate_norm, **experts)


def input_gate(*, gate_norm: GateNorm = "softmax", **experts: Any) -> BankFactory:
    """MMoE's gate for one task: a linear function of what the experts read.

    Args:
        gate_norm: as in AW-MoE.
        experts: options of `bank`.

    Source: J. Ma et al., KDD 2018 (docs/papers/home.md).
    """
    return bank("input", lambda sizes, num: LinearScore(sizes.dim, num, bias=True), gate_norm, **experts)


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
