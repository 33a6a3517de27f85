# SPDX-License-Identifier: Apache-2.0
"""Systems in a form in which a batch may be cut: their loss is a mean over items that know nothing of one another.

Batch norm, the Lovasz loss and losses on the routing look at a batch as a whole, and so depend on how it is cut; here
norms are of one row, and the mean over the items of one process becomes the part that they have in the mean over those
of all. What is drawn at random in training is off, or belongs to an item.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from typing_extensions import override

from moeapps.moe.ranks import sum_over_ranks
from moeapps.training.run import run_dir
from moeapps.training.task import Stage, StepOutput
from tasks.audio.losses import code_nats
from tasks.audio.module import AudioTask
from tasks.audio.nets.language_model import IGNORED
from tasks.image_diffusion.module import ImageDiffusionTask
from tasks.point_cloud.data.labels import IGNORE
from tasks.point_cloud.module import PointCloudTask


def num_ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def joint_mean(sums: Tensor, counts: Tensor) -> Tensor:
    """The part of this process in the means over the items of all, where gradients are averaged over processes."""
    return sums * num_ranks() / sum_over_ranks(counts).clamp(min=1)


class PointsByRow(PointCloudTask):
    """Point-MoE with layer norms in place of its batch norms; its loss is its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for module in list(self.net.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    setattr(module, name, nn.LayerNorm(child.num_features))


class CutPoints(PointsByRow):
    """The same loss, over the voxels of all processes."""

    @override
    def shared_step(self, batch: Any, stage: Stage) -> StepOutput:
        if stage != "train":
            return super().shared_step(batch, stage)
        sums_D, counts_D = torch.zeros(2, len(self.domain_names))
        for name, (rows, logits) in self(batch).items():
            place, label = torch.tensor(self.domain_names.index(name)), batch.y[rows]
            nats = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
            sums_D = sums_D.index_add(0, place[None], nats[None])
            counts_D[place] = (label != IGNORE).sum()
        present = (sum_over_ranks(counts_D) > 0).sum()
        return StepOutput(joint_mean(sums_D, counts_D).sum() / present, batch.num_graphs)


class ImagesOfFixedNoise(ImageDiffusionTask):
    """ProMoE whose noise, times and dropped labels are those of an image, not of a step."""

    @override
    def shared_step(self, batch: Any, stage: Stage) -> StepOutput:
        if stage != "train":
            return super().shared_step(batch, stage)
        noise, times = self.fixed_noise(batch)
        label = batch.label.masked_fill(batch.index % 3 == 0, self.net.num_classes)
        losses = self.losses(batch.image, label, noise, times)
        count = torch.tensor(float(len(losses)))
        return StepOutput(joint_mean(losses.sum(), count), len(losses))


class CutClips(AudioTask):
    """UniMoE-Audio, whose means are over the codes of all processes."""

    @override
    def shared_step(self, batch: Any, stage: Stage) -> StepOutput:
        if stage != "train":
            return super().shared_step(batch, stage)
        inputs, target = self.net.targets(batch)
        nats = code_nats(self.net(batch.prompt, inputs, batch.domain), target)
        counts_K = (target != IGNORED).sum((0, 1)).float()
        return StepOutput(joint_mean(nats.sum((0, 1)), counts_K).sum(), len(batch))


class KeepLosses(L.Callback):
    """Write the loss of every step of this process to losses.<rank>.json in the folder of the run."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.found[trainer.global_step] = float(outputs["loss"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (Path(run_dir(trainer)) / f"losses.{trainer.global_rank}.json").write_text(json.dumps(self.found))
