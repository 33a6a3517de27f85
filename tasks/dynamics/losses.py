# SPDX-License-Identifier: Apache-2.0
"""The error that training minimises, and the samples that count.

Shape letters: S environments, N trajectories per environment, T samples, D state size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.dynamics.data.batch import Trajectories


def scaled_errors(pred: Tensor, target: Tensor, mask: Tensor | None, scale_S: Tensor) -> Tensor:
    """Mean squared error of each environment over its mean squared increment, [S].

    Args:
        pred: [S, N, T, D].
        target: [S, N, T, D].
        mask: bool [S, N, T], what counts; None counts all.
        scale_S: root mean squared increment.
    """
    square = F.mse_loss(pred, target, reduction="none").mean(-1)  # (S, N, T)
    if mask is None:
        return square.mean((1, 2)) / scale_S.square()
    return square.where(mask, 0).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1) / scale_S.square()


def scored_samples(data: Trajectories) -> Tensor:
    """Which samples are scored: those that are there and were not given, bool [S, N, T]."""
    there = torch.ones(data.x.shape[:3], dtype=torch.bool, device=data.x.device) if data.mask is None else data.mask
    return there & (torch.arange(data.x.shape[2], device=data.x.device) >= data.num_given)
