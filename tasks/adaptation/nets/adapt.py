# SPDX-License-Identifier: Apache-2.0
"""The step that adapts a student: towards targets for its features, differentiable, without touching the student.

Shape legend: S support images, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from tasks.adaptation.nets.backbones import has_batch_norm

Order = Literal["second", "first"]


@dataclass(frozen=True)
class Weights:
    """Weights to run a network with, in place of its own.

    Attributes:
        parameters: by name.
        buffers: by name.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]

    @staticmethod
    def of(module: nn.Module) -> Weights:
        """Return a module's own weights, the buffers as copies."""
        return Weights(dict(module.named_parameters()), {name: b.clone() for name, b in module.named_buffers()})

    def run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """Call the module with these weights."""
        result: Tensor = functional_call(module, (dict(self.parameters), dict(self.buffers)), inputs)
        return result


class InnerStep(nn.Module):
    r"""Steps :math:`\theta \leftarrow \theta - \alpha \nabla_\theta \frac{1}{SD} \|t - f(x; \theta)\|^2` on a student.

    The student itself, its running statistics included, stays as it is.

    Args:
        rate: alpha; of a MEAN over images and features (the paper's sum has a rate S * D times smaller).
        steps: how many, each on all support images (paper: 1).
        order: of the derivatives that training takes through a step: ``second`` (paper) or ``first``, which lets
            gradients pass to the targets and straight to the student, but not through the student's own gradient.
        moved: shell-style patterns on the names of the backbone's parameters that move (paper: all).
        learned: train a rate for each of those parameters, beginning at ``rate``.
        statistics: share of the support images' own statistics in those of batch normalisation, 0 (paper) to 1.

    Raises:
        ValueError: numbers out of range; at `bind`, a pattern without a parameter.

    Source: Meta-DMoE (docs/papers/meta_dmoe.md, equation 3).
    """

    def __init__(
        self,
        *,
        rate: float = 0.02,
        steps: int = 1,
        order: Order = "second",
        moved: list[str] | None = None,
        learned: bool = False,
        statistics: float = 0.0,
    ) -> None:
        super().__init__()
        if not (rate >= 0 and steps >= 0 and 0 <= statistics <= 1) or order not in ("second", "first"):
            raise ValueError(
                f"rate={rate}, steps={steps}, statistics={statistics}, order={order!r}; rate and steps must be 0 or "
                "more, statistics lie between 0 and 1, order be second or first"
            )
        if learned and rate == 0:
            raise ValueError("learned rates cannot begin at rate=0; give a small rate")
        self.rate, self.steps, self.order, self.statistics = rate, steps, order, statistics
        self.moved, self.learned = list(moved or ["*"]), learned
        self.names: list[str] = []
        self.register_parameter("log_rate", None)

    def bind(self, backbone: nn.Module) -> InnerStep:
        """Find the parameters that move, and make their rates; returns itself."""
        known = [name for name, _ in backbone.named_parameters()]
        idle = [pattern for pattern in self.moved if not any(fnmatchcase(name, pattern) for name in known)]
        if idle:
            raise ValueError(f"moved={self.moved}: {idle} match no parameter of the backbone, which has {known}")
        self.names = [name for name in known if any(fnmatchcase(name, pattern) for pattern in self.moved)]
        if self.learned:
            self.log_rate = nn.Parameter(torch.full((len(self.names),), math.log(self.rate)))
        return self

    def rates(self) -> Mapping[str, float | Tensor]:
        """Return the rate of each parameter that moves."""
        if self.log_rate is None:
            return dict.fromkeys(self.names, self.rate)
        return dict(zip(self.names, self.log_rate.exp().unbind(), strict=True))

    @override
    def forward(
        self,
        backbone: nn.Module,
        image: Tensor,
        target_SD: Tensor,
        *,
        start: Weights | None = None,
        train: bool = False,
    ) -> Weights:
        """Return the adapted weights of a backbone.

        Args:
            backbone: images -> features.
            image: [S, C, H, W] support images.
            target_SD: what their features are to be.
            start: where the steps start; None means the backbone's own weights.
            train: keep the graph, so that a loss on the adapted weights reaches student, targets and rates.
        """
        if train:
            return self._descend(backbone, start, image, target_SD, train=True)
        # Evaluation runs under inference mode, whose tensors cannot take part in a gradient: copies can.
        with torch.inference_mode(False), torch.enable_grad():
            return self._descend(backbone, start, image.detach().clone(), target_SD.detach().clone(), train=False)

    def _descend(
        self, backbone: nn.Module, start: Weights | None, image: Tensor, target_SD: Tensor, *, train: bool
    ) -> Weights:
        start = Weights.of(backbone) if start is None else start
        buffers = blend_statistics(backbone, start, image, self.statistics) if self.statistics else start.buffers
        through = train and self.order == "second"
        moved: dict[str, Tensor] = {}  # the sum of the steps so far
        for _ in range(self.steps):
            here = {name: start.parameters[name] + moved.get(name, 0.0) for name in self.names}
            # A frozen student moves, too.
            here = {n: v if through and v.requires_grad else v.detach().requires_grad_() for n, v in here.items()}
            gradient = self._gradient(backbone, Weights({**start.parameters, **here}, buffers), image, target_SD, train)
            moved = {n: moved.get(n, 0.0) - rate * gradient[n] for n, rate in self.rates().items()}
        end = {name: start.parameters[name] + step for name, step in moved.items()}
        if not train:
            end = {name: value.detach() for name, value in end.items()}
        return Weights({**start.parameters, **end}, buffers)

    def _gradient(
        self, backbone: nn.Module, weights: Weights, image: Tensor, target_SD: Tensor, train: bool
    ) -> dict[str, Tensor]:
        """Gradient of the mean squared distance with respect to the parameters that move."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
            loss = nn.functional.mse_loss(weights.run(backbone, image), target_SD)
        wanted = [weights.parameters[name] for name in self.names]
        found = torch.autograd.grad(loss, wanted, create_graph=train, allow_unused=True)
        pairs = zip(self.names, wanted, found, strict=True)
        return {name: torch.zeros_like(p) if g is None else g for name, p, g in pairs}


def blend_statistics(backbone: nn.Module, weights: Weights, image: Tensor, share: float) -> Mapping[str, Tensor]:
    """Return the buffers with running statistics moved towards those of the images, by ``share``.

    Each layer's images have passed the layers before as they will pass them from now on, normalised by the mixture.

    Source: Schneider et al., NeurIPS 2020.
    """
    buffers = {name: value.clone() for name, value in weights.buffers.items()}
    if len(image) < 2:
        return buffers  # one image has no variance between images; small feature maps have none at all
    mixing = batch_statistics(backbone, momentum=share) if share == 1 else mixed_statistics(backbone, share)
    with torch.no_grad(), mixing:
        Weights(weights.parameters, buffers).run(backbone, image)
    return buffers


@contextmanager
def mixed_statistics(module: nn.Module, share: float) -> Iterator[None]:
    """Let batch normalisation move its running statistics towards those of its batch, and normalise by the result."""

    def mix(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
        var, mean = torch.var_mean(x, [place for place in range(x.dim()) if place != 1])
        for running, own in ((layer.running_mean, mean), (layer.running_var, var)):
            if isinstance(running, Tensor):
                running.lerp_(own.to(running.dtype), share)

    layers = has_batch_norm(module)
    before = [layer.training for layer in layers]
    handles = [layer.register_forward_pre_hook(mix) for layer in layers]
    try:
        for layer in layers:
            layer.eval()
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.train(own)
        for handle in handles:
            handle.remove()


@contextmanager
def batch_statistics(module: nn.Module, *, momentum: float = 0.0) -> Iterator[None]:
    """Let batch normalisation use the statistics of its batch.

    Args:
        module: whose layers are meant.
        momentum: share of the batch in the running statistics afterwards; 0 leaves them as they are.
    """
    layers = has_batch_norm(module)
    before = [(layer.training, layer.momentum, layer.track_running_stats) for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.momentum, layer.track_running_stats = True, momentum, momentum > 0
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.training, layer.momentum, layer.track_running_stats = own
