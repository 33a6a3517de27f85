# SPDX-License-Identifier: Apache-2.0
"""Banks of vector fields whose weights are no function of the context: NCF, and perceptrons without a context.

Shape letters: E experts, M rows sorted by expert, C rows of one expert (padded), D state size, m context numbers that
an expert reads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.dynamics.nets.experts.base import MetaExperts, layer_sizes


class NCFExperts(MetaExperts):
    r"""Neural context flows: a context net and a data net, joined by a main net.

    :math:`f(x, c) = main([data(x), ctx(c)])`; every activation is :math:`h\,\sigma(\beta h)` with a learned
    :math:`\beta`. Contextual self-modulation is not here but around it, in ``tasks.dynamics.nets.modulation``.

    Args:
        state_dim: D.
        num_experts: E.
        context_dim: whole width of a context.
        intermediate: width of what the two nets hand to the main net.
        width: hidden width of the main net.
        depth: hidden layers of the main net.
        options: how contexts are read and experts start, see :class:`MetaExperts`.

    Source: NCF (Nzoyem et al. 2025) as in MixER (docs/papers/mixer.md, equation 4), ddrous/MixER ``mixer/learner.py``;
    the single hidden layers of the two small nets are as wide as the geometric mean of their ends without its fraction,
    then rounded up to even, as there.

    Example:
        >>> NCFExperts(2, 2, 8).every(torch.zeros(5, 2), torch.zeros(5, 8)).shape
        torch.Size([5, 2, 2])
    """

    def __init__(
        self,
        state_dim: int,
        num_experts: int,
        context_dim: int,
        *,
        intermediate: int = 16,
        width: int = 24,
        depth: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(state_dim, num_experts, context_dim, **options)
        if intermediate < 1:
            raise ValueError(f"intermediate={intermediate}, but the two nets must hand over at least one number")
        ends = {"ctx": self.piece_dim, "data": state_dim}
        self.nets = {
            name: layer_sizes(n, 2 * math.ceil(int(n * math.exp(math.log(intermediate / n) / 2)) / 2), 2, intermediate)
            for name, n in ends.items()
        }
        self.nets["main"] = layer_sizes(2 * intermediate, width, depth + 1, state_dim)
        for name, sizes in self.nets.items():
            for i, (n_in, n_out) in enumerate(sizes):
                setattr(self, f"{name}_weight{i}", nn.Parameter(torch.empty(num_experts, n_in, n_out)))
                setattr(self, f"{name}_bias{i}", nn.Parameter(torch.empty(num_experts, 1, n_out)))
                if i + 1 < len(sizes):
                    setattr(self, f"{name}_beta{i}", nn.Parameter(torch.empty(num_experts, 1, 1)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Layers as ``nn.Linear``; every beta from U(0.01, 1)."""
        p = self.stacks()
        for name, sizes in self.nets.items():
            for i, (n_in, _) in enumerate(sizes):
                for part in ("weight", "bias"):
                    self.uniform(p[f"{name}_{part}{i}"], 1 / math.sqrt(n_in))
                beta = p.get(f"{name}_beta{i}")
                if beta is not None:
                    self.uniform(beta, 0.495)
                    beta.data += 0.505
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    @property
    def flops_per_row(self) -> int:
        """Forward operations of one expert on one row."""
        return sum(2 * n_in * n_out for sizes in self.nets.values() for n_in, n_out in sizes)

    def compute(self, p: dict[str, Tensor], x_ECD: Tensor, piece_ECm: Tensor) -> Tensor:
        """The three nets of all blocks."""
        both = torch.cat([self._net(p, "data", x_ECD), self._net(p, "ctx", piece_ECm)], -1)
        return self._net(p, "main", both)

    def _net(self, p: dict[str, Tensor], name: str, h: Tensor) -> Tensor:
        for i in range(len(self.nets[name])):
            h = torch.baddbmm(p[f"{name}_bias{i}"], h, p[f"{name}_weight{i}"])
            beta = p.get(f"{name}_beta{i}")
            if beta is not None:
                h = h * torch.sigmoid(beta * h)
        return h


class PlainExperts(MetaExperts):
    """Perceptrons that read no context: the baselines without one, and one model per environment.

    Args:
        state_dim: D.
        num_experts: E.
        context_dim: width of the contexts that come and are not read.
        width: hidden width.
        depth: linear layers.
        same_init: see :class:`MetaExperts`.

    Example:
        >>> PlainExperts(2, 3, 1).every(torch.zeros(5, 2), torch.zeros(5, 1)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        state_dim: int,
        num_experts: int,
        context_dim: int,
        *,
        width: int = 24,
        depth: int = 3,
        same_init: bool = True,
    ) -> None:
        super().__init__(
            state_dim, num_experts, context_dim, split_context=False, shift_context=False, same_init=same_init
        )
        self.sizes = layer_sizes(state_dim, width, depth, state_dim)
        for i, (n_in, n_out) in enumerate(self.sizes):
            setattr(self, f"weight{i}", nn.Parameter(torch.empty(num_experts, n_in, n_out)))
            setattr(self, f"bias{i}", nn.Parameter(torch.empty(num_experts, 1, n_out)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Layers as ``nn.Linear``."""
        for i, (n_in, _) in enumerate(self.sizes):
            for name in ("weight", "bias"):
                self.uniform(self.stacks()[f"{name}{i}"], 1 / math.sqrt(n_in))

    @property
    def flops_per_row(self) -> int:
        """Forward operations of one expert on one row."""
        return sum(2 * n_in * n_out for n_in, n_out in self.sizes)

    def compute(self, p: dict[str, Tensor], x_ECD: Tensor, piece_ECm: Tensor) -> Tensor:
        """The perceptrons of all blocks."""
        h = x_ECD
        for i in range(len(self.sizes)):
            h = torch.baddbmm(p[f"bias{i}"], h, p[f"weight{i}"])
            if i + 1 < len(self.sizes):
                h = F.silu(h)
        return h
