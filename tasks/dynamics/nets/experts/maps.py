# SPDX-License-Identifier: Apache-2.0
"""Banks of maps from sample to sample.

Shape letters: E experts, M rows sorted by expert, C rows of one expert (padded), D state size, m context numbers that
an expert reads.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tasks.dynamics.nets.experts.base import MetaExperts


class ShallowPLRNNExperts(MetaExperts):
    r"""Hierarchical shallow piecewise-linear networks, one step of a sequence.

    All of an environment's parameters are linear in its context, :math:`p = H c`:
    :math:`u_t = \alpha z_t + (1 - \alpha) x_t`, :math:`z_{t+1} = A u_t + W_1\,relu(W_2 u_t + h_2) + h_1`, with
    :math:`\alpha \in [\alpha_{min}, 1]`: 0 forces the model onto the data, 1 lets it run freely. A row is the model's
    state and the observed one, [z, x]; without data pass z twice.

    Differs from the published code: the output is compared with the NEXT sample, so that the identity is no solution;
    A is I plus what the context gives, and all but W_2 starts at 0, so that training starts from persistence; p has a
    part that does not depend on c, since contexts start at 0; z_0 is the first sample, not 0.

    Args:
        state_dim: D, which is also the number of units M (identity decoder).
        num_experts: E.
        context_dim: whole width of a context.
        hidden: units L of the hidden layer.
        alpha_min: least share of the model's own state, in [0, 1].
        split_context: see :class:`MetaExperts` (published: no).
        options: see :class:`MetaExperts`.

    Raises:
        ValueError: ``alpha_min`` outside [0, 1] or ``hidden`` below 1.

    Source: Brenner et al. (2024) as in MixER (docs/papers/mixer.md, equation 6).

    Example:
        >>> ShallowPLRNNExperts(3, 2, 4).every(torch.zeros(5, 6), torch.zeros(5, 4)).shape
        torch.Size([5, 2, 3])
    """

    num_inputs: ClassVar[int] = 2

    def __init__(
        self,
        state_dim: int,
        num_experts: int,
        context_dim: int,
        *,
        hidden: int = 16,
        alpha_min: float = 0.0,
        split_context: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(state_dim, num_experts, context_dim, split_context=split_context, **options)
        if not 0 <= alpha_min <= 1 or hidden < 1:
            raise ValueError(f"alpha_min={alpha_min} must lie in [0, 1] and hidden={hidden} be at least 1")
        self.hidden, self.alpha_min = hidden, alpha_min
        D, L = state_dim, hidden
        self.shapes = {"A": (D, D), "W1": (L, D), "W2": (D, L), "h1": (1, D), "h2": (1, L), "alpha": (1, 1)}
        self.lengths = [rows * columns for rows, columns in self.shapes.values()]
        # Row 0 is what the parameters are at context 0, the other rows are H.
        self.map = nn.Parameter(torch.empty(num_experts, 1 + self.piece_dim, sum(self.lengths)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """H small; at context 0 W2 as ``nn.Linear``, the rest 0 (A = I)."""
        self.uniform(self.map, 0.1 / math.sqrt(self.piece_dim))
        with torch.no_grad():
            base = dict(zip(self.shapes, self.map[:, :1].split(self.lengths, -1), strict=True))
            for name, values in base.items():
                self.uniform(values, float(name == "W2") / math.sqrt(self.out_dim))
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    @property
    def flops_per_row(self) -> int:
        """Forward operations of one expert on one row: the map from the context, and one step."""
        D, L = self.out_dim, self.hidden
        return 2 * (1 + self.piece_dim) * sum(self.lengths) + 2 * (D * D + 2 * D * L)

    def compute(self, p: dict[str, Tensor], x_ECD: Tensor, piece_ECm: Tensor) -> Tensor:
        """One step of all blocks from rows [z, x]."""
        D = self.out_dim
        z, x = x_ECD[..., None, :D], x_ECD[..., None, D:]  # (E, C, 1, D)
        flat = torch.baddbmm(p["map"][:, :1], piece_ECm, p["map"][:, 1:])  # (E, C, all parameters)
        parts = zip(flat.split(self.lengths, -1), self.shapes.items(), strict=True)
        own = {name: part.unflatten(-1, shape) for part, (name, shape) in parts}
        alpha = own["alpha"].clamp(self.alpha_min, 1)
        u = alpha * z + (1 - alpha) * x
        step: Tensor = u + u @ own["A"] + torch.relu(u @ own["W2"] + own["h2"]) @ own["W1"] + own["h1"]
        return step.squeeze(-2)
