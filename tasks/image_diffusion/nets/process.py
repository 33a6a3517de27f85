# SPDX-License-Identifier: Apache-2.0
"""The interface of a diffusion process: how to add noise, what the network reads and predicts, and how to go back.

One convention everywhere: time t in [0, 1], t = 0 is data and t = 1 is noise.

Shape legend: B images, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Process(nn.Module):
    """Base of the processes `RectifiedFlow` and `GaussianDiffusion`.

    Attributes:
        needs_variance: whether the network must give 2C channels.
        default_solver: solver of `samplers.sample` where none is named.
        solvers: names it can be sampled with.
    """

    needs_variance: bool = False
    default_solver: str = ""
    solvers: tuple[str, ...] = ()

    def draw_times(self, num: int, device: torch.device) -> Tensor:
        """Draw training times from torch's global generator: [num] in [0, 1]."""
        raise NotImplementedError

    def corrupt(self, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """Noisy images [B, C, H, W] of data and standard normal noise at times [B]."""
        raise NotImplementedError

    def network_time(self, t_B: Tensor) -> Tensor:
        """Return what the network is told of a time, [B] in [0, 1000]."""
        raise NotImplementedError

    def losses(self, output: Tensor, x0: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """Loss of each image [B], from the network's output on ``corrupt(x0, eps, t)``."""
        raise NotImplementedError


def per_image(t_B: Tensor, like: Tensor) -> Tensor:
    """Times [B] shaped to multiply images [B, C, H, W]."""
    return t_B.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
