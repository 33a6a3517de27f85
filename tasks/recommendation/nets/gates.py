# SPDX-License-Identifier: Apache-2.0
"""HoME's gates as their equation says: a softmax over the experts a gate sees, and one over those it owns.

Shape legend: N rows, S states (inputs of a level), d width of a state, G gates, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from moeapps.moe import AnyRouting, LinearScore, MultiGate, RouterBase, SumRouters
from moeapps.moe.routers.choose_dense import DenseWeighing
from moeapps.moe.routers.score import Features

GateMixing = Literal["softmax", "uniform", "shuffled", "constant"]
Residual = Literal["none", "self_gate", "constant", "ones"]
Table = Sequence[Sequence[bool]]


class HomeGates(RouterBase):
    r"""G gates over one bank, each over the experts it sees, plus self-gates over the experts they own.

    .. math::
        w_g = softmax_{e \in sees(g)}(W_g x_g + b_g) + softmax_{e \in owns(g)}(W'_g x_g + b'_g),
        \quad x_g = [z_s]_{s \in reads(g)}

    The second softmax is a sigmoid where a gate owns one expert. `StackedGates` computes the same in one product; a
    test holds the two together. Where nothing is owned there are no self-gates.

    Args:
        width: d.
        sees: [G, E], which experts a gate mixes.
        reads: for each gate the states it reads, concatenated.
        owns: [G, E], which experts a gate owns: at least one for every gate; None leaves self-gates out.

    Shape:
        features [S, N, d] -> weight [G, N, E]; what a gate neither sees nor owns has weight exactly 0.

    Raises:
        ValueError: if a gate sees, owns or reads nothing, or the tables differ in size.

    Source: HoME, docs/papers/home.md, equations 1 and 6.

    Example:
        >>> gates = HomeGates(4, sees=[[True, True, False], [True, True, True]], reads=[(0,), (0, 1)])
        >>> gates(torch.randn(2, 5, 4)).weight.shape
        torch.Size([2, 5, 3])
    """

    sparse = False
    takes_gates = True

    def __init__(self, width: int, sees: Table, reads: Sequence[Sequence[int]], *, owns: Table | None = None) -> None:
        super().__init__()
        if len(reads) != len(sees) or not all(reads):
            raise ValueError(f"reads={[*map(list, reads)]}: name at least one state for each of {len(sees)} gates.")
        self.num_experts, self.reads = len(sees[0]), tuple(tuple(states) for states in reads)

        def scores() -> list[LinearScore]:
            return [LinearScore(width * len(states), self.num_experts, bias=True) for states in reads]

        self.gates = MultiGate(scores(), allowed=sees)
        self.both: RouterBase = self.gates
        if owns is not None:
            alone: list[DenseWeighing] = ["sigmoid" if sum(row) == 1 else "softmax" for row in owns]
            self.both = SumRouters([self.gates, MultiGate(scores(), allowed=owns, weighing=alone)])

    def mean_k(self) -> float | None:
        """All experts run."""
        return float(self.num_experts)

    def biases_of(self, pairs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Where the biases of the mixing gates for the pairs [G, E] are: each tensor with the places in it."""
        biases = [cast(Tensor, score.bias) for score in self.gates.scores]
        return list(zip(biases, pairs.unbind(0), strict=True))

    def forward(
        self,
        features: Features,
        *,
        state: Tensor | None = None,
        token_mask: Tensor | None = None,
        group: Tensor | None = None,
    ) -> AnyRouting:
        """Weights [G, N, E]."""
        read = tuple(torch.cat([features[s] for s in states], dim=-1) for states in self.reads)  # G x [N, |reads| d]
        routing: AnyRouting = self.both(read, token_mask=token_mask)
        return routing
