# SPDX-License-Identifier: Apache-2.0
"""Experts behind a gate for lists, with what the gate reads; and what a network for lists answers.

Shape legend: B lists, N candidates, K experts, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moeapps.moe import MLPExperts, MoELayer
from moeapps.moe.routers.choose_dense import DenseWeighing
from moeapps.moe.routers.score import Features
from tasks.recommendation.nets.behaviours import Encoded

GateReads = Literal["target", "query", "history", "input", "category", "nothing"]
ExpertOutput = Literal["score", "vector"]
GateNorm = Literal["none", "softmax", "sigmoid"]


@dataclass(frozen=True)
class BankSizes:
    """What a bank is built from.

    Attributes:
        dim: width of what the experts read.
        behaviour_dim: d, width of past items and keys.
        num_categories: ids of the category that a gate may read; 0 where the data has none.
        requests: whether requests have fields (a query, a context) that a gate may read.
    """

    dim: int
    behaviour_dim: int
    num_categories: int = 0
    requests: bool = False


@dataclass(frozen=True)
class GatedBank:
    """Experts behind a gate.

    Attributes:
        layer: both.
        reads: what the gate reads: the history with each candidate (``target``), with the request (``query``) or alone
            (``history``); what the experts read (``input``); the ``category``; ``nothing``.
    """

    layer: MoELayer
    reads: GateReads


BankFactory = Callable[[BankSizes], GatedBank]


@dataclass(frozen=True)
class ListScores:
    """What a network says of some lists.

    Attributes:
        logits: [B, N].
        gate: weights of the experts, [B, N, K], or [B, 1, K] where all candidates of a list share them; None without
            experts.
        interest: v_u, [B, N, d]; None without one.
        encoded: the lists as vectors, for a second look with a part of the history; None without.
    """

    logits: Tensor
    gate: Tensor | None = None
    interest: Tensor | None = None
    encoded: Encoded | None = None


def list_experts(sizes: BankSizes, num_experts: int, hidden_dim: int, output: ExpertOutput) -> MLPExperts:
    """Return K two-layer experts that score, or that give vectors for a joint tower.

    Raises:
        ValueError: unknown output.
    """
    return MLPExperts(num_experts, sizes.dim, hidden_dim, out_dim=output_width(output, hidden_dim), activation="relu")


def output_width(output: ExpertOutput, hidden_dim: int) -> int:
    """Return the width of what an expert gives: 1, or that of its hidden layer.

    Raises:
        ValueError: unknown output.
    """
    if output not in ("score", "vector"):
        raise ValueError(f"expert_output={output!r}, but it must be 'score' or 'vector'")
    return 1 if output == "score" else hidden_dim


def weighing_of(gate_norm: str) -> DenseWeighing:
    """Return how a gate's values become weights.

    Raises:
        ValueError: unknown ``gate_norm``.
    """
    known: dict[str, DenseWeighing] = {"none": "identity", "softmax": "softmax", "sigmoid": "sigmoid"}
    if gate_norm not in known:
        raise ValueError(f"gate_norm={gate_norm!r}, but it must be 'none', 'softmax' or 'sigmoid'.")
    return known[gate_norm]


def other_rows(logits_NK: Tensor, features: Features) -> Tensor:
    """Give each row the gate of the row half a batch away: a control, the hook ``adjust`` of a router."""
    return logits_NK.roll(len(logits_NK) // 2, 0)
