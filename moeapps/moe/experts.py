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
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from moeapps.moe.activation import Activation, ActivationName, resolve_activation


@dataclass(frozen=True)
class FeedForward:
    """The stacked weights of a two-layer bank, all that a fast backend has to know.

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


@dataclass(frozen=True)
class BankPart:
    """Some experts of a stacked bank, by reference: what a backend needs of a bank.

    Attributes:
        ffn: their weights, a slice of the bank's.
    """

    ffn: FeedForward

    @property
    def num_experts(self) -> int:
        """Experts of the part."""
        return self.ffn.w_in.shape[0]

    def feed_forward(self) -> FeedForward:
        """The weights."""
        return self.ffn

    def grouped(self, x_MD: Tensor, counts: Sequence[int] | Tensor, *side: Tensor) -> Tensor:
        """Apply each expert to its own rows; see ``Experts.grouped``."""
        return self.ffn.grouped(x_MD, _host(counts))

    def every(self, x: Tensor, *side: Tensor) -> Tensor:
        """Apply every expert to every row; see ``Experts.every``."""
        return self.ffn.every(x)


class Experts(nn.Module):
    """E experts behind one interface; subclasses say what an expert is.

    Attributes:
        num_experts: E.
        in_dim: Width of a row that goes in.
        out_dim: Width of a row that comes out.
        supports_grouped: False where an expert must see all rows (batch statistics); such a bank needs a dense router.

    Example:
        >>> isinstance(MLPExperts(4, dim=8, hidden_dim=16), Experts)
        True
    """

    supports_grouped: ClassVar[bool] = True

    def __init__(self, num_experts: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("in_dim", in_dim), ("out_dim", out_dim)):
            if value < 1:
                raise ValueError(f"{name}={value}, but it must be at least 1.")
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

    def extra_repr(self) -> str:
        """Sizes that the printed module shows."""
        return f"num_experts={self.num_experts}, in_dim={self.in_dim}, out_dim={self.out_dim}"


class _StackedExperts(Experts):
    """Two-layer experts whose weights are stacked as (E, in, out): ``y = f(x W_in + b_in) W_out + b_out``."""

    b_in: nn.Parameter | None
    b_out: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        out_dim: int | None,
        activation: ActivationName | nn.Module,
        bias: bool,
        gated: bool,
    ) -> None:
        super().__init__(num_experts, dim, dim if out_dim is None else out_dim)
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim={hidden_dim}, but it must be at least 1.")
        self.hidden_dim = hidden_dim
        self.gated = gated
        resolve_activation(activation)
        self.activation = activation
        width = 2 * hidden_dim if gated else hidden_dim
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

    def feed_forward(self) -> FeedForward:
        """The stacked weights with the activation."""
        activation = resolve_activation(self.activation)
        return FeedForward(self.w_in, self.b_in, self.w_out, self.b_out, activation, self.gated)

    def grouped(self, x_MD: Tensor, counts: Sequence[int] | Tensor, *side: Tensor) -> Tensor:
        """Apply each expert to its own rows; see ``Experts.grouped``."""
        _no_side(self, side)
        return self.feed_forward().grouped(x_MD, _host(counts))

    def every(self, x: Tensor, *side: Tensor) -> Tensor:
        """Apply every expert to every row; see ``Experts.every``."""
        _no_side(self, side)
        return self.feed_forward().every(x)

    def extra_repr(self) -> str:
        """Sizes and kind that the printed module shows."""
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
        super().__init__(num_experts, dim, hidden_dim, out_dim=out_dim, activation=activation, bias=bias, gated=False)


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
        super().__init__(num_experts, dim, hidden_dim, out_dim=out_dim, activation=activation, bias=bias, gated=True)


class ModuleExperts(Experts):
    """Experts that are modules of any kind, unlike each other if need be (vector fields, frozen specialists).

    Each module maps a row tensor (R, ...) and its side inputs (R, ...) to (R, O).

    Args:
        modules: The experts. The same object may not appear twice.
        in_dim: Width of a row; None takes it from the first ``nn.Linear`` of the first expert.
        out_dim: Width of an output row; None takes it from the last ``nn.Linear`` of the first expert.
        row_dims: Dimensions of one row: 1 for vectors, 3 for images.
        flops_per_row: Forward operations of one expert on one row; None counts the ``nn.Linear`` layers, two per
            weight, averaged over the experts.

    Raises:
        ValueError: If the list is empty, an expert appears twice, or a width is neither given nor found.

    Example:
        >>> experts = ModuleExperts([nn.Linear(8, 6), nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 6))])
        >>> experts.every(torch.zeros(5, 8)).shape
        torch.Size([5, 2, 6])
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        in_dim: int | None = None,
        out_dim: int | None = None,
        row_dims: int = 1,
        flops_per_row: int | None = None,
    ) -> None:
        if not modules:
            raise ValueError("ModuleExperts got an empty list; give it at least one module.")
        if len({id(m) for m in modules}) != len(modules):
            raise ValueError("ModuleExperts got the same module twice; give each expert a module of its own (copy it).")
        linears = [m for m in modules[0].modules() if isinstance(m, nn.Linear)]
        if (in_dim is None or out_dim is None) and not linears:
            raise ValueError("the experts have no nn.Linear to read their widths from; pass in_dim and out_dim.")
        super().__init__(
            len(modules),
            linears[0].in_features if in_dim is None else in_dim,
            linears[-1].out_features if out_dim is None else out_dim,
        )
        self.experts = nn.ModuleList(modules)
        self.row_dims = row_dims
        self._flops_per_row = flops_per_row

    @property
    def flops_per_row(self) -> int:
        """Forward operations on one row, as given, or counted over the linear layers and averaged over the experts."""
        if self._flops_per_row is not None:
            return self._flops_per_row
        weights = sum(m.weight.numel() for m in self.experts.modules() if isinstance(m, nn.Linear))
        return 2 * weights // self.num_experts

    def reset_parameters(self) -> None:
        """Call ``reset_parameters`` of every submodule that has it."""
        for module in self.experts.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def grouped(self, x_MD: Tensor, counts: Sequence[int] | Tensor, *side: Tensor) -> Tensor:
        """Apply each expert to its own rows; see ``Experts.grouped``.

        An expert without rows is not called (many networks refuse an empty batch), yet its parameters get gradients
        that are exactly zero, as those of a stacked bank do.
        """
        counts = _host(counts)
        outputs = []
        start = 0
        for expert, count in zip(self.experts, counts, strict=True):
            rows = slice(start, start + count)
            start += count
            if count:
                outputs.append(expert(x_MD[rows], *(s[rows] for s in side)))
        y_MO = torch.cat(outputs) if outputs else x_MD.new_zeros(0, self.out_dim)
        idle = [e for e, count in zip(self.experts, counts, strict=True) if not count]
        return _with_zero_gradients(y_MO, idle)

    def every(self, x: Tensor, *side: Tensor) -> Tensor:
        """Apply every expert to every row; see ``Experts.every``. Rows have ``row_dims`` dimensions."""
        own_view = x.dim() == self.row_dims + 2
        return torch.stack([m(x[e] if own_view else x, *side) for e, m in enumerate(self.experts)], dim=1)

    def _keep(self, ids: list[int]) -> None:
        self.experts = nn.ModuleList([copy.deepcopy(self.experts[i]) for i in ids])


