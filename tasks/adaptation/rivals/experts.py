# SPDX-License-Identifier: Apache-2.0
"""Answers straight from the experts: all of them at test time, or one.

Experts that use the statistics of the batch (``expert_statistics``) see ``size`` images of it at a time.

Shape legend: S images to adapt to, B images to answer, E experts, D features, K classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.nets.adapters import Adapter
from tasks.adaptation.rivals.entropy import entropy


def expert_logits(net: MetaDMoE, image: Tensor, size: int) -> Tensor:
    """Return the logits [E, B, K] of every expert with its own head."""
    z_BED = torch.cat([net.tokens(part)[0] for part in image.split(size)])
    return torch.stack([head(z_BED[:, e]) for e, head in enumerate(net.expert_heads)])


class Ensemble(Adapter):
    """The mean of all experts' logits: a naive dense mixture."""

    blind: ClassVar[bool] = True
    measures: ClassVar[bool] = True

    @override
    def predict(self, net: MetaDMoE, state: Any, image: Tensor, label: Tensor | None = None) -> Tensor:
        return expert_logits(net, image, self.size).mean(0)


class BestExpert(Adapter):
    """The expert that is best on what is to be answered; it looks at labels: a bound on choosing among experts."""

    oracle: ClassVar[bool] = True
    blind: ClassVar[bool] = True

    @override
    def predict(self, net: MetaDMoE, state: Any, image: Tensor, label: Tensor | None = None) -> Tensor:
        logits_EBK = expert_logits(net, image, self.size)
        if label is None:
            raise ValueError("BestExpert chooses by labels; it cannot predict where there are none")
        return logits_EBK[int((logits_EBK.argmax(-1) == label).sum(1).argmax())]


class ExpertByDomain(Adapter):
    """Domain-id routing: the expert of the image's domain; for a domain without one the expert that is surest.

    Sureness is the smallest mean entropy on the images to adapt to.
    """

    @override
    def adapt(self, net: MetaDMoE, image: Tensor, state: Any, own: int) -> int:
        if own >= 0:
            return own
        return int(entropy(expert_logits(net, image, self.size)).mean(1).argmin())

    @override
    def predict(self, net: MetaDMoE, state: int, image: Tensor, label: Tensor | None = None) -> Tensor:
        found = []
        for part in image.split(self.size):
            with net.asking(len(part)):
                found.append(net.expert_heads[state](net.experts[state](part)))
        return torch.cat(found)


class Teacher(Adapter):
    """The aggregator and the head of its warm-up: what the student is taught, with E networks at test time."""

    blind: ClassVar[bool] = True
    measures: ClassVar[bool] = True

    @override
    def predict(self, net: MetaDMoE, state: Any, image: Tensor, label: Tensor | None = None) -> Tensor:
        found = [net.teacher_head(net.target(*net.tokens(part))) for part in image.split(self.size)]
        return torch.cat(found)
