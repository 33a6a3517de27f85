# SPDX-License-Identifier: Apache-2.0
"""Noise for routers, in training only; draws come from torch's global generator, so seeds and checkpointing hold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe.routers.score import Features, LinearScore


class Noise(nn.Module):
    """Base of all noise: changes the features before the score, or the logits after it; here neither.

    Example:
        >>> Noise().on_logits(torch.zeros(1, 2), torch.zeros(1, 3))
        tensor([[0., 0.]])
    """

    def on_features(self, features: Features) -> Features:
        """What the score reads instead of the features."""
        return features

    def on_logits(self, logits_NX: Tensor, features: Features) -> Tensor:
        """What the chooser reads instead of the logits."""
        return logits_NX


class Jitter(Noise):
    r"""Multiply what the router reads (and only that) by :math:`U(1-\epsilon, 1+\epsilon)`.

    Args:
        eps: half width, in [0, 1).

    Raises:
        ValueError: if eps is outside [0, 1).

    Source: Switch Transformer, as generally known; eps 0.01.

    Example:
        >>> Jitter(0.01).eval().on_features(torch.ones(1))
        tensor([1.])
    """

    def __init__(self, eps: float = 0.01) -> None:
        super().__init__()
        if not 0 <= eps < 1:
            raise ValueError(f"eps={eps}, but it must be in [0, 1).")
        self.eps = eps

    @override
    def on_features(self, features: Features) -> Features:
        if not self.training or self.eps == 0:
            return features
        if isinstance(features, Tensor):
            return features * torch.empty_like(features).uniform_(1 - self.eps, 1 + self.eps)
        return tuple(self._member(member) for member in features)

    def _member(self, member: Tensor) -> Tensor:
        return (
            member * torch.empty_like(member).uniform_(1 - self.eps, 1 + self.eps)
            if member.is_floating_point()
            else member
        )


class GaussianNoise(Noise):
    r"""Noisy gating, :math:`h = s + \epsilon\, softplus(W_{noise}\, x)`, :math:`\epsilon \sim N(0, 1)` per entry.

    Args:
        dim: width of the features.
        num_experts: columns of the logits.

    Source: Shazeer et al. 2017, as generally known; :math:`W_{noise}` starts at 0.

    Example:
        >>> GaussianNoise(8, 4).on_logits(torch.zeros(3, 4), torch.zeros(3, 8)).shape
        torch.Size([3, 4])
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.scale = LinearScore(dim, num_experts, init_std=0.0)

    @override
    def on_logits(self, logits_NX: Tensor, features: Features) -> Tensor:
        if not self.training:
            return logits_NX
        return logits_NX + torch.randn_like(logits_NX) * F.softplus(self.scale(features))


class GumbelNoise(Noise):
    r"""Gumbel noise and a temperature, :math:`(s + g) / \tau`; evaluation keeps :math:`s / \tau`.

    Args:
        tau: temperature, above 0; a schedule may change it.

    Raises:
        ValueError: if tau is not above 0.

    Source: EvoMoE, dense to sparse (docs/papers/core.md, equation 17).

    Example:
        >>> GumbelNoise(2.0).eval().on_logits(torch.ones(1, 2), torch.zeros(1, 8))
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f"tau={tau}, but it must be above 0.")
        self.tau = tau

    @override
    def on_logits(self, logits_NX: Tensor, features: Features) -> Tensor:
        if self.training:
            logits_NX = logits_NX - torch.empty_like(logits_NX).exponential_().log()
        return logits_NX / self.tau
