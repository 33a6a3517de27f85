# SPDX-License-Identifier: Apache-2.0
"""Grids of images as PNG files.

Shape legend: N images, C channels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moeapps.data.images.batch import to_uint8
from moeapps.files import WholeFile


def visible(image: Tensor) -> Tensor:
    """Return uint8 [N, 3, H, W] of pixels in [-1, 1], or of latents: three channels, each scaled to its own range."""
    x = image.detach().float().cpu()
    if x.shape[1] not in (1, 3):
        x = x[:, :3] if x.shape[1] > 3 else x[:, :1]
        low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
        x = 2 * (x - low) / (high - low).clamp(min=1e-6) - 1
    return to_uint8(x).expand(-1, 3, -1, -1)


def grid(image: Tensor, columns: int, *, gap: int = 2, enlarge: int = 1) -> Tensor:
    """Lay images out row by row.

    Args:
        image: [N, C, H, W], N at least 1; pixels in [-1, 1] or latents.
        columns: images of a row.
        gap: grey pixels between images.
        enlarge: side of the square that a pixel becomes.

    Returns:
        uint8 [rows, columns of pixels, 3].
    """
    x = visible(image)
    if enlarge > 1:
        x = x.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    N, _, H, W = x.shape
    rows = -(-N // columns)
    canvas = torch.full((3, rows * (H + gap) + gap, columns * (W + gap) + gap), 64, dtype=torch.uint8)
    for i in range(N):
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        canvas[:, top : top + H, left : left + W] = x[i]
    return canvas.permute(1, 2, 0).contiguous()


def write_png(path: Path, pixels: Tensor) -> Path:
    """Write uint8 [H, W, 3] as PNG, whole or not at all."""
    from PIL import Image

    with WholeFile(path) as temporary:
        Image.fromarray(pixels.numpy()).save(temporary, format="PNG")
    return path


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, evenly spaced."""
    return sorted({round(i) for i in torch.linspace(0, count - 1, min(count, most)).tolist()})
