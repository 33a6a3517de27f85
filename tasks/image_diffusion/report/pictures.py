# SPDX-License-Identifier: Apache-2.0
"""Grids of images, plain or by class with names, as PNG files.

Matplotlib is imported when a figure is made and not before.

Shape legend: N images, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeapps.data.images.batch import to_uint8
from moeapps.files import WholeFile
from moeapps.reporting.figures import INK
from moeapps.text import figure_text, plain

GAP, APART, HEAD, NARROWEST = 2, 16, 20, 150
"""Dots between images, between classes side by side and for a name above them, and the least width of a class."""
DPI, SIGN = 100, 7
"""Dots of an inch, and of a character of a name."""


def visible(image: Tensor) -> Tensor:
    """Return uint8 [N, 3, H, W] of pixels in [-1, 1], or of latents: three channels, each scaled to its own range."""
    x = image.detach().float().cpu()
    if x.shape[1] not in (1, 3):
        x = x[:, :3] if x.shape[1] > 3 else x[:, :1]
        low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
        x = 2 * (x - low) / (high - low).clamp(min=1e-6) - 1
    return to_uint8(x).expand(-1, 3, -1, -1)


def grid(image: Tensor, columns: int, *, gap: int = GAP, enlarge: int = 1, ground: int = 64) -> Tensor:
    """Lay images out row by row.

    Args:
        image: [N, C, H, W], N at least 1; pixels in [-1, 1] or latents, or what `visible` made of them.
        columns: images of a row.
        gap: grey pixels between images.
        enlarge: side of the square that a pixel becomes.
        ground: grey of the gaps, 0 to 255.

    Returns:
        uint8 [rows, columns of pixels, 3].
    """
    x = image if image.dtype == torch.uint8 else visible(image)
    if enlarge > 1:
        x = x.repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    N, _, H, W = x.shape
    rows = -(-N // columns)
    canvas = torch.full((3, rows * (H + gap) + gap, columns * (W + gap) + gap), ground, dtype=torch.uint8)
    for i in range(N):
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        canvas[:, top : top + H, left : left + W] = x[i]
    return canvas.permute(1, 2, 0).contiguous()


def class_figure(image: Tensor, names: Sequence[str]) -> Any:
    """Draw images of classes: a row of those of one class under its name, classes apart, about as wide as high.

    Args:
        image: [N, C, H, W], N at least 1; pixels in [-1, 1] or latents.
        names: class of each image; those of one class follow each other.

    Returns:
        A ``matplotlib.figure.Figure`` of `DPI` dots per inch, in which each pixel is a square of dots.
    """
    from matplotlib.figure import Figure

    groups = [(name, len(list(own))) for name, own in groupby(names)]
    most = max(count for _, count in groups)
    side = most * (image.shape[3] + GAP) + GAP
    enlarge = max(1, -(-NARROWEST // side))
    shown = visible(image)  # of all at once: latents are scaled to their common range
    strips = [grid(part, most, enlarge=enlarge, ground=255) for part in shown.split([count for _, count in groups])]
    high, wide = HEAD + strips[0].shape[0] + GAP, strips[0].shape[1] + APART
    columns = min(len(groups), max(1, round((len(groups) * high / wide) ** 0.5)))
    rows = -(-len(groups) // columns)
    canvas = torch.full((rows * high, columns * wide, 3), 255, dtype=torch.uint8)
    figure = Figure(figsize=(canvas.shape[1] / DPI, canvas.shape[0] / DPI), dpi=DPI, facecolor="white")
    for k, (strip, (name, _)) in enumerate(zip(strips, groups, strict=True)):
        top, left = k // columns * high, k % columns * wide + APART // 2
        canvas[top + HEAD : top + HEAD + strip.shape[0], left : left + strip.shape[1]] = strip
        place = ((left + GAP) / canvas.shape[1], 1 - (top + HEAD - 2) / canvas.shape[0])
        said = figure_text(plain(name, strip.shape[1] // SIGN - 5))
        figure.text(*place, said, fontsize=8, color=INK, va="bottom", ha="left")
    figure.figimage(canvas.numpy(), origin="upper")
    return figure


def write_png(path: Path, pixels: Tensor) -> Path:
    """Write uint8 [H, W, 3] as PNG, whole or not at all."""
    from PIL import Image

    with WholeFile(path) as temporary:
        Image.fromarray(pixels.numpy()).save(temporary, format="PNG")
    return path


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, evenly spaced."""
    return sorted({round(i) for i in torch.linspace(0, count - 1, min(count, most)).tolist()})
