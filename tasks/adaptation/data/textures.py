# SPDX-License-Identifier: Apache-2.0
"""Textures made of nothing: clouds (sums of smooth noise) and tiles (patches of one colour with light joints)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clouds(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return smooth coloured noise, float32 [count, 3, size, size] in [0, 1]."""
    image = torch.zeros(count, 3, size, size)
    for cells, weight in ((3, 1.0), (7, 0.6), (15, 0.35), (31, 0.2)):
        noise = torch.rand(count, 3, cells, cells, generator=generator)
        image += weight * F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=True)
    low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
    return (image - low) / (high - low)


def tiles(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return patches around random points, each of one colour, with joints; float32 [count, 3, size, size]."""
    axis = (torch.arange(size) + 0.5) / size
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)
    images = []
    for _ in range(count):
        points = torch.rand(40, 2, generator=generator)
        colours = torch.rand(40, 3, generator=generator)
        distance = torch.cdist(grid, points)
        near = distance.topk(2, dim=1, largest=False)
        joint = ((near.values[:, 1] - near.values[:, 0]) < 0.02).float()[:, None]
        images.append((colours[near.indices[:, 0]] * (1 - joint) + 0.9 * joint).T.reshape(3, size, size))
    return torch.stack(images)
