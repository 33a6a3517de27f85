# SPDX-License-Identifier: Apache-2.0
"""Looks: what sets one domain of digits apart from another, each a change of images that keeps their labels.

Shape legend: N images, H x H pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Look = Callable[[Tensor, torch.Generator], Tensor]
"""float32 [N, 3, H, H] in [0, 1] and a generator -> the same shape and range; the same for the same generator."""


def inverted(image: Tensor, generator: torch.Generator) -> Tensor:
    """Exchange light and dark."""
    return 1 - image


def rotated(degrees: float, jitter: float = 0.0) -> Look:
    """Turn each image, counterclockwise, about its centre.

    Args:
        degrees: angle.
        jitter: half the range of the angle about it.
    """

    def look(image: Tensor, generator: torch.Generator) -> Tensor:
        count = len(image)
        angle = torch.deg2rad(degrees + jitter * (2 * torch.rand(count, generator=generator) - 1))
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(count)
        turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)  # (N, 2, 3)
        grid = F.affine_grid(turn, list(image.shape), align_corners=False)
        return F.grid_sample(image, grid, align_corners=False).clamp(0, 1)

    return look


def noisy(deviation: float) -> Look:
    """Add Gaussian noise of this standard deviation to each colour."""

    def look(image: Tensor, generator: torch.Generator) -> Tensor:
        return (image + deviation * torch.randn(image.shape, generator=generator)).clamp(0, 1)

    return look


def pixelated(size: int) -> Look:
    """Average over ``size`` x ``size`` blocks and show them as blocks."""

    def look(image: Tensor, generator: torch.Generator) -> Tensor:
        return F.interpolate(F.adaptive_avg_pool2d(image, size), size=image.shape[-2:], mode="nearest")

    return look


def coarse(size: int) -> Look:
    """Average over ``size`` x ``size`` blocks and enlarge them smoothly, as an old scanner's digits."""

    def look(image: Tensor, generator: torch.Generator) -> Tensor:
        small = F.adaptive_avg_pool2d(image, size)
        return F.interpolate(small, size=image.shape[-2:], mode="bilinear", align_corners=False)

    return look


def blurred(deviation: float) -> Look:
    """Blur by a Gaussian of this standard deviation, in pixels."""

    def look(image: Tensor, generator: torch.Generator) -> Tensor:
        reach = max(1, math.ceil(2.5 * deviation))
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation).square())
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
        padded = F.pad(image, [reach] * 4, mode="replicate")
        return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3).clamp(0, 1)

    return look


def striped(depth: float) -> Look:
    """Darken stripes of random direction, 4 to 6 pixels apart, to 1 - ``depth`` of what they cover."""

    def look(image: Tensor, generator: torch.Generator) -> Tensor:
        count, height = len(image), image.shape[-1]
        angle, phase, period = torch.rand(3, count, 1, 1, generator=generator).unbind()
        angle, phase, period = math.pi * angle, 2 * math.pi * phase, 4 + 2 * period
        y, x = torch.arange(height)[:, None], torch.arange(height)
        wave = torch.sin(2 * math.pi / period * (x * angle.cos() + y * angle.sin()) + phase)  # (N, H, H)
        return image * (1 - depth * (0.5 + 2 * wave).clamp(0, 1))[:, None]

    return look


def coloured(contrast: float) -> Look:
    """Draw in a random colour upon a random one, no nearer to each other than ``contrast`` (mean over colours)."""

    def look(image: Tensor, generator: torch.Generator) -> Tensor:
        count = len(image)
        ink, paper = torch.rand(2, count, 3, 1, 1, generator=generator)
        for _ in range(50):
            near = (ink - paper).abs().mean(1, keepdim=True) < contrast
            if not near.any():
                break
            ink = torch.where(near, torch.rand(ink.shape, generator=generator), ink)
        drawn: Tensor = paper + (ink - paper) * image
        return drawn

    return look


def faded(share: float, contrast: float) -> Look:
    """Keep ``contrast`` of the differences from grey, then make ``share`` of the pixels black or white."""

    def look(image: Tensor, generator: torch.Generator) -> Tensor:
        grey = 0.5 + contrast * (image - 0.5)
        drawn = torch.rand(len(image), 1, *image.shape[2:], generator=generator)
        return torch.where(drawn < share / 2, 0.0, torch.where(drawn > 1 - share / 2, 1.0, grey))

    return look


def over(textures: Tensor, strength: float = 1.0) -> Look:
    """Show |texture - digit| with random pieces of textures, the recipe of MNIST-M.

    Args:
        textures: float32 [T, 3, P, P] in [0, 1], P no less than H.
        strength: share of the texture; 0 leaves the digit alone.
    """

    def look(image: Tensor, generator: torch.Generator) -> Tensor:
        count, height = len(image), image.shape[-1]
        spare = textures.shape[-1] - height + 1
        which = torch.randint(len(textures), (count,), generator=generator)
        top, left = torch.randint(spare, (2, count, 1), generator=generator)
        rows, columns = top + torch.arange(height), left + torch.arange(height)  # (N, H)
        piece = textures[which[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
        return (strength * piece - image).abs()

    return look


def dressed(grey: Tensor, looks: tuple[Look, ...], generator: torch.Generator) -> Tensor:
    """Apply looks one after the other.

    Args:
        grey: uint8 [N, 1, H, H], digits white on black.
        looks: what to apply.
        generator: of everything random.

    Returns:
        uint8 [N, 3, H, H].
    """
    image = (grey.float() / 255).expand(-1, 3, -1, -1)
    for look in looks:
        image = look(image, generator)
    return (255 * image).round().to(torch.uint8)
