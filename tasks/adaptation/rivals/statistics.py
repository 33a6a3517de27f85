# SPDX-License-Identifier: Apache-2.0
"""Adaptation of batch statistics: no gradient at test time.

Shape legend: S images to adapt to, B images to answer, K classes.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.nets.adapt import Weights, batch_statistics, blend_statistics
from tasks.adaptation.nets.adapters import Adapter, Form


class BatchStatistics(Adapter):
    """Batch normalisation by the statistics of the new domain in place of those of training.

    On a student trained as usual this is BN adaptation; on one whose training batches came from one domain each (data
    with ``mixing: one_domain``) it is ARM-BN, which is trained for it. Published, each batch of 50 that is to be
    answered gives its own statistics (``form: batch``); with ``form: support`` those of the support are used.

    Args:
        form: see `Adapter`.
        size: images of a batch.
        share: of the new statistics, 0 to 1; the rest is that of training.

    Raises:
        ValueError: a share outside [0, 1].

    Source: M. Zhang et al., Adaptive Risk Minimization, NeurIPS 2021; Schneider et al., NeurIPS 2020 (share).
    """

    measures: ClassVar[bool] = True

    def __init__(self, *, form: Form = "batch", size: int = 50, share: float = 1.0) -> None:
        super().__init__(form=form, size=size)
        if not 0 <= share <= 1:
            raise ValueError(f"share={share} is not allowed; use 0 to 1")
        self.share = share

    @override
    def adapt(self, net: MetaDMoE, image: Tensor, state: Weights | None, own: int) -> Weights:
        backbone = net.student.backbone
        start = Weights.of(backbone) if state is None else state
        if self.form == "batch" and self.share == 1.0:
            return start  # the layers take them from the batch as it passes
        return Weights(start.parameters, blend_statistics(backbone, start, image, self.share))

    @override
    def predict(self, net: MetaDMoE, state: Weights, image: Tensor, label: Tensor | None = None) -> Tensor:
        if self.form == "batch" and self.share == 1.0 and len(image) > 1:
            with batch_statistics(net.student.backbone):
                batch: Tensor = net(image, state)
                return batch
        logits: Tensor = net(image, state)
        return logits
