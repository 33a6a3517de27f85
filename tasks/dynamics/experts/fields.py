# SPDX-License-Identifier: Apache-2.0
"""Banks of vector fields: GEPS, CoDA, NCF, and perceptrons without a context.

Shape letters: K experts, M rows sorted by expert, C rows of one expert (padded), D state size, m context numbers that
an expert reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.dynamics.experts.base import MetaExperts, layer_sizes


class GEPSExperts(MetaExperts):
    r"""Perceptrons with low-rank adaptation to the context, :math:`h' = \sigma(h (W + A\,diag(c)\,B)^T + b + A_b c)`.

    Computed per row as :math:`x W + (x B \odot c) A + c A_b`, so that one product serves all environments of an expert.
    All layers but the last end in SiLU (which activation the published code uses is not on the card).

    Args:
        state_dim: D.
        num_experts: K.
        context_dim: whole width of a context.
        width: hidden width.
        depth: linear layers.
        split_context: see :class:`MetaExperts`.
        shift_context: see :class:`MetaExperts`.
        same_init: see :class:`MetaExperts`.

    Source: GEPS (Koupaï et al. 2024) as in MixER (mixer-dsr card 2.2 c).

    Example:
        >>> bank = GEPSExperts(2, 4, 16, width=24)
        >>> bank.grouped(torch.zeros(5, 2), [2, 0, 3, 0], torch.zeros(5, 16)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        state_dim: int,
        num_experts: int,
        context_dim: int,
        *,
        width: int = 24,
        depth: int = 3,
        split_context: bool = True,
        shift_context: bool = True,
        same_init: bool = True,
    ) -> None:
        super().__init__(
            state_dim,
            num_experts,
            context_dim,
            split_context=split_context,
            shift_context=shift_context,
            same_init=same_init,
        )
        self.sizes = layer_sizes(state_dim, width, depth, state_dim)
        K, m = num_experts, self.piece_dim
        for i, (n_in, n_out) in enumerate(self.sizes):
            setattr(self, f"root{i}", nn.Parameter(torch.empty(K, n_in, n_out)))  # W
            setattr(self, f"bias{i}", nn.Parameter(torch.empty(K, 1, n_out)))  # b
            setattr(self, f"down{i}", nn.Parameter(torch.empty(K, n_in, m)))  # B
            setattr(self, f"up{i}", nn.Parameter(torch.empty(K, 2 * m, n_out)))  # A over A_b
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W and b as ``nn.Linear``; B, A and A_b from U(+-1/sqrt(rows)) in the published orientation (in, m, m)."""
        p = self.stacks()
        for i, (n_in, _) in enumerate(self.sizes):
            for name, rows in (("root", n_in), ("bias", n_in), ("down", n_in), ("up", self.piece_dim)):
                self.uniform(p[f"{name}{i}"], 1 / math.sqrt(rows))
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    @property
    def flops_per_row(self) -> int:
        """Forward operations of one expert on one row."""
        m = self.piece_dim
        return sum(2 * (n_in * n_out + n_in * m + 2 * m * n_out) for n_in, n_out in self.sizes)

    def bind(self, context_Ec: Tensor, expert_E: Tensor, weight_E: Tensor) -> Callable[[Tensor], Tensor]:
        """A perceptron per environment, the context multiplied into its weights; see :meth:`MetaExperts.bind`."""
        piece_E1m = self._piece(context_Ec, expert_E)[:, None]
        layers = []
        for i in range(len(self.sizes)):
            root, down, up, bias = (
                self.stacks()[f"{name}{i}"].index_select(0, expert_E) for name in ("root", "down", "up", "bias")
            )
            adapt, lift = up.chunk(2, 1)
            layers.append((torch.baddbmm(root, down * piece_E1m, adapt), torch.baddbmm(bias, piece_E1m, lift)))
        return _perceptron(layers, weight_E)

    def compute(self, p: dict[str, Tensor], x_KCD: Tensor, piece_KCm: Tensor) -> Tensor:
        """The perceptrons of all blocks."""
        h = x_KCD
        for i, (_, n_out) in enumerate(self.sizes):
            root, down, up, bias = (p[f"{name}{i}"] for name in ("root", "down", "up", "bias"))
            both = h @ torch.cat([root, down], -1)  # (K, C, out + m)
            code = torch.cat([both[..., n_out:] * piece_KCm, piece_KCm], -1)  # (K, C, 2m)
            h = torch.baddbmm(both[..., :n_out] + bias, code, up)
            if i + 1 < len(self.sizes):
                h = F.silu(h)
        return h


class CoDAExperts(MetaExperts):
    r"""Perceptrons whose weights are an affine function of the context, :math:`\theta = \theta_0 + V c`.

    Computed per row: :math:`x W(c) = x W_0 + \sum_j c_j\, x V_j`. All layers but the last end in SiLU.

    Args:
        state_dim: D.
        num_experts: K.
        context_dim: whole width of a context.
        width: hidden width.
        depth: linear layers.
        split_context: see :class:`MetaExperts`.
        shift_context: see :class:`MetaExperts`.
        same_init: see :class:`MetaExperts`.

    Source: CoDA (Kirchmeyer et al. 2022) as in MixER (mixer-dsr card 2.2 b).

    Example:
        >>> CoDAExperts(2, 1, 3).every(torch.zeros(5, 2), torch.zeros(5, 3)).shape
        torch.Size([5, 1, 2])
    """

    def __init__(
        self,
        state_dim: int,
        num_experts: int,
        context_dim: int,
        *,
        width: int = 24,
        depth: int = 3,
        split_context: bool = True,
        shift_context: bool = True,
        same_init: bool = True,
    ) -> None:
        super().__init__(
            state_dim,
            num_experts,
            context_dim,
            split_context=split_context,
            shift_context=shift_context,
            same_init=same_init,
        )
        self.sizes = layer_sizes(state_dim, width, depth, state_dim)
        for i, (n_in, n_out) in enumerate(self.sizes):
            # Row 0 is theta_0, rows 1..m are V; the inputs of a layer are [x, 1], so its last row is the bias.
            setattr(
                self,
                f"weight{i}",
                nn.Parameter(torch.empty(num_experts, (1 + self.piece_dim) * (n_in + 1), n_out)),
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """theta_0 as ``nn.Linear``; V as a bias-free ``nn.Linear`` of the context, U(+-1/sqrt(m))."""
        for i, (n_in, _) in enumerate(self.sizes):
            weight = self.stacks()[f"weight{i}"]
            self.uniform(weight[:, : n_in + 1], 1 / math.sqrt(n_in))
            self.uniform(weight[:, n_in + 1 :], 1 / math.sqrt(self.piece_dim))
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    @property
    def flops_per_row(self) -> int:
        """Forward operations of one expert on one row."""
        return sum(2 * (1 + self.piece_dim) * (n_in + 1) * n_out for n_in, n_out in self.sizes)

    def bind(self, context_Ec: Tensor, expert_E: Tensor, weight_E: Tensor) -> Callable[[Tensor], Tensor]:
        """A perceptron per environment with the weights of its context; see :meth:`MetaExperts.bind`."""
        factor_Ef = F.pad(self._piece(context_Ec, expert_E), (1, 0), value=1.0)
        layers = []
        for i, (n_in, n_out) in enumerate(self.sizes):
            own = self.stacks()[f"weight{i}"].index_select(0, expert_E)
            whole = torch.einsum("ef,efio->eio", factor_Ef, own.view(len(own), -1, n_in + 1, n_out))
            layers.append((whole[:, :n_in], whole[:, n_in:]))
        return _perceptron(layers, weight_E)

    def compute(self, p: dict[str, Tensor], x_KCD: Tensor, piece_KCm: Tensor) -> Tensor:
        """The perceptrons of all blocks."""
        h = x_KCD
        one = torch.ones_like(h[..., :1])
        factor = torch.cat([one, piece_KCm], -1).unsqueeze(-1)  # (K, C, 1 + m, 1)
        for i in range(len(self.sizes)):
            inputs = (factor * torch.cat([h, one], -1).unsqueeze(-2)).flatten(-2)  # (K, C, (1 + m)(in + 1))
            h = inputs @ p[f"weight{i}"]
            if i + 1 < len(self.sizes):
                h = F.silu(h)
        return h


class NCFExperts(MetaExperts):
    r"""Neural context flows: a context net and a data net, joined by a main net.

    :math:`f(x, c) = main([data(x), ctx(c)])`; every activation is :math:`h\,\sigma(\beta h)` with a learned
    :math:`\beta`. Contextual self-modulation is not here but around it, in ``tasks.dynamics.modulation``.

    Args:
        state_dim: D.
        num_experts: K.
        context_dim: whole width of a context.
        intermediate: width of what the two nets hand to the main net.
        width: hidden width of the main net.
        depth: hidden layers of the main net.
        split_context: see :class:`MetaExperts`.
        shift_context: see :class:`MetaExperts`.
        same_init: see :class:`MetaExperts`.

    Source: NCF (Nzoyem et al. 2025) as in MixER (mixer-dsr card 2.2 a); the widths of the two small nets' single hidden
    layer are the geometric mean of their ends, rounded up to even.

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
        split_context: bool = True,
        shift_context: bool = True,
        same_init: bool = True,
    ) -> None:
        super().__init__(
            state_dim,
            num_experts,
            context_dim,
            split_context=split_context,
            shift_context=shift_context,
            same_init=same_init,
        )
        if intermediate < 1:
            raise ValueError(f"intermediate={intermediate}, but the two nets must hand over at least one number")
        ends = {"ctx": self.piece_dim, "data": state_dim}
        self.nets = {
            name: layer_sizes(n, 2 * math.ceil(math.sqrt(n * intermediate) / 2), 2, intermediate)
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

    def compute(self, p: dict[str, Tensor], x_KCD: Tensor, piece_KCm: Tensor) -> Tensor:
        """The three nets of all blocks."""
        both = torch.cat([self._net(p, "data", x_KCD), self._net(p, "ctx", piece_KCm)], -1)
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
        num_experts: K.
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

    def compute(self, p: dict[str, Tensor], x_KCD: Tensor, piece_KCm: Tensor) -> Tensor:
        """The perceptrons of all blocks."""
        h = x_KCD
        for i in range(len(self.sizes)):
            h = torch.baddbmm(p[f"bias{i}"], h, p[f"weight{i}"])
            if i + 1 < len(self.sizes):
                h = F.silu(h)
        return h


def _perceptron(layers: list[tuple[Tensor, Tensor]], weight_E: Tensor) -> Callable[[Tensor], Tensor]:
    """Perceptrons with weights [E, in, out] and biases [E, 1, out]; the last layer takes the factor of the output."""
    weight_E11 = weight_E[:, None, None]
    last = [part * weight_E11 for part in layers[-1]]

    def apply(x_ERD: Tensor) -> Tensor:
        h = x_ERD
        for weight, bias in layers[:-1]:
            h = F.silu(torch.baddbmm(bias, h, weight))
        return torch.baddbmm(last[1], h, last[0])

    return apply
