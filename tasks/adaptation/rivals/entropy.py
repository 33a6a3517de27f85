# SPDX-License-Identifier: Apache-2.0
"""Adaptation by the student's own predictions: TENT, SHOT and MEMO lower entropies by gradient steps.

Shape legend: S images to adapt to, B images to answer, A augmentations, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.nets.adapt import Weights, batch_statistics
from tasks.adaptation.nets.adapters import Adapter, Form
from tasks.adaptation.nets.backbones import has_batch_norm


class GradientAdapter(Adapter):
    """Base of methods that lower a loss of unlabelled images by Adam steps on some of the backbone's weights.

    A subclass defines ``loss``.

    Args:
        rate: learning rate of Adam.
        steps: on the images to adapt to.
        moved: shell-style patterns on names of the backbone's parameters that move.
        normalise_by_batch: batch normalisation by the statistics of the images at hand, as TENT has it.
        form: see `Adapter`.
        size: images of a batch.

    Raises:
        ValueError: a rate or a number of steps below 0.
    """

    def __init__(
        self,
        *,
        rate: float,
        steps: int,
        moved: list[str] | None = None,
        normalise_by_batch: bool = False,
        form: Form = "support",
        size: int = 50,
    ) -> None:
        super().__init__(form=form, size=size)
        if rate < 0 or steps < 0:
            raise ValueError(f"rate={rate}, steps={steps}; both must be 0 or more")
        self.rate, self.steps, self.moved = rate, steps, list(moved or ["*"])
        self.normalise_by_batch = normalise_by_batch

    def loss(self, net: MetaDMoE, weights: Weights, image: Tensor) -> Tensor:
        """Return what a step lowers."""
        raise TypeError(f"{type(self).__name__} must define loss(net, weights, image)")

    def names(self, backbone: nn.Module) -> list[str]:
        """Return the parameters that move."""
        known = [name for name, _ in backbone.named_parameters()]
        return [name for name in known if any(fnmatchcase(name, pattern) for pattern in self.moved)]

    @override
    def adapt(self, net: MetaDMoE, image: Tensor, state: Weights | None, own: int) -> Weights:
        with torch.inference_mode(False), torch.enable_grad(), self._normalised(net, image):
            start = Weights.of(net.student.backbone) if state is None else state
            image = image.detach().clone()
            parameters = {name: value.detach() for name, value in start.parameters.items()}
            moved = {name: parameters[name].clone().requires_grad_() for name in self.names(net.student.backbone)}
            weights = Weights({**parameters, **moved}, start.buffers)
            optimizer = torch.optim.Adam(list(moved.values()), lr=self.rate)
            for _ in range(self.steps):
                found = torch.autograd.grad(self.loss(net, weights, image), list(moved.values()), allow_unused=True)
                for value, gradient in zip(moved.values(), found, strict=True):
                    value.grad = gradient
                optimizer.step()
        return Weights({**parameters, **{name: value.detach() for name, value in moved.items()}}, start.buffers)

    @override
    def predict(self, net: MetaDMoE, state: Weights, image: Tensor, label: Tensor | None = None) -> Tensor:
        with self._normalised(net, image):
            logits: Tensor = net(image, state)
        return logits

    @contextmanager
    def _normalised(self, net: MetaDMoE, image: Tensor) -> Iterator[None]:
        by_batch = self.normalise_by_batch and len(image) > 1
        with batch_statistics(net.student.backbone) if by_batch else nullcontext():
            yield


class Tent(GradientAdapter):
    """TENT: scale and shift of batch normalisation, by the mean entropy of the predictions.

    Args:
        options: of `GradientAdapter`.

    Raises:
        ValueError: in use, a backbone without batch normalisation.

    Source: D. Wang et al., Tent: fully test-time adaptation by entropy minimization, ICLR 2021. Differs: images are
        answered after the step on their batch (there by the pass that the step is of), and Adam begins anew with each
        batch (there it keeps its moments).
    """

    def __init__(
        self,
        *,
        rate: float = 1e-3,
        steps: int = 1,
        normalise_by_batch: bool = True,
        form: Form = "online",
        size: int = 50,
    ) -> None:
        super().__init__(rate=rate, steps=steps, normalise_by_batch=normalise_by_batch, form=form, size=size)

    @override
    def names(self, backbone: nn.Module) -> list[str]:
        own = {id(parameter) for layer in has_batch_norm(backbone) for parameter in layer.parameters()}
        found = [name for name, parameter in backbone.named_parameters() if id(parameter) in own]
        if not found:
            raise ValueError("TENT moves batch normalisation, of which this backbone has none; use another adapter")
        return found

    @override
    def loss(self, net: MetaDMoE, weights: Weights, image: Tensor) -> Tensor:
        return entropy(net(image, weights)).mean()


class Shot(GradientAdapter):
    """SHOT: the backbone, by sure and diverse predictions and by pseudo-labels of class centres; the head stays.

    Args:
        pseudo: weight of the cross-entropy with pseudo-labels.

    Source: J. Liang et al., Do we really need to access the source data?, ICML 2020.
    """

    def __init__(
        self,
        *,
        rate: float = 1e-3,
        steps: int = 5,
        pseudo: float = 0.3,
        moved: list[str] | None = None,
        form: Form = "support",
        size: int = 50,
    ) -> None:
        super().__init__(rate=rate, steps=steps, moved=moved, form=form, size=size)
        self.pseudo = pseudo

    @override
    def loss(self, net: MetaDMoE, weights: Weights, image: Tensor) -> Tensor:
        feature_SD = weights.run(net.student.backbone, image)
        logits_SK: Tensor = net.student.head(feature_SD)
        mean_K = logits_SK.softmax(-1).mean(0)
        diverse = (mean_K * (mean_K + 1e-8).log()).sum()
        label_S = nearest_centre(feature_SD.detach(), logits_SK.detach().softmax(-1))
        return entropy(logits_SK).mean() + diverse + self.pseudo * nn.functional.cross_entropy(logits_SK, label_S)


class Memo(Adapter):
    """MEMO: each image by itself, by the entropy of the mean prediction over augmentations of it.

    All images of a call are adapted at once, each with weights of its own, by one step of plain descent.

    Args:
        rate: of the step.
        augmentations: A, per image: shifts by up to ``shift`` pixels, contrast and noise.
        shift: in pixels.
        seed: of the augmentations.
        chunk: images handled at once.

    Source: M. Zhang et al., MEMO: test time robustness via adaptation and augmentation, NeurIPS 2022.
    """

    blind: ClassVar[bool] = True

    def __init__(
        self, *, rate: float = 1e-3, augmentations: int = 8, shift: int = 2, seed: int = 0, chunk: int = 32
    ) -> None:
        super().__init__()
        if augmentations < 1 or shift < 0 or chunk < 1:
            raise ValueError(f"augmentations={augmentations}, shift={shift}, chunk={chunk}; 1, 0 and 1 or more")
        self.rate, self.augmentations, self.shift, self.seed, self.chunk = rate, augmentations, shift, seed, chunk

    @override
    def predict(self, net: MetaDMoE, state: Any, image: Tensor, label: Tensor | None = None) -> Tensor:
        with torch.inference_mode(False):
            start = Weights.of(net.student.backbone)
            fixed = {name: value.detach() for name, value in start.parameters.items()}

            def adapted(one: Tensor, copies: Tensor) -> Tensor:
                def loss(parameters: dict[str, Tensor]) -> Tensor:
                    mean_K: Tensor = net(copies, Weights(parameters, start.buffers)).softmax(-1).mean(0)
                    return -(mean_K * (mean_K + 1e-8).log()).sum()

                gradient = torch.func.grad(loss)(fixed)
                moved = {name: value - self.rate * gradient[name] for name, value in fixed.items()}
                logits: Tensor = net(one.unsqueeze(0), Weights(moved, start.buffers))
                return logits.squeeze(0)

            image = image.detach().clone()
            found = [torch.func.vmap(adapted)(part, self.augment(part)).detach() for part in image.split(self.chunk)]
        return torch.cat(found)

    def augment(self, image: Tensor) -> Tensor:
        """Return augmentations [B, A, C, H, W]; the first of each image is the image."""
        generator = torch.Generator().manual_seed(self.seed)
        copies, reach = [image], self.shift
        wide = nn.functional.pad(image, [reach] * 4, mode="replicate")
        for _ in range(self.augmentations - 1):
            down, right = torch.randint(2 * reach + 1, (2,), generator=generator).tolist()
            moved = wide[..., down : down + image.shape[-2], right : right + image.shape[-1]]
            scale = 0.8 + 0.4 * float(torch.rand((), generator=generator))
            noise = torch.randn(image.shape, generator=generator).to(image)
            copies.append(scale * moved + 0.05 * noise)
        return torch.stack(copies, 1)


def entropy(logits_BK: Tensor) -> Tensor:
    """Return the entropy of each prediction, [..., B] of logits [..., B, K], in nats."""
    log_BK = logits_BK.log_softmax(-1)
    return -(log_BK.exp() * log_BK).sum(-1)


def nearest_centre(feature_SD: Tensor, prob_SK: Tensor) -> Tensor:
    """Return pseudo-labels, int64 [S]: the class whose centre is closest by cosine.

    Centres are means of features weighted by the predictions, and then once more by the labels that those give.
    """
    unit_SD = nn.functional.normalize(feature_SD, dim=1)
    weight_SK = prob_SK
    for _ in range(2):
        centre_KD = nn.functional.normalize(weight_SK.T @ unit_SD, dim=1)
        there_K = weight_SK.sum(0) > 1e-6
        label_S = (unit_SD @ centre_KD.T).masked_fill(~there_K, -2).argmax(1)
        weight_SK = nn.functional.one_hot(label_S, prob_SK.shape[1]).to(unit_SD)
    return label_S
