# SPDX-License-Identifier: Apache-2.0
"""Dice, DIN's activation: a PReLU whose switch moves with the data."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class Dice(nn.Module):
    r"""Dice: :math:`f(s) = p s + (1 - p) \alpha s` with :math:`p = sigmoid((s - E[s]) / \sqrt{Var[s] + \epsilon})`.

    Mean and variance are those of the batch while training and running ones in evaluation. Values that do not count
    (padding) are in no statistic.

    Args:
        width: F, units; each has an alpha of its own that starts at 0.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.

    Shape:
        x [..., F], mask bool [...] or None -> [..., F].

    Source: G. Zhou et al., "Deep Interest Network", KDD 2018.
    """

    reads_mask: ClassVar[bool] = True
    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, eps: float = 1e-8, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.alpha = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the activation."""
        mean, variance = self.mean, self.variance
        real = x.flatten(0, -2) if mask is None else x[mask]
        if self.training and len(real) > 1:  # a single value has no variance: the running ones serve
            variance, mean = torch.var_mean(real, 0, correction=0)
            with torch.no_grad():
                self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
                self.variance.lerp_(variance.to(self.variance.dtype), self.momentum)
        p = torch.sigmoid((x - mean) * torch.rsqrt(variance + self.eps))
        return p * x + (1 - p) * self.alpha * x
