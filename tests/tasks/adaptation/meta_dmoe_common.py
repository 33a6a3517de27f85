# SPDX-License-Identifier: Apache-2.0
"""Small networks, images and facts for the tests of the model half."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.nets.adapt import InnerStep
from tasks.adaptation.nets.backbones import Backbone, SmallCNN

K = 4


def facts(**changes: Any) -> dict[str, Any]:
    domains = {"seen": ["a", "b", "c"], "validation": ["v"], "unseen": ["u"]}
    given = {"domains": domains, "num_classes": K, "class_names": list("wxyz"), "channels": 3, "image_size": 8}
    return {**given, "target": "classification", "num_experts": 3, "expert_of": [0, 1, 2, -1, -1], **changes}


class LinearBackbone(Backbone):
    """Pixels times a matrix: what can be solved by hand."""

    def __init__(self, facts: dict[str, Any], *, dim: int = 5) -> None:
        super().__init__(dim, normalise=False)
        self.linear = nn.Linear(int(facts["channels"]) * int(facts["image_size"]) ** 2, dim, bias=False)

    def raw(self, image: Tensor) -> Tensor:
        features: Tensor = self.linear(image.flatten(1))
        return features


def small(facts: dict[str, Any]) -> SmallCNN:
    return SmallCNN(facts, dim=8, width=4)


def net(
    step: InnerStep | None = None, *, seed: int = 0, told: dict[str, Any] | None = None, **changes: Any
) -> MetaDMoE:
    """A network whose batch statistics are not those it is made with, in evaluation mode."""
    torch.manual_seed(seed)
    made = MetaDMoE(told or facts(), **{"backbone": small, "heads": 2, "step": step or InnerStep(rate=0.1), **changes})
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in made.named_buffers():
        if "running" in name:  # below 0 the mean: units that are off have no gradient to look at
            shift = -1.0 if name.endswith("mean") else 0.5
            buffer.copy_(shift + torch.rand(buffer.shape, generator=generator))
    return made.eval()


def images(count: int, seed: int = 0, size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def own(count: int, expert: int) -> Tensor:
    return torch.full((count,), expert)
