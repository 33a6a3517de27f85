# SPDX-License-Identifier: Apache-2.0
"""Small networks, batches and facts for the tests of the model half."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeapps.data.images.batch import ImageBatch
from moeapps.moe import LayerFactory, MoELayer
from moeapps.moe.presets import promoe
from tasks.image_diffusion.model import DiT
from tasks.image_diffusion.module import ImageDiffusionTask

K = 6
SIZES = {"patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "learn_sigma": False}


def facts(**changes: Any) -> dict[str, Any]:
    domains = {"seen": ["a", "b"], "validation": ["c"], "unseen": ["d"]}
    given = {"domains": domains, "num_classes": K, "channels": 1, "image_size": 8, "superclass": [0, 0, 0, 1, 1, 1]}
    return {**given, "latent": False, **changes}


def net(moe: LayerFactory | None = None, **changes: Any) -> DiT:
    told = facts(**{name: changes.pop(name) for name in ("image_size", "channels", "num_classes") if name in changes})
    return DiT(told, **{**SIZES, "moe": moe, **changes})


def awake(network: DiT, seed: int = 0) -> DiT:
    """The network with weights all over the place: at its own start every output is 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def task(moe: LayerFactory | None = None, *, sizes: dict[str, Any] | None = None, **options: Any) -> ImageDiffusionTask:
    made = net(moe or promoe(num_experts=3), **(sizes or {}))
    return ImageDiffusionTask(net=lambda facts: made, facts=facts(), **options)


def batch(num: int = 8, *, first: int = 0, domain: int = 0, seed: int = 0) -> ImageBatch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(num, 1, 8, 8, generator=generator) * 2 - 1
    index = torch.arange(first, first + num)
    return ImageBatch(image, index % K, torch.full((num,), domain), index)


def layers(network: DiT) -> list[MoELayer]:
    return [module for module in network.modules() if isinstance(module, MoELayer)]


def noisy(num: int = 4, seed: int = 1, size: int = 8, channels: int = 1) -> Tensor:
    return torch.randn(num, channels, size, size, generator=torch.Generator().manual_seed(seed))
