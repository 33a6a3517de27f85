# SPDX-License-Identifier: Apache-2.0
"""Banks of experts: E networks of one interface, with stacked weights where they are alike.

A bank can be applied in two ways. ``grouped`` takes rows sorted by expert and how many belong to each; ``every`` gives
every row to every expert. Both are differentiable any number of times; the faster forms live in ``backends``.

Shape legend: N rows, M rows sorted by expert, R rows of one expert, D input width, F hidden width, O output width,
H = F, or 2F when gated, E experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.activation import ActivationName, resolve_activation
from moeapps.moe.counts import at_least_one
from moeapps.moe.feed_forward import FeedForward, counts_on_host


class Experts(nn.Module):
    """E experts behind one interface; subclasses say what an expert is.

    Attributes:
        num_experts: E.
        in_dim: Width of a row that goes in.
        out_dim: Width of a row that comes out.
        supports_grouped: False where an expert must see all rows (batch statistics); such a bank needs a dense router.
        batched: True where ``every`` is a few batched products of small experts. A compiled graph, which cannot cut
            rows by data, then runs every expert on every row; where it is False the graph breaks at the dispatch.
        row_dims: Dimensions of one row: 1 for vectors, 3 for images.

    Example:
        >>> isinstance(MLPExperts(4, dim=8, hidden_dim=16), Experts)
        True
    """

    supports_grouped: ClassVar[bool] = True
    batched: ClassVar[bool] = False
    row_dims: int = 1

    def __init__(self, num_experts: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        at_least_one(num_experts=num_experts, in_dim=in_dim, out_dim=out_dim)
        self.num_experts = num_experts
        self.in_dim = in_dim
        self.out_dim = out_dim

    @property
    def flops_per_row(self) -> int:
        """Forward operations of one expert on one row: two per multiply-add of a matrix, nothing else counted."""
        raise NotImplementedError

    def grouped(self, x_MD: Tensor, counts: Sequence[int] | Tensor, *side: Tensor) -> Tensor:
        """Apply each expert to its own rows.

        Args:
            x_MD: Rows sorted by expert (M, D).
            counts: E integers that sum to M: rows of expert 0, of expert 1, ...
            side: Further inputs, one row per row of ``x_MD``.

        Returns:
            Outputs in the same order, (M, O).
        """
        raise NotImplementedError

    def every(self, x: Tensor, *side: Tensor) -> Tensor:
        """Apply every expert to every row.

        Args:
            x: (N, D), or (E, N, D) when each expert has its own view of the rows.
            side: Further inputs, one row per row n.

        Returns:
            (N, E, O).
        """
        raise NotImplementedError

    def every_counted(self, x: Tensor, token_mask: Tensor, *side: Tensor) -> Tensor:
        """As ``every`` where only some rows count, bool [N]; what comes out of the others is not used.

        A bank whose experts see all rows (batch statistics) overrides this and leaves the others out.
        """
        return self.every(x, *side)

    def feed_forward(self) -> FeedForward | None:
        """The stacked weights, or None where the experts are not a stacked two-layer network."""
        return None

    def select(self, ids: Iterable[int]) -> Experts:
        """Copy the named experts, in the order given, into a new bank.

        Args:
            ids: Expert ids; an id may appear twice.

        Raises:
            ValueError: If no id is given or one is out of range.
        """
        chosen = [int(i) for i in ids]
        wrong = [i for i in chosen if not 0 <= i < self.num_experts]
        if wrong or not chosen:
            raise ValueError(f"ids={chosen}, but select takes at least one id, each from 0 to {self.num_experts - 1}.")
        clone = copy.deepcopy(self)
        clone.num_experts = len(chosen)
        clone._keep(chosen)
        return clone

    def reset_parameters(self) -> None:
        """Draw the initial weights again."""
        raise NotImplementedError

    def _keep(self, ids: list[int]) -> None:
        """Keep the rows ``ids`` of every stacked parameter and buffer of this module itself."""
        for name, parameter in list(self._parameters.items()):
            if parameter is not None:
                kept = parameter.detach()[ids].clone()
                self._parameters[name] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
        for name, buffer in list(self._buffers.items()):
            if buffer is not None and buffer.dim() > 0:
                self._buffers[name] = buffer[ids].clone()

    @override
    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, in_dim={self.in_dim}, out_dim={self.out_dim}"


class _StackedExperts(Experts):
    """Two-layer experts whose weights are stacked as (E, in, out): ``y = f(x W_in + b_in) W_out + b_out``."""

    gated: ClassVar[bool]
    b_in: nn.Parameter | None
    b_out: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        out_dim: int | None = None,
        activation: ActivationName | nn.Module = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__(num_experts, dim, dim if out_dim is None else out_dim)
        at_least_one(hidden_dim=hidden_dim)
        self.hidden_dim = hidden_dim
        resolve_activation(activation)
        self.activation = activation
        width = 2 * hidden_dim if self.gated else hidden_dim
        self.w_in = nn.Parameter(torch.empty(num_experts, dim, width))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden_dim, self.out_dim))
        self.register_parameter("b_in", nn.Parameter(torch.empty(num_experts, width)) if bias else None)
        self.register_parameter("b_out", nn.Parameter(torch.empty(num_experts, self.out_dim)) if bias else None)
        self.reset_parameters()

    @property
    def flops_per_row(self) -> int:
        """Forward operations of one expert on one row, ``2 (D H + F O)``."""
        width = self.w_in.shape[2]
        return 2 * (self.in_dim * width + self.hidden_dim * self.out_dim)

    def reset_parameters(self) -> None:
        """Draw every expert as an ``nn.Linear`` of its own fan-in: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

        The bound comes from the fan-in of one expert; an initialiser that saw the three-dimensional stack would take
        the number of experts for a part of it.
        """
        for parameter, fan_in in (
            (self.w_in, self.in_dim),
            (self.b_in, self.in_dim),
            (self.w_out, self.hidden_dim),
            (self.b_out, self.hidden_dim),
        ):
            if parameter is not None:
                bound = 1 / math.sqrt(fan_in)
                nn.init.uniform_(parameter, -bound, bound)

    @override
    def feed_forward(self) -> FeedForward:
        activation = resolve_activation(self.activation)
        return FeedForward(self.w_in, self.b_in, self.w_out, self.b_out, activation, self.gated)

    @override
    def grouped(self, x_MD: Tensor, counts: Sequence[int] | Tensor, *side: Tensor) -> Tensor:
        _no_side(self, side)
        return self.feed_forward().grouped(x_MD, counts_on_host(counts))

    @override
    def every(self, x: Tensor, *side: Tensor) -> Tensor:
        _no_side(self, side)
        return self.feed_forward().every(x)

    @override
    def extra_repr(self) -> str:
        name = resolve_activation(self.activation).name
        bias = self.b_in is not None
        return f"{super().extra_repr()}, hidden_dim={self.hidden_dim}, activation={name}, bias={bias}"


class MLPExperts(_StackedExperts):
    r"""Two-layer perceptrons, ``E_e(x) = f(x W_in[e] + b_in[e]) W_out[e] + b_out[e]``.

    Args:
        num_experts: E, at least 1.
        dim: Width D of a row.
        hidden_dim: Hidden width F of one expert.
        out_dim: Output width O; None means D.
        activation: Name from the activation table, or an elementwise module (shared by all experts).
        bias: Whether both layers have a bias.

    Shape:
        ``w_in`` (E, D, F), ``b_in`` (E, F), ``w_out`` (E, F, O), ``b_out`` (E, O).

    Raises:
        ValueError: If a size is below 1 or the activation is unknown.

    Example:
        >>> experts = MLPExperts(4, dim=8, hidden_dim=16)
        >>> experts.every(torch.zeros(3, 8)).shape
        torch.Size([3, 4, 8])
    """

    gated: ClassVar[bool] = False


class GLUExperts(_StackedExperts):
    r"""Gated linear units, ``E_e(x) = (f(x W_gate[e]) * x W_up[e]) W_out[e]``, with gate and up in one stack.

    ``relu`` gives ReGLU, ``silu`` SwiGLU, ``gelu`` GEGLU.

    Args:
        num_experts: E, at least 1.
        dim: Width D of a row.
        hidden_dim: Hidden width F of one expert; the first layer is 2F wide.
        out_dim: Output width O; None means D.
        activation: Name from the activation table, or an elementwise module (shared by all experts).
        bias: Whether all layers have a bias.

    Shape:
        ``w_in`` (E, D, 2F) as gate | up, ``b_in`` (E, 2F), ``w_out`` (E, F, O), ``b_out`` (E, O).

    Raises:
        ValueError: If a size is below 1 or the activation is unknown.

    Source:
        N. Shazeer, "GLU Variants Improve Transformer", 2020.

    Example:
        >>> experts = GLUExperts(4, dim=8, hidden_dim=16)
        >>> experts.grouped(torch.zeros(3, 8), [0, 2, 0, 1]).shape
        torch.Size([3, 8])
    """

    gated: ClassVar[bool] = True

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        out_dim: int | None = None,
        activation: ActivationName | nn.Module = "silu",
        bias: bool = False,
    ) -> None:
        super().__init__(num_experts, dim, hidden_dim, out_dim=out_dim, activation=activation, bias=bias)


def _no_side(experts: Experts, side: tuple[Tensor, ...]) -> None:
    if side:
        raise ValueError(
            f"{type(experts).__name__} take no side inputs, but {len(side)} came; concatenate them to x and widen dim, "
            "or use ModuleExperts, whose modules receive them."
        )
