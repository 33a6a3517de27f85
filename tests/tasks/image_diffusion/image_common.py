# SPDX-License-Identifier: Apache-2.0
"""A few generated images, a source bound to domains, and a stand-in for a diffusion model that trains in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeapps.data.images.batch import ImageBatch
from moeapps.files import write_arrays
from moeapps.training.task import BaseTask, Stage, StepOutput
from tasks.image_diffusion.data.glyph_shapes import GlyphShapes
from tasks.image_diffusion.datamodule import ImageData

SMALL = {"train_per_class": 6, "val_per_class": 2, "test_per_class": 3, "image_size": 14}
ALL = {"val_share": 0.0, "test_share": 0.0}  # every image of a user is for training


def small_data(cache: Path, **options: Any) -> ImageData:
    """Thirty classes with six training images each, 14 x 14."""
    return ImageData(source=GlyphShapes(**SMALL), cache_dir=cache, **{"batch_size": 9, **options})


def bound(source: Any, *seen: str) -> Any:
    source.bind({"seen": list(seen), "validation": [], "unseen": []})
    return source


class ToyNet(nn.Module):
    """The prediction of an image is a part per class and a part that all share; neither sees its input."""

    def __init__(self, num_classes: int = 30, channels: int = 1, image_size: int = 14) -> None:
        super().__init__()
        self.num_classes, self.channels, self.image_size = num_classes, channels, image_size
        self.experts = nn.Embedding(num_classes + 1, channels * image_size**2)
        self.shared = nn.Parameter(torch.zeros(channels * image_size**2))

    def forward(self, label: Tensor) -> Tensor:
        drawn = self.experts(label) + self.shared
        return drawn.view(len(label), self.channels, self.image_size, self.image_size)


class ToyDiffusion(BaseTask):
    """Learns the mean image of each class; the paired loss is the squared error."""

    def __init__(self, *, net: ToyNet, facts: dict[str, Any]) -> None:
        super().__init__(facts=facts)
        self.net = net

    def paired_losses(self, batch: ImageBatch, *, null: bool = False) -> Tensor:
        label = torch.full_like(batch.label, self.net.num_classes) if null else batch.label
        return (self.net(label) - batch.image).square().flatten(1).mean(1)

    def shared_step(self, batch: ImageBatch, stage: Stage) -> StepOutput:
        return StepOutput(self.paired_losses(batch).mean(), len(batch))

    def num_tokens(self, batch: ImageBatch) -> int:
        return len(batch)


def stand_in(task: Any, labels: Tensor, *, seed: int = 0, **options: Any) -> Tensor:
    """Draw what the toy has learned, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        image = task.net(labels)
    return (image + 0.1 * torch.randn(image.shape, generator=generator)).clamp(-1, 1)


def write_latent(path: Path, value: Tensor, flipped: Tensor | None = None, *, key: str = "latent") -> Path:
    """Write the moments or latent of one image; ``key`` is ``latent`` (ProMoE) or ``moments`` (MAR, DiffMoE)."""
    arrays = {key: value.numpy()} | ({} if flipped is None else {f"{key}_flip": flipped.numpy()})
    return write_arrays(path, **arrays)


def write_shard(path: Path, latents: Tensor, labels: Tensor, flipped: Tensor | None = None) -> Path:
    """Write one shard."""
    from safetensors.torch import save_file

    tensors = {"latents": latents, "labels": labels} | ({} if flipped is None else {"latents_flip": flipped})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path
