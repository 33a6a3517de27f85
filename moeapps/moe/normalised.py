# SPDX-License-Identifier: Apache-2.0
"""Dense experts of multi-gate networks: all run on all rows, normalised at the output, each on a view of its own.

Shape legend: N rows, V views of the rows, D input width, F hidden width, O output width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeapps.moe.activation import ActivationName, resolve_activation
from moeapps.moe.derivatives import needs_operations
from moeapps.moe.experts import Experts
from moeapps.moe.fast.threads import is_observed
from moeapps.moe.view_linear import view_linear

Norm = Literal["batch", "layer", "none"]


class NormalisedExperts(Experts):
    r"""Experts with a normalisation of their own at the output, ``E_e(v) = f(norm_e(z))``, ``z = MLP_e(v)``.

    The statistics of ``batch`` are those of all rows of the batch, per expert and unit, so that the outputs of all
    experts have one scale and a gate can weigh them fairly. An expert must therefore see every row: only ``every`` is
    offered. Experts that read the same view share one matrix product.

    Args:
        num_experts: E, at least 1.
        dim: Width D of a row.
        out_dim: Output width O of one expert.
        hidden_dim: Width F of a hidden layer before the output layer; None means one linear layer.
        activation: f, after the normalisation; ``silu`` is the Swish of the paper.
        hidden_activation: Activation of the hidden layer, where there is one.
        norm: ``batch``; ``layer`` (over the O units of a row, as in some re-implementations); ``none``, plain experts
            with a bias, the ablation.
        reads: For each expert the view it reads; ``every`` then takes (V, N, D). None: all read (N, D), or each its own
            of (E, N, D).
        eps: Added to the variance.
        momentum: Share of the batch in the running statistics, in (0, 1].

    Shape:
        ``weight`` (E, D, O), or ``w_hidden`` (E, D, F) and ``weight`` (E, F, O); ``gamma``, ``beta`` and the running
        statistics (E, O). Without a norm ``beta`` is the bias and there is no ``gamma``.

    Raises:
        ValueError: If a size is below 1, an activation or norm is unknown, or ``reads`` does not fit.

    Source:
        X. Wang et al., "HoME: Hierarchy of Multi-Gate Experts", 2024: normalised experts with Swish. The order linear,
        normalisation, activation is the one of its re-implementations.

    Example:
        >>> NormalisedExperts(4, dim=8, out_dim=6).every(torch.randn(3, 8)).shape
        torch.Size([3, 4, 6])
    """

    supports_grouped: ClassVar[bool] = False
    w_hidden: nn.Parameter | None
    b_hidden: nn.Parameter | None
    gamma: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(
        self,
        num_experts: int,
        dim: int,
        out_dim: int,
        *,
        hidden_dim: int | None = None,
        activation: ActivationName | nn.Module = "silu",
        hidden_activation: ActivationName | nn.Module = "silu",
        norm: Norm = "batch",
        reads: Sequence[int] | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(num_experts, dim, out_dim)
        if norm not in ("batch", "layer", "none"):
            raise ValueError(f"norm={norm!r}; use batch, layer or none.")
        if reads is not None and (len(reads) != num_experts or min(reads) < 0):
            raise ValueError(f"reads={list(reads)}: give one view, 0 or more, for each of the {num_experts} experts.")
        self.hidden_dim = hidden_dim
        self.norm: Norm = norm
        self.reads = None if reads is None else tuple(reads)
        self.eps = eps
        self.momentum = momentum
        resolve_activation(activation)
        resolve_activation(hidden_activation)
        self.activation = activation
        self.hidden_activation = hidden_activation
        fan_in = dim
        self.register_parameter("w_hidden", None)
        self.register_parameter("b_hidden", None)
        if hidden_dim is not None:
            if hidden_dim < 1:
                raise ValueError(f"hidden_dim={hidden_dim}, but it must be at least 1, or None for one layer.")
            self.w_hidden = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
            self.b_hidden = nn.Parameter(torch.empty(num_experts, hidden_dim))
            fan_in = hidden_dim
        # A normalisation over the batch subtracts any bias of the layer before it, so that layer has none.
        self.weight = nn.Parameter(torch.empty(num_experts, fan_in, out_dim))
        self.register_parameter("gamma", None if norm == "none" else nn.Parameter(torch.empty(num_experts, out_dim)))
        self.beta = nn.Parameter(torch.empty(num_experts, out_dim))
        kept = norm == "batch"
        self.register_buffer("running_mean", torch.empty(num_experts, out_dim) if kept else None)
        self.register_buffer("running_var", torch.empty(num_experts, out_dim) if kept else None)
        self.reset_parameters()

    @property
    def flops_per_row(self) -> int:
        """Forward operations of the linear layers of one expert on one row."""
        if self.hidden_dim is None:
            return 2 * self.in_dim * self.out_dim
        return 2 * self.hidden_dim * (self.in_dim + self.out_dim)

    def reset_parameters(self) -> None:
        """Linear layers by their own fan-in; scale 1, shift 0; running mean 0 and variance 1."""
        drawn = [(self.w_hidden, self.in_dim), (self.b_hidden, self.in_dim), (self.weight, self.weight.shape[1])]
        nn.init.zeros_(self.beta)
        if self.norm == "none":
            drawn.append((self.beta, self.weight.shape[1]))
        for parameter, fan_in in drawn:
            if parameter is not None:
                bound = 1 / math.sqrt(fan_in)
                nn.init.uniform_(parameter, -bound, bound)
        if self.gamma is not None:
            nn.init.ones_(self.gamma)
        if self.running_mean is not None and self.running_var is not None:
            nn.init.zeros_(self.running_mean)
            nn.init.ones_(self.running_var)

    def grouped(self, x_MD: Tensor, counts: Sequence[int] | Tensor, *side: Tensor) -> Tensor:
        """Not offered: the statistics of an expert would depend on the routing."""
        raise ValueError(
            "NormalisedExperts normalise over all rows of the batch and cannot serve a sparse routing; "
            "use a Dense chooser (every expert runs on every row), or MLPExperts."
        )

    def every(self, x: Tensor, *side: Tensor) -> Tensor:
        """Apply every expert to every row; see ``Experts.every``. Uses running statistics in evaluation mode.

        Args:
            x: (N, D); (E, N, D), or (V, N, D) with ``reads``.
            side: none.

        Raises:
            ValueError: If fewer than two rows come in training mode with ``norm="batch"``.
        """
        if side:
            raise ValueError(
                f"NormalisedExperts take no side inputs, but {len(side)} came; concatenate them to x and widen dim."
            )
        if self.norm == "batch" and self.training and x.shape[-2] < 2:
            raise ValueError(
                f"NormalisedExperts got {x.shape[-2]} row(s) in training mode, but batch statistics need at "
                "least 2; use a larger batch, or call eval() to use the running statistics."
            )
        z_NED = view_linear(*self._first(x))
        if self.w_hidden is not None and self.b_hidden is not None:
            a_NEF = resolve_activation(self.hidden_activation).function(z_NED + self.b_hidden)
            z_NED = view_linear(a_NEF.transpose(0, 1), self.weight, range(self.num_experts))
        activation, normalised = resolve_activation(self.activation), self._normalised(z_NED)
        if activation.tabulated and self._may_overwrite():
            activation.forward_out(normalised, normalised)
            return normalised
        y: Tensor = activation.function(normalised)
        return y

    @staticmethod
    def _may_overwrite() -> bool:
        """Whether nobody differentiates or watches, so that a new tensor for every step would be waste."""
        return not (torch.is_grad_enabled() or needs_operations() or is_observed())

    def every_counted(self, x: Tensor, token_mask: Tensor, *side: Tensor) -> Tensor:
        """As ``every``, with batch statistics of the rows that count alone; the others come out as 0."""
        if self.norm != "batch" or not self.training:
            return self.every(x, *side)
        y_KEO = self.every(x[..., token_mask, :], *side)
        return y_KEO.new_zeros(x.shape[-2], *y_KEO.shape[1:]).index_put((token_mask,), y_KEO)

    def _first(self, x: Tensor) -> tuple[Tensor, Tensor, Sequence[int]]:
        """Views, first matrices, and which view each expert reads."""
        weight = self.weight if self.w_hidden is None else self.w_hidden
        if x.dim() == 2:
            return x.unsqueeze(0), weight, (0,) * self.num_experts
        reads = tuple(range(self.num_experts)) if self.reads is None else self.reads
        if max(reads) >= x.shape[0]:
            raise ValueError(f"x holds {x.shape[0]} views, but experts read view {max(reads)}; see 'reads'.")
        return x, weight, reads

    def _normalised(self, z_NEO: Tensor) -> Tensor:
        if self.norm == "none" or self.gamma is None:
            return z_NEO + self.beta
        if self.norm == "layer":
            return F.layer_norm(z_NEO, z_NEO.shape[-1:], eps=self.eps) * self.gamma + self.beta
        assert self.running_mean is not None
        assert self.running_var is not None
        if not self.training and z_NEO.dtype == self.gamma.dtype and self._may_overwrite():
            scale_EO = self.gamma * (self.running_var + self.eps).rsqrt()
            return torch.addcmul(self.beta - self.running_mean * scale_EO, z_NEO, scale_EO, out=z_NEO)
        flat = F.batch_norm(
            z_NEO.flatten(1),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.gamma.view(-1),
            self.beta.view(-1),
            self.training,
            self.momentum,
            self.eps,
        )
        return flat.view_as(z_NEO)

    def _keep(self, ids: list[int]) -> None:
        super()._keep(ids)
        if self.reads is not None:
            self.reads = tuple(self.reads[i] for i in ids)
