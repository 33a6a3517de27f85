# SPDX-License-Identifier: Apache-2.0
"""What is done with the unlabelled images of a domain before its images are answered: the harness of all methods.

Shape legend: S images to adapt to, B images to answer, K classes, Q query images of an episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from tasks.adaptation.data.batch import ImageBatch
from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.nets.adapt import Weights
from tasks.adaptation.nets.passes import Passes

Form = Literal["support", "batch", "online"]


@dataclass
class Answer:
    """What an adapter said about the query images of one episode.

    Attributes:
        domain: name of the domain.
        draw: of the support.
        after: logits [Q, K] with adaptation.
        before: logits [Q, K] of the student as it is.
        query: the images, with their labels.
        support: the images adapted to.
        adapting: passes through networks that adapting took, for the whole episode.
        answering: passes that the query images took.
        seconds: of the processor, both together.
    """

    domain: str
    draw: int
    after: Tensor
    before: Tensor
    query: ImageBatch
    support: ImageBatch
    adapting: Passes
    answering: Passes
    seconds: float


class Adapter(nn.Module):
    """Base class of methods: ``adapt`` looks at images and gives a state, ``predict`` answers images by it.

    The network is never changed, so that every domain starts from the same one.

    Args:
        form: which images ``adapt`` sees: the ``support`` of an episode, once; each ``batch`` of those that are to be
            answered, afresh; or, ``online``, each such batch on top of the state after the last one.
        size: images of such a batch.

    Attributes:
        oracle: it looks at the labels of what it answers, and so is a bound, not a method.
        blind: it does not look at images to adapt to.
        measures: it also works where labels are measured values.

    Raises:
        ValueError: an unknown form, or a size below 1.
    """

    oracle: ClassVar[bool] = False
    blind: ClassVar[bool] = False
    measures: ClassVar[bool] = False

    def __init__(self, *, form: Form = "support", size: int = 50) -> None:
        super().__init__()
        if form not in get_args(Form) or size < 1:
            raise ValueError(f"form={form!r}, size={size}; form must be support, batch or online, size 1 or more")
        self.form, self.size = form, size

    def adapt(self, net: MetaDMoE, image: Tensor, state: Any, own: int) -> Any:
        """Return the state after looking at images; None where the method is blind.

        Args:
            net: the network; it stays as it is.
            image: [S, C, H, W].
            state: the one before, ``online``; None at the start of a domain.
            own: the expert of the domain where it is one of those trained on, else -1.
        """
        if not self.blind:
            raise TypeError(f"{type(self).__name__} must define adapt(net, image, state, own)")
        return None

    def predict(self, net: MetaDMoE, state: Any, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Return logits [B, K] of images; labels [B] come to oracles alone."""
        raise TypeError(f"{type(self).__name__} must define predict(net, state, image)")

    def begin(self, net: MetaDMoE, support: Tensor, own: int) -> Any:
        """Return the state at the start of an episode."""
        return self.adapt(net, support, None, own) if self.form == "support" else None

    def answer(
        self, net: MetaDMoE, state: Any, image: Tensor, own: int, label: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Return logits [B, K] of the images to answer, and the state after them."""
        label = label if self.oracle else None
        if self.form == "support":
            return self.predict(net, state, image, label), state
        found = []
        for rows in torch.arange(len(image), device=image.device).split(self.size):
            state = self.adapt(net, image[rows], state if self.form == "online" else None, own)
            found.append(self.predict(net, state, image[rows], None if label is None else label[rows]))
        return torch.cat(found), state


class Unadapted(Adapter):
    """The student as it is."""

    blind: ClassVar[bool] = True
    measures: ClassVar[bool] = True

    @override
    def predict(self, net: MetaDMoE, state: Any, image: Tensor, label: Tensor | None = None) -> Tensor:
        logits: Tensor = net(image)
        return logits


class Distil(Adapter):
    """The step of Meta-DMoE: the student's features move towards those that the aggregator makes of the experts'.

    Source: Meta-DMoE (docs/papers/meta_dmoe.md, equations 3 and 4).
    """

    measures: ClassVar[bool] = True

    @override
    def adapt(self, net: MetaDMoE, image: Tensor, state: Any, own: int) -> Weights:
        return net.adapt(image, start=state)

    @override
    def predict(self, net: MetaDMoE, state: Weights, image: Tensor, label: Tensor | None = None) -> Tensor:
        logits: Tensor = net(image, state)
        return logits
