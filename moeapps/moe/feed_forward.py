# SPDX-License-Identifier: Apache-2.0
"""The stacked weights of a two-layer bank, and the two ways to apply them with ordinary operations.

Shape legend: N rows, M rows sorted by expert, R rows of one expert, D input width, F hidden width, O output width,
H = F, or 2F when gated, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from moeapps.moe.activation import Activation


@dataclass(frozen=True)
class FeedForward:
    """The stacked weights of a two-layer bank, all that a backend has to know; a part of a bank is one as well.

    Attributes:
        w_in: (E, D, H) with H = F, or 2F (gate | up) when ``gated``.
        b_in: (E, H) or None.
        w_out: (E, F, O).
        b_out: (E, O) or None.
        activation: Elementwise function; applied to the gate half when ``gated``.
        gated: Whether the hidden state is ``f(gate) * up``.
    """

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    activation: Activation
    gated: bool
    batched: ClassVar[bool] = False

    @property
    def num_experts(self) -> int:
        """E, the length of the stacks."""
        return self.w_in.shape[0]

    def feed_forward(self) -> FeedForward:
        """These weights, as of a bank."""
        return self

    def hidden(self, h: Tensor) -> Tensor:
        """Turn pre-activations (..., H) into what the second layer reads (..., F)."""
        if not self.gated:
            return self.activation.function(h)
        gate, up = h.chunk(2, dim=-1)
        return self.activation.function(gate) * up

    def grouped(self, x_MD: Tensor, counts: Sequence[int]) -> Tensor:
        """Apply expert e to its ``counts[e]`` rows of ``x_MD`` (M, D), sorted by expert; gives (M, O).

        The stacks are unbound once. Indexing ``w[e]`` in the loop would allocate a gradient of the whole stack for each
        expert in backward, which costs O(E^2 D F).
        """
        w_in, w_out = self.w_in.unbind(0), self.w_out.unbind(0)
        b_in = self.b_in.unbind(0) if self.b_in is not None else None
        b_out = self.b_out.unbind(0) if self.b_out is not None else None
        outputs = []
        for e, x_RD in _segments(x_MD, counts):
            h_RH = x_RD @ w_in[e] if b_in is None else torch.addmm(b_in[e], x_RD, w_in[e])
            a_RF = self.hidden(h_RH)
            outputs.append(a_RF @ w_out[e] if b_out is None else torch.addmm(b_out[e], a_RF, w_out[e]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def one(self, expert: int, x_ND: Tensor) -> Tensor:
        """Apply one expert to all rows, (N, D) -> (N, O)."""
        h_NH = _product(x_ND, self.w_in, self.b_in, expert)
        return _product(self.hidden(h_NH), self.w_out, self.b_out, expert)

    def split(self, first: int) -> tuple[FeedForward, FeedForward]:
        """Cut the bank in two, by reference: the first experts, and the others."""
        sizes = [first, self.w_in.shape[0] - first]
        stacks = [self.w_in, self.b_in, self.w_out, self.b_out]
        halves = [(None, None) if stack is None else stack.split(sizes) for stack in stacks]
        one, two = (replace(self, w_in=a, b_in=b, w_out=c, b_out=d) for a, b, c, d in zip(*halves, strict=True))
        return one, two

    def every(self, x: Tensor) -> Tensor:
        """Apply every expert to every row of ``x``, (N, D) or (E, N, D), by two batched products; gives (N, E, O)."""
        h_ENH = _batched(_expand(x, self.w_in.shape[0]), self.w_in, self.b_in)
        return _batched(self.hidden(h_ENH), self.w_out, self.b_out).transpose(0, 1)


def counts_on_host(counts: Sequence[int] | Tensor) -> Sequence[int]:
    """Counts as plain integers."""
    return counts.tolist() if isinstance(counts, Tensor) else counts


def _segments(x_MD: Tensor, counts: Sequence[int]) -> list[tuple[int, Tensor]]:
    """(expert, its rows) of every busy expert; expert 0 with no rows when all are idle, so that gradients exist."""
    if not any(counts):
        return [(0, x_MD)]
    return [(e, x_RD) for e, x_RD in enumerate(x_MD.split(list(counts))) if counts[e]]


def _product(x_NI: Tensor, w: Tensor, b: Tensor | None, expert: int) -> Tensor:
    return x_NI @ w[expert] if b is None else torch.addmm(b[expert], x_NI, w[expert])


def _expand(x: Tensor, num_experts: int) -> Tensor:
    """(N, D) seen by all experts, or (E, N, D) as it is, as (E, N, D) without a copy."""
    return x if x.dim() == 3 else x.expand(num_experts, *x.shape)


def _batched(x_END: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x[e] @ weight[e] + bias[e]`` for every expert."""
    if bias is None:
        return torch.bmm(x_END, weight)
    return torch.baddbmm(bias.unsqueeze(1), x_END, weight)
