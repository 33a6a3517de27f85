# SPDX-License-Identifier: Apache-2.0
"""A small classifier that judges drawn images: it is trained on first use and kept in the cache.

Its 64 features take the place of Inception's, so that nothing has to be downloaded. Distances of two judges cannot be
compared: results carry the judge's hash.

Shape legend: N images, C channels, K classes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import Split
from moeapps.data.images.batch import ImageBatch, ImageDataset
from tasks.image_diffusion.datamodule import ImageData

log = logging.getLogger("moeapps")
VERSION = 1
NUM_FEATURES = 64
MOST_IMAGES = 60_000
"""Images of a set that are judged by, at most: latents of ImageNet do not fit into memory."""


@dataclass
class Judging:
    """How the judge is trained.

    Args:
        epochs: passes over the training images of all seen domains.
        batch_size: images per step.
        lr: peak step size of AdamW; it rises over a tenth of the run and falls to 0 linearly.
        width: channels of the first layer.
        shift: most pixels by which a training image is moved.
        seed: seed of weights and order.
    """

    epochs: int = 7
    batch_size: int = 128
    lr: float = 3e-3
    width: int = 20
    shift: int = 2
    seed: int = 0


class Judge(nn.Module):
    """Three strided convolutions and a linear map to `NUM_FEATURES` features, then class scores.

    Args:
        channels: C.
        num_classes: K.
        width: channels of the first layer.
    """

    num_features = NUM_FEATURES

    def __init__(self, channels: int, num_classes: int, width: int = 20) -> None:
        super().__init__()

        def layer(ins: int, outs: int) -> list[nn.Module]:
            return [nn.Conv2d(ins, outs, 3, 2, 1, bias=False), nn.BatchNorm2d(outs), nn.ReLU()]

        self.body = nn.Sequential(
            *layer(channels, width),
            *layer(width, 2 * width),
            *layer(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(4),  # changes nothing for 28 or 32 pixels
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64 * width, NUM_FEATURES),
        )
        self.head = nn.Linear(NUM_FEATURES, num_classes)
        self.key = ""

    def forward(self, image: Tensor) -> Tensor:
        """Features float32 [N, 64] of images [N, C, H, W] in [-1, 1]."""
        features: Tensor = self.body(image)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Class scores [N, K] of features [N, 64]."""
        scores: Tensor = self.head(F.relu(features))
        return scores

    @torch.no_grad()
    def features(self, image: Tensor, batch_size: int = 512) -> Tensor:
        """Features [N, 64] on the CPU, in evaluation mode, a batch at a time."""
        device = next(self.parameters()).device
        self.eval()
        empty = torch.empty(0, NUM_FEATURES)
        return torch.cat([empty, *(self(part.to(device)).cpu() for part in image.split(batch_size))])

    @torch.no_grad()
    def classes(self, features: Tensor) -> Tensor:
        """Most likely class int64 [N] of features [N, 64]."""
        return self.logits(features.to(self.head.weight.device)).argmax(1).cpu()


def training_images(data: ImageData, split: Split = "train") -> ImageBatch:
    """Images of a split of the seen domains, in order, as evaluation sees them (nothing mirrored or drawn).

    Args:
        data: the data module.
        split: ``train``, ``val`` or ``test``.

    Returns:
        All images, or `MOST_IMAGES` of them, evenly spaced in each domain.
    """
    parts = []
    seen = data.present("seen")
    for domain in seen:
        dataset = cast(ImageDataset, data.get_dataset(domain, split))
        was, dataset.train = dataset.train, False
        try:
            step = max(1, -(-len(dataset) * len(seen) // MOST_IMAGES))
            parts.append(dataset.batch(torch.arange(0, len(dataset), step)))
        finally:
            dataset.train = was
    return ImageBatch.cat(parts)


@torch.inference_mode(False)  # parameters made while a test runs could otherwise not be trained
def get_judge(data: ImageData, judging: Judging | None = None, *, images: ImageBatch | None = None) -> Judge:
    """Return the judge of a set of images, trained now if the cache has none for these images and settings.

    Args:
        data: the data module; its seen domains' training images are learned.
        judging: settings.
        images: the training images, if the caller has them.
    """
    judging = judging or Judging()
    batch = training_images(data) if images is None else images
    num_classes = int(data.facts["num_classes"])
    digest = hashlib.sha256(batch.image.numpy().tobytes() + batch.label.numpy().tobytes()).hexdigest()
    key = config_hash([VERSION, digest, num_classes, judging])
    with isolate_rng():  # the first weights are drawn, and then not used
        judge = Judge(batch.image.shape[1], num_classes, judging.width)

    def write(path: Path) -> None:
        torch.save(train_judge(judge, batch, judging).state_dict(), path)

    path = build_once(cache_dir("image_diffusion", root=data.cache_dir) / f"judge-{key}.pt", write)
    judge.load_state_dict(torch.load(path, weights_only=True))
    judge.key = key
    return judge.eval()


def train_judge(judge: Judge, batch: ImageBatch, judging: Judging) -> Judge:
    """Train on images; the global random states are left as they were.

    Weights are drawn anew from ``judging.seed``. The loss is cross-entropy with classes weighed alike.
    """
    from rich.progress import track

    log.info("training the judge of drawn images: %d images, %d epochs", len(batch), judging.epochs)
    count = torch.bincount(batch.label, minlength=judge.head.out_features)
    weight = torch.where(count > 0, len(batch) / (count.clamp(min=1) * (count > 0).sum()), 0.0).float()
    steps = judging.epochs * max(1, len(batch) // judging.batch_size)
    with isolate_rng(), torch.enable_grad():
        torch.manual_seed(judging.seed)
        for module in judge.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                module.reset_parameters()
        image, label = batch.image.clone(), batch.label.clone()  # may have been made in inference mode
        optimizer = torch.optim.AdamW(judge.parameters(), lr=judging.lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: _rate((k + 1) / (steps + 1)))
        judge.train()
        for rows in track(_batches(len(label), judging, steps), "training the judge", total=steps, transient=True):
            scores = judge.logits(judge(shifted(image[rows], judging.shift)))
            loss = F.cross_entropy(scores, label[rows], weight=weight, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


def _rate(done: float) -> float:
    return min(done / 0.1, (1 - done) / 0.9)


def _batches(count: int, judging: Judging, steps: int) -> Sequence[Tensor]:
    rows: list[Tensor] = []
    while len(rows) < steps:
        order = torch.randperm(count)
        rows += [part for part in order.split(judging.batch_size) if len(part) in (judging.batch_size, count)]
    return rows[:steps]


def shifted(image: Tensor, most: int) -> Tensor:
    """Move a batch by up to ``most`` pixels along each axis, the edges repeated; one move for the whole batch."""
    if most < 1:
        return image
    x, y = torch.randint(0, 2 * most + 1, (2,)).tolist()
    padded = F.pad(image, (most,) * 4, mode="replicate")
    return padded[..., y : y + image.shape[2], x : x + image.shape[3]]
