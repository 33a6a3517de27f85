# SPDX-License-Identifier: Apache-2.0
"""Feature extractors of student and experts: a small network for small images, or any of timm.

Shape legend: B images, C channels, H x W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from moeapps.moe import LayerFactory


class Backbone(nn.Module):
    """Base class: images [B, C, H, W] -> features [B, D].

    Args:
        dim: D.
        normalise: end in a LayerNorm without scale and shift, so that distances between features, and with them the
            step that adapts a student, have one scale whatever the network.
    """

    def __init__(self, dim: int, *, normalise: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.norm: nn.Module = nn.LayerNorm(dim, elementwise_affine=False) if normalise else nn.Identity()

    def raw(self, image: Tensor) -> Tensor:
        """Return features before the norm, [B, D]."""
        raise TypeError(f"{type(self).__name__} must define raw(image)")

    @override
    def forward(self, image: Tensor) -> Tensor:
        feature: Tensor = self.norm(self.raw(image))
        return feature


BackboneFactory = Callable[[dict[str, Any]], Backbone]


class SmallCNN(Backbone):
    """Three convolutions with batch normalisation, halving the image each time, and a linear layer.

    Args:
        facts: ``channels`` and ``image_size`` of the data.
        dim: D.
        width: channels of the first convolution; the others have 2 and 4 times as many.
        normalise: see `Backbone`.
        moe: mixture of experts after the linear layer, from D to D, trained with all else; None means none.

    Raises:
        ValueError: images of fewer than 8 pixels.

    Example:
        >>> SmallCNN({"channels": 3, "image_size": 28})(torch.zeros(2, 3, 28, 28)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        facts: dict[str, Any],
        *,
        dim: int = 64,
        width: int = 16,
        normalise: bool = True,
        moe: LayerFactory | None = None,
    ) -> None:
        super().__init__(dim, normalise=normalise)
        channels, side = int(facts["channels"]), int(facts["image_size"]) // 8
        if side < 1:
            raise ValueError(f"images of {facts['image_size']} pixels are too small for SmallCNN: give 8 or more")
        sizes = [channels, width, 2 * width, 4 * width]
        self.blocks = nn.Sequential(*(_block(*pair) for pair in pairwise(sizes)))
        self.linear = nn.Linear(4 * width * side * side, dim)
        self.moe = None if moe is None else moe(dim)

    @override
    def raw(self, image: Tensor) -> Tensor:
        x_BD: Tensor = self.linear(self.blocks(image).flatten(1))
        return x_BD if self.moe is None else self.moe(x_BD)


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(2))


class TimmBackbone(Backbone):
    """A network of timm without its head.

    Nothing is downloaded: weights are random or come from a file of yours. The paper: ``resnet50`` and ``densenet121``
    with weights of ImageNet.

    Args:
        facts: ``channels`` of the data.
        name: of timm, such as ``resnet18``.
        checkpoint: file with weights; what belongs to a head in it is left out.
        normalise: see `Backbone` (paper: no norm).

    Raises:
        ValueError: a name that timm does not know, or a checkpoint that is not there.
    """

    def __init__(
        self, facts: dict[str, Any], *, name: str = "resnet18", checkpoint: Path | None = None, normalise: bool = True
    ) -> None:
        import timm
        from timm.layers import set_fused_attn

        if not timm.is_model(name):
            close = timm.list_models(f"*{name[:6]}*")[:8]
            raise ValueError(f"timm has no model {name!r}; close are {close}")
        set_fused_attn(False)  # fused attention has no second derivative, which the step needs
        body = timm.create_model(name, pretrained=False, num_classes=0, in_chans=int(facts["channels"]))
        super().__init__(body.num_features, normalise=normalise)
        self.body = body
        if checkpoint is not None:
            if not Path(checkpoint).is_file():
                raise ValueError(f"checkpoint={checkpoint}: no such file; give one, or null for random weights")
            timm.models.load_checkpoint(body, str(checkpoint), strict=False)

    @override
    def raw(self, image: Tensor) -> Tensor:
        feature: Tensor = self.body(image)
        return feature


def has_batch_norm(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch normalisations of a module."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def count_parameters(module: nn.Module) -> int:
    """Return how many numbers the parameters of a module hold."""
    return sum(parameter.numel() for parameter in module.parameters())
