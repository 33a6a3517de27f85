# SPDX-License-Identifier: Apache-2.0
"""Styles: the same images drawn otherwise, as domains that a model has not been trained on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def outline(pixels: Tensor, seed: int) -> Tensor:
    """Keep the edges: dilation minus erosion over 3 x 3 pixels (the morphological gradient)."""
    x = pixels.float()
    high = F.max_pool2d(x, 3, stride=1, padding=1)
    low = -F.max_pool2d(-x, 3, stride=1, padding=1)
    return (high - low).to(torch.uint8)


def stripes(pixels: Tensor, seed: int) -> Tensor:
    """Hatch the images: stripes 4 to 6 pixels apart, of random direction and place, are darkened to a tenth."""
    N, _, H, W = pixels.shape
    generator = torch.Generator().manual_seed(seed)
    angle, phase, period = torch.rand(3, N, 1, 1, generator=generator).unbind()
    angle, phase, period = math.pi * angle, 2 * math.pi * phase, 4 + 2 * period
    y, x = torch.arange(H)[:, None], torch.arange(W)
    wave = torch.sin(2 * math.pi / period * (x * angle.cos() + y * angle.sin()) + phase)
    ink = 0.1 + 0.9 * (0.5 + 2 * wave).clamp(0, 1)  # (N, H, W)
    return (pixels * ink[:, None]).round().to(torch.uint8)


def negative(pixels: Tensor, seed: int) -> Tensor:
    """Exchange light and dark."""
    return 255 - pixels


STYLES: dict[str, Callable[[Tensor, int], Tensor]] = {"outline": outline, "stripes": stripes, "negative": negative}
"""Name of a domain -> uint8 [N, C, H, W] and a seed -> uint8 of the same shape; deterministic."""
