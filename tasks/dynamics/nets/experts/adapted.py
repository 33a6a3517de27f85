# SPDX-License-Identifier: Apache-2.0
"""Banks of vector fields whose weights follow the context: GEPS and CoDA.

Shape letters: E experts, C rows of one expert (padded), D state size, m context numbers that an expert reads, S
environments, A activations of a perceptron.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.dynamics.nets.experts.base import MetaExperts, layer_sizes

Activation = Literal["swish", "silu"]
Start = Literal["published", "fan_in"]


class AdaptedExperts(MetaExperts):
    r"""Base of perceptrons of which every number follows the context, the slopes of the activations included.

    All layers but the last end in :math:`h\,\sigma(\beta(c)\, h)`. With ``swish`` :math:`\beta_a(c) = \beta_a + s_a c`
    is learned like any weight, with ``silu`` it is 1.

    Args:
        state_dim: D.
        num_experts: E.
        context_dim: whole width of a context.
        width: hidden width.
        depth: linear layers.
        activation: ``swish`` (published) or ``silu``.
        options: how contexts are read and experts start, see :class:`MetaExperts`.

    Raises:
        ValueError: for another activation.
    """

    slope: nn.Parameter | None

    def __init__(
        self,
        state_dim: int,
        num_experts: int,
        context_dim: int,
        *,
        width: int = 24,
        depth: int = 3,
        activation: Activation = "swish",
        **options: Any,
    ) -> None:
        super().__init__(state_dim, num_experts, context_dim, **options)
        if activation not in get_args(Activation):
            raise ValueError(f"activation={activation!r}; use {' or '.join(get_args(Activation))}")
        self.sizes = layer_sizes(state_dim, width, depth, state_dim)
        learned = activation == "swish" and depth > 1
        # Row 0 is beta, rows 1..m are s; one column per activation.
        shape = (num_experts, 1 + self.piece_dim, depth - 1)
        self.register_parameter("slope", nn.Parameter(torch.empty(shape)) if learned else None)

    def reset_slopes(self, bound: float) -> None:
        """Beta from U(0.01, 1), the same for all activations of an expert; s from U(-bound, bound)."""
        if self.slope is None:
            return
        first = self.slope[:, :1, :1]
        self.uniform(first, 0.495)
        with torch.no_grad():
            self.slope[:, :1] = first + 0.505
        self.uniform(self.slope[:, 1:], bound)

    @property
    def slope_flops(self) -> int:
        """Forward operations of the slopes of one expert on one row."""
        return 0 if self.slope is None else 2 * self.piece_dim * self.slope.shape[2]


class GEPSExperts(AdaptedExperts):
    r"""Perceptrons with low-rank adaptation to the context, :math:`h' = \sigma(h (W + A\,diag(c)\,B)^T + b + A_b c)`.

    Computed per row as :math:`x W + (x B \odot c) A + c A_b`, so that one product serves all environments of an expert.

    Args:
        state_dim: D.
        num_experts: E.
        context_dim: whole width of a context.
        start: from where A, A_b and B are drawn, U(+-1/sqrt(n)): ``published``, n the outputs for A and A_b and m for
            B; ``fan_in``, n the inputs of each product (m for A and A_b, the layer's inputs for B).
        options: see :class:`AdaptedExperts`.

    Raises:
        ValueError: for another activation or start.

    Source: GEPS (Koupaï et al. 2024) as in MixER (docs/papers/mixer.md, equation 2), ddrous/MixER ``mixer/learner.py``;
        there A and B of a layer are cut from one draw, here each has its own.

    Example:
        >>> bank = GEPSExperts(2, 4, 16, width=24)
        >>> bank.grouped(torch.zeros(5, 2), [2, 0, 3, 0], torch.zeros(5, 16)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self, state_dim: int, num_experts: int, context_dim: int, *, start: Start = "published", **options: Any
    ) -> None:
        super().__init__(state_dim, num_experts, context_dim, **options)
        if start not in get_args(Start):
            raise ValueError(f"start={start!r}; use {' or '.join(get_args(Start))}")
        self.start = start
        E, m = num_experts, self.piece_dim
        for i, (n_in, n_out) in enumerate(self.sizes):
            setattr(self, f"root{i}", nn.Parameter(torch.empty(E, n_in, n_out)))  # W
            setattr(self, f"bias{i}", nn.Parameter(torch.empty(E, 1, n_out)))  # b
            setattr(self, f"down{i}", nn.Parameter(torch.empty(E, n_in, m)))  # B
            setattr(self, f"up{i}", nn.Parameter(torch.empty(E, 2 * m, n_out)))  # A over A_b
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W and b as ``nn.Linear``; B, A and A_b by ``start``; slopes."""
        p, m = self.stacks(), self.piece_dim
        for i, (n_in, n_out) in enumerate(self.sizes):
            down, up = (m, n_out) if self.start == "published" else (n_in, m)
            for name, rows in (("root", n_in), ("bias", n_in), ("down", down), ("up", up)):
                self.uniform(p[f"{name}{i}"], 1 / math.sqrt(rows))
        self.reset_slopes(1.0)  # as A_b of a layer with one output
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    @property
    def flops_per_row(self) -> int:
        """Forward operations of one expert on one row."""
        m = self.piece_dim
        layers = sum(2 * (n_in * n_out + n_in * m + 2 * m * n_out) for n_in, n_out in self.sizes)
        return layers + self.slope_flops

    def bind(self, context_Sc: Tensor, expert_S: Tensor, weight_S: Tensor) -> Callable[[Tensor], Tensor]:
        """A perceptron per environment, the context multiplied into its weights; see :meth:`MetaExperts.bind`."""
        piece_S1m = self._piece(context_Sc, expert_S)[:, None]
        layers = []
        for i in range(len(self.sizes)):
            root, down, up, bias = (
                self.stacks()[f"{name}{i}"].index_select(0, expert_S) for name in ("root", "down", "up", "bias")
            )
            adapt, lift = up.chunk(2, 1)
            layers.append((torch.baddbmm(root, down * piece_S1m, adapt), torch.baddbmm(bias, piece_S1m, lift)))
        return _perceptron(layers, weight_S, _slopes(self.slope, piece_S1m, expert_S))

    def compute(self, p: dict[str, Tensor], x_ECD: Tensor, piece_ECm: Tensor) -> Tensor:
        """The perceptrons of all blocks."""
        h, slopes = x_ECD, _slopes(p.get("slope"), piece_ECm)
        for i, (_, n_out) in enumerate(self.sizes):
            root, down, up, bias = (p[f"{name}{i}"] for name in ("root", "down", "up", "bias"))
            both = h @ torch.cat([root, down], -1)  # (E, C, out + m)
            code = torch.cat([both[..., n_out:] * piece_ECm, piece_ECm], -1)  # (E, C, 2m)
            h = torch.baddbmm(both[..., :n_out] + bias, code, up)
            if i + 1 < len(self.sizes):
                h = _swish(h, slopes, i)
        return h


class CoDAExperts(AdaptedExperts):
    r"""Perceptrons whose numbers are an affine function of the context, :math:`\theta = \theta_0 + V c`.

    Computed per row: :math:`x W(c) = x W_0 + \sum_j c_j\, x V_j`.

    Args:
        state_dim: D.
        num_experts: E.
        context_dim: whole width of a context.
        options: see :class:`AdaptedExperts`.

    Source: CoDA (Kirchmeyer et al. 2022) as in MixER (docs/papers/mixer.md, equation 3), ddrous/MixER
        ``mixer/learner.py``.

    Example:
        >>> CoDAExperts(2, 1, 3).every(torch.zeros(5, 2), torch.zeros(5, 3)).shape
        torch.Size([5, 1, 2])
    """

    def __init__(self, state_dim: int, num_experts: int, context_dim: int, **options: Any) -> None:
        super().__init__(state_dim, num_experts, context_dim, **options)
        for i, (n_in, n_out) in enumerate(self.sizes):
            # Row 0 is theta_0, rows 1..m are V; the inputs of a layer are [x, 1], so its last row is the bias.
            shape = (num_experts, (1 + self.piece_dim) * (n_in + 1), n_out)
            setattr(self, f"weight{i}", nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """theta_0 as ``nn.Linear``; V as a bias-free ``nn.Linear`` of the context, U(+-1/sqrt(m))."""
        for i, (n_in, _) in enumerate(self.sizes):
            weight = self.stacks()[f"weight{i}"]
            self.uniform(weight[:, : n_in + 1], 1 / math.sqrt(n_in))
            self.uniform(weight[:, n_in + 1 :], 1 / math.sqrt(self.piece_dim))
        self.reset_slopes(1 / math.sqrt(self.piece_dim))
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    @property
    def flops_per_row(self) -> int:
        """Forward operations of one expert on one row."""
        layers = sum(2 * (1 + self.piece_dim) * (n_in + 1) * n_out for n_in, n_out in self.sizes)
        return layers + self.slope_flops

    def bind(self, context_Sc: Tensor, expert_S: Tensor, weight_S: Tensor) -> Callable[[Tensor], Tensor]:
        """A perceptron per environment with the weights of its context; see :meth:`MetaExperts.bind`."""
        piece_Sm = self._piece(context_Sc, expert_S)
        factor_Sf = F.pad(piece_Sm, (1, 0), value=1.0)
        layers = []
        for i, (n_in, n_out) in enumerate(self.sizes):
            own = self.stacks()[f"weight{i}"].index_select(0, expert_S)
            whole = torch.einsum("sf,sfio->sio", factor_Sf, own.view(len(own), -1, n_in + 1, n_out))
            layers.append((whole[:, :n_in], whole[:, n_in:]))
        return _perceptron(layers, weight_S, _slopes(self.slope, piece_Sm[:, None], expert_S))

    def compute(self, p: dict[str, Tensor], x_ECD: Tensor, piece_ECm: Tensor) -> Tensor:
        """The perceptrons of all blocks."""
        h, slopes = x_ECD, _slopes(p.get("slope"), piece_ECm)
        one = torch.ones_like(h[..., :1])
        factor = torch.cat([one, piece_ECm], -1).unsqueeze(-1)  # (E, C, 1 + m, 1)
        for i in range(len(self.sizes)):
            inputs = (factor * torch.cat([h, one], -1).unsqueeze(-2)).flatten(-2)  # (E, C, (1 + m)(in + 1))
            h = inputs @ p[f"weight{i}"]
            if i + 1 < len(self.sizes):
                h = _swish(h, slopes, i)
        return h


def _slopes(slope: Tensor | None, piece_ECm: Tensor, expert_S: Tensor | None = None) -> Tensor | None:
    """Slopes of the activations, [E, C, A] for the context of every row; None where all are 1.

    Args:
        slope: [E, 1 + m, A].
        piece_ECm: what is read of the contexts.
        expert_S: whose slopes; None takes those of all, in order.
    """
    if slope is None:
        return None
    own = slope if expert_S is None else slope.index_select(0, expert_S)
    return torch.baddbmm(own[:, :1], piece_ECm, own[:, 1:])


def _swish(h: Tensor, slopes: Tensor | None, place: int) -> Tensor:
    """The activation number ``place``."""
    return F.silu(h) if slopes is None else h * torch.sigmoid(slopes[..., place : place + 1] * h)


def _perceptron(
    layers: list[tuple[Tensor, Tensor]], weight_S: Tensor, slopes_S1A: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Perceptrons with weights [S, in, out] and biases [S, 1, out]; the last layer takes the factor of the output."""
    weight_S11 = weight_S[:, None, None]
    last = [part * weight_S11 for part in layers[-1]]

    def apply(x_SRD: Tensor) -> Tensor:
        h = x_SRD
        for i, (weight, bias) in enumerate(layers[:-1]):
            h = _swish(torch.baddbmm(bias, h, weight), slopes_S1A, i)
        return torch.baddbmm(last[1], h, last[0])

    return apply
