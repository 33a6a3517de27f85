# SPDX-License-Identifier: Apache-2.0
"""Scores: modules that map features to logits, one per column, ``[N, num_outputs]``.

Columns are the routed experts, followed by the null experts and the gated shared experts of choosers that have them.
Scores compute in the precision they are given (the router hands them at least float32); their parameters follow.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from moeapps.moe.counts import at_least_one
from moeapps.moe.routers.chooser import Pool

Features = Tensor | tuple[Tensor, ...]


class Score(nn.Module):
    """Base of all scores: the part of a router that turns features into logits.

    ``score(features, group=..., state=...)`` returns the logits, or with a memory ``(logits, new state)``.

    Args:
        num_outputs: columns of the logits, at least 1.

    Attributes:
        pool: what else a row's logits depend on in evaluation; ``row`` means nothing.
        reads_mask: whether ``forward`` also takes ``token_mask``, bool [N] or None: for scores whose logits or buffers
            depend on other rows, which must leave masked ones out.

    Raises:
        ValueError: if ``num_outputs`` is below 1.

    Example:
        >>> Score(4).num_outputs
        4
    """

    pool: Pool = "row"
    reads_mask: ClassVar[bool] = False

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        at_least_one(num_experts=num_outputs)  # as users know its columns
        self.num_outputs = num_outputs

    def forward(
        self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [N, num_outputs]; a score with a memory returns them with its new state.

        Args:
            features: what is routed on, usually [N, d].
            group: int64 [N] or None.
            state: memory from the previous layer or None.
        """
        raise NotImplementedError

    @override
    def extra_repr(self) -> str:
        return f"num_outputs={self.num_outputs}"


def _one(features: Features, who: str) -> Tensor:
    if not isinstance(features, Tensor):
        raise ValueError(f"{who} reads one tensor of features, but got a tuple of {len(features)}; use AttentionScore.")
    return features


def applied(module: nn.Module, *inputs: Tensor) -> Tensor:
    """What a module gives, in the precision of its inputs: its parameters follow where the model was cast to another.

    Args:
        module: has parameters, all of one dtype.
        inputs: its arguments, all of one dtype.
    """
    dtype = inputs[0].dtype
    if next(module.parameters()).dtype == dtype or torch.is_autocast_enabled(inputs[0].device.type):
        result: Tensor = module(*inputs)
        return result
    cast: Tensor = functional_call(module, {name: p.to(dtype) for name, p in module.named_parameters()}, inputs)
    return cast