def _with_zero_gradients(y: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """Connect the parameters of idle modules to ``y`` through empty sums, whose gradient is exactly zero."""
    idle = [p.reshape(-1)[:0].sum().to(y.dtype) for m in modules for p in m.parameters() if p.requires_grad]
    return y + torch.stack(idle).sum() if idle else y


def _segments(x_MD: Tensor, counts: Sequence[int]) -> list[tuple[int, Tensor]]:
    """(expert, its rows) of every busy expert; expert 0 with no rows when all are idle, so that gradients exist."""
    if not any(counts):
        return [(0, x_MD)]
    return [(e, x_RD) for e, x_RD in enumerate(x_MD.split(list(counts))) if counts[e]]


def _product(x_NI: Tensor, w: Tensor, b: Tensor | None, expert: int) -> Tensor:
    return x_NI @ w[expert] if b is None else torch.addmm(b[expert], x_NI, w[expert])


def _host(counts: Sequence[int] | Tensor) -> Sequence[int]:
    return counts.tolist() if isinstance(counts, Tensor) else counts


def _expand(x: Tensor, num_experts: int) -> Tensor:
    """(N, D) seen by all experts, or (E, N, D) as it is, as (E, N, D) without a copy."""
    return x if x.dim() == 3 else x.expand(num_experts, *x.shape)


def _batched(x_END: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x[e] @ weight[e] + bias[e]`` for every expert."""
    if bias is None:
        return torch.bmm(x_END, weight)
    return torch.baddbmm(bias.unsqueeze(1), x_END, weight)


def _no_side(experts: Experts, side: tuple[Tensor, ...]) -> None:
    if side:
        raise ValueError(
            f"{type(experts).__name__} take no side inputs, but {len(side)} came; concatenate them to x and widen dim, "
            "or use ModuleExperts, whose modules receive them."
        )
