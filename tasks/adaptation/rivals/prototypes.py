# SPDX-License-Identifier: Apache-2.0
"""Adaptation of the head by class prototypes: no gradient at test time.

Shape legend: S images to adapt to, B images to answer, D features, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.nets.adapters import Adapter, Form
from tasks.adaptation.rivals.entropy import entropy


class Kept(NamedTuple):
    """Features that prototypes are means of.

    Attributes:
        feature: [n, D], of unit length.
        label: int64 [n], predicted.
        entropy: [n], of the prediction.
    """

    feature: Tensor
    label: Tensor
    entropy: Tensor


class T3A(Adapter):
    """T3A: the head's rows are replaced by means of the surest features of each class.

    The first feature of a class is the row of the head itself, so that a class without images is still answered.

    Args:
        keep: features of a class that count, the surest ones.
        form: see `Adapter`; published: ``online``.
        size: images of a batch.

    Source: Y. Iwasawa and Y. Matsuo, Test-time classifier adjustment module, NeurIPS 2021.
    """

    def __init__(self, *, keep: int = 20, form: Form = "online", size: int = 50) -> None:
        super().__init__(form=form, size=size)
        if keep < 1:
            raise ValueError(f"keep={keep} is not allowed; use 1 or more")
        self.keep = keep

    @override
    def adapt(self, net: MetaDMoE, image: Tensor, state: Kept | None, own: int) -> Kept:
        head = net.student.head
        if state is None:
            rows_KD = head.weight.detach()
            logits_KK = nn.functional.linear(rows_KD, rows_KD, head.bias)
            state = Kept(nn.functional.normalize(rows_KD, dim=1), logits_KK.argmax(1), entropy(logits_KK).detach())
            state = state._replace(label=torch.arange(len(rows_KD), device=rows_KD.device))
        feature_SD = net.student.backbone(image)
        logits_SK = head(feature_SD)
        new = Kept(nn.functional.normalize(feature_SD, dim=1), logits_SK.argmax(1), entropy(logits_SK))
        return Kept(*(torch.cat(pair) for pair in zip(state, new, strict=True)))

    @override
    def predict(self, net: MetaDMoE, state: Kept, image: Tensor, label: Tensor | None = None) -> Tensor:
        cosine_BK: Tensor = net.student.backbone(image) @ self.prototypes(state).T
        return cosine_BK

    def prototypes(self, state: Kept) -> Tensor:
        """Return one row per class, [K, D], of unit length."""
        classes = int(state.label.max()) + 1
        rows = []
        for number in range(classes):
            of = state.label == number
            surest = state.entropy[of].argsort(stable=True)[: self.keep]
            rows.append(state.feature[of][surest].mean(0))
        return nn.functional.normalize(torch.stack(rows), dim=1)