class LinearScore(Score):
    r"""Linear logits, :math:`s = W x + b`.

    Args:
        dim: width of the features.
        num_experts: columns, null experts and gated shared ones included.
        bias: whether there is a bias.
        init_std: standard deviation of a normal initialisation; None draws like ``nn.Linear``, 0 starts undecided.

    Shape:
        features [N, dim] -> logits [N, num_experts]; ``weight`` [num_experts, dim].

    Example:
        >>> LinearScore(8, 4)(torch.zeros(3, 8)).shape
        torch.Size([3, 4])
    """

    bias: nn.Parameter | None

    def __init__(self, dim: int, num_experts: int, *, bias: bool = False, init_std: float | None = None) -> None:
        super().__init__(num_experts)
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_experts)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights again."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in self.parameters():
            if self.init_std is None:
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.normal_(parameter, 0.0, self.init_std)

    @override
    def forward(self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        x_ND = _one(features, "LinearScore")
        bias = None if self.bias is None else self.bias.to(x_ND.dtype)
        return F.linear(x_ND, self.weight.to(x_ND.dtype), bias)

    @torch.no_grad()
    def fit(self, features: Tensor, targets: Tensor, *, noise: float = 0.0) -> None:
        r"""Set the weights to the minimum-norm least-squares solution of :math:`[x, 1] W = Y`, instead of a gradient.

        Args:
            features: [N, dim].
            targets: [N, num_experts], usually one-hot.
            noise: standard deviation added to the features before the fit.

        Raises:
            ValueError: if the shapes do not fit.

        Source: the gate update of MixER (docs/papers/mixer.md, equation 11).
        """
        wanted = ((features.shape[0], self.weight.shape[1]), (features.shape[0], self.num_outputs))
        if (tuple(features.shape), tuple(targets.shape)) != wanted:
            raise ValueError(f"features {tuple(features.shape)} and targets {tuple(targets.shape)} must be {wanted}.")
        A = features.double() + noise * torch.randn_like(features, dtype=torch.float64)
        if self.bias is not None:
            A = torch.cat([A, A.new_ones(A.shape[0], 1)], dim=1)
        solution = torch.linalg.pinv(A) @ targets.double()
        self.weight.copy_(solution[: self.weight.shape[1]].T)
        if self.bias is not None:
            self.bias.copy_(solution[-1])


class MLPScore(Score):
    r"""Logits of a two-layer perceptron, :math:`s = W_2 f(W_1 x + b_1) + b_2`.

    Args:
        dim: width of the features.
        hidden_dim: hidden width.
        num_experts: columns.
        activation: module between the layers; default GELU.

    Shape:
        features [N, dim] -> logits [N, num_experts].

    Example:
        >>> MLPScore(8, 16, 4)(torch.zeros(3, 8)).shape
        torch.Size([3, 4])
    """

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, activation: nn.Module | None = None) -> None:
        super().__init__(num_experts)
        self.activation = nn.GELU() if activation is None else activation
        self.hidden = LinearScore(dim, hidden_dim, bias=True)
        self.out = LinearScore(hidden_dim, num_experts, bias=True)

    @override
    def forward(self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.activation(self.hidden(features))
        return self.out.forward(hidden)


class CosineScore(Score):
    r"""Cosine logits with a learned temperature, :math:`s_e = \cos(P x, v_e) \exp(\min(t, \log 100))`.

    Args:
        dim: width of the features.
        num_experts: columns.
        proj_dim: width of the space in which angles are taken; None takes them in feature space (no projection).
        temperature: the logits start as cosines divided by it, above 0.01.
        learn_temperature: whether t is a parameter.

    Shape:
        features [N, dim] -> logits [N, num_experts], within plus or minus 100.

    Raises:
        ValueError: if the temperature is not above 0.01.

    Source: X-MoE; constants as in microsoft/tutel gates/cosine_top.py (256 wide, temperature 0.5, keys N(0, 0.01)).

    Example:
        >>> score = CosineScore(8, 4, proj_dim=16)
        >>> bool((score(torch.randn(3, 8)).abs() <= 2.001).all())
        True
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        proj_dim: int | None = None,
        temperature: float = 0.5,
        learn_temperature: bool = True,
    ) -> None:
        super().__init__(num_experts)
        if not temperature > 0.01:
            raise ValueError(f"temperature={temperature}, but it must be above 0.01: exp(t) is clamped at 100.")
        self.proj = None if proj_dim is None else LinearScore(dim, proj_dim)
        self.keys = nn.Parameter(torch.empty(num_experts, dim if proj_dim is None else proj_dim))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn_temperature)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the keys again."""
        nn.init.normal_(self.keys, 0.0, 0.01)

    @override
    def forward(self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        x_ND = _one(features, "CosineScore") if self.proj is None else self.proj(features)
        scale = self.log_scale.to(x_ND.dtype).clamp(max=math.log(100.0)).exp()
        return F.normalize(x_ND, dim=-1) @ F.normalize(self.keys.to(x_ND.dtype), dim=-1).T * scale


class PrototypeScore(Score):
    r"""Cosine to learned prototypes with a constant scale, :math:`Z_{ij} = \alpha \cos(x_i, p_j)`.

    Args:
        dim: width of the features.
        num_experts: prototypes.
        alpha: constant scale.
        init_std: standard deviation of the prototypes at the start.

    Shape:
        features [N, dim] -> logits [N, num_experts] in [-alpha, alpha]; ``prototypes`` [num_experts, dim].

    Source: ProMoE, prototypical routing (docs/papers/promoe.md, equation 2): alpha = 1, prototypes N(0, 0.02^2).

    Example:
        >>> PrototypeScore(8, 4)(torch.randn(3, 8)).shape
        torch.Size([3, 4])
    """

    def __init__(self, dim: int, num_experts: int, *, alpha: float = 1.0, init_std: float = 0.02) -> None:
        super().__init__(num_experts)
        self.alpha, self.init_std = alpha, init_std
        self.prototypes = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prototypes again."""
        nn.init.normal_(self.prototypes, 0.0, self.init_std)

    @override
    def forward(self, features: Features, *, group: Tensor | None = None, state: Tensor | None = None) -> Tensor:
        x_ND = _one(features, "PrototypeScore")
        return self.alpha * (F.normalize(x_ND, dim=-1) @ F.normalize(self.prototypes.to(x_ND.dtype), dim=-1).T)
