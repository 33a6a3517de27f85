# SPDX-License-Identifier: Apache-2.0
"""Few-shot tuning: adapt only prototypes and experts to a few images of an unseen style.

Shape legend: B images.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from moeapps.data.images.batch import ImageBatch
from moeapps.moe.losses import AuxLoss
from moeapps.moe.ranks import alone
from moeapps.training.callbacks.report import Report
from moeapps.training.task import BaseTask
from moeapps.training.tuning import restored, tuned_parameters
from tasks.image_diffusion.datamodule import ImageData
from tasks.image_diffusion.report.quality import balanced_rows

log = logging.getLogger("moeapps")
PATTERNS = ("*router*", "*proto*", "*experts*")


class FewShot(Report):
    """After a test, tune routers and experts on a few training images of every unseen domain, and forget it again.

    Adds a group ``few_shot_<images>.<domain>`` to the summary of metrics/test.json: ``null_before``, ``null_after``
    (paired loss of the domain's test images without a label), ``labelled_before``, ``labelled_after`` (with it),
    ``null_gain`` = before - after with its standard error ``null_gain_se`` over images, and ``tuned``, the share of the
    parameters that was tuned. Under a conditional split a null label reaches unconditional experts alone; so half of
    the images are tuned on without their label.

    Weights, buffers and random states are left as they were.

    Args:
        images: how many images; each number starts from the trained weights.
        steps: steps of AdamW.
        batch_size: images per step.
        lr: step size, constant.
        tuned: shell patterns of the names of tuned parameters.
        test_images: most test images of a domain that are scored.
        seed: seed of the choice of images and of the noise.

    Raises:
        ValueError: a count below 1, or no pattern.
    """

    runs_network = True

    def __init__(
        self,
        *,
        images: Sequence[int] = (100, 500),
        steps: int = 60,
        batch_size: int = 32,
        lr: float = 5e-4,
        tuned: Sequence[str] = PATTERNS,
        test_images: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min([*images, steps, batch_size, test_images]) < 1 or not images or not tuned:
            raise ValueError(
                f"images={list(images)}, steps={steps}, batch_size={batch_size}, test_images={test_images}, "
                f"tuned={list(tuned)}; counts must be 1 or more, and at least one number and one pattern be given"
            )
        self.images, self.steps, self.batch_size, self.lr = list(images), steps, batch_size, lr
        self.tuned, self.test_images, self.seed = list(tuned), test_images, seed

    @override
    def finish(self, task: BaseTask, folder: Path | None) -> None:
        data = cast(ImageData, task.data)
        if folder is None:
            return
        if not tuned_parameters(task, self.tuned):
            log.info("few-shot: no parameter is named %s; nothing is tuned", " or ".join(self.tuned))
            return
        with alone(), torch.inference_mode(False), isolate_rng():
            torch.manual_seed(self.seed)
            for domain in data.present("unseen"):
                self._domain(task, data, domain)

    def _domain(self, task: BaseTask, data: ImageData, domain: str) -> None:
        given = data.images(domain, "train")
        test = data.images(domain, "test")
        test = test.take(balanced_rows(test.label, self.test_images, self.seed)).to(task.device)
        test.image = test.image.to(next(task.parameters()).dtype)
        before = {null: paired(task, test, null=null) for null in (False, True)}
        chosen = tuned_parameters(task, self.tuned)
        share = sum(p.numel() for p in chosen) / sum(p.numel() for p in task.parameters())
        for count in self.images:
            few = given.take(balanced_rows(given.label, count, self.seed)).to(task.device)
            few.image = few.image.to(test.image.dtype)
            with restored(task):
                tune(task, few, chosen, steps=self.steps, batch_size=self.batch_size, lr=self.lr, seed=self.seed)
                after = {null: paired(task, test, null=null) for null in (False, True)}
            gain = (before[True] - after[True]).double()
            self.result[f"few_shot_{count}.{domain}"] = {
                "null_before": float(before[True].mean()),
                "null_after": float(after[True].mean()),
                "null_gain": float(gain.mean()),
                "null_gain_se": float(gain.std() / len(gain) ** 0.5) if len(gain) > 1 else float("nan"),
                "labelled_before": float(before[False].mean()),
                "labelled_after": float(after[False].mean()),
                "images": float(len(few)),
                "tuned": share,
            }


@torch.no_grad()
def paired(task: BaseTask, batch: ImageBatch, *, null: bool, size: int = 128) -> Tensor:
    """Paired loss of each image [B] in evaluation mode, on the CPU."""
    task.eval()
    rows = torch.arange(len(batch), device=batch.label.device).split(size)
    return torch.cat([cast(Any, task).paired_losses(batch.take(part), null=null).cpu() for part in rows])


def tune(
    task: BaseTask,
    batch: ImageBatch,
    parameters: Sequence[nn.Parameter],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    """Train some parameters on a few images with the task's own loss and losses on the routing.

    Args:
        task: an `ImageDiffusionTask`; the parameters not named get no gradient.
        batch: the images, on the task's device.
        parameters: what is tuned.
        steps: steps of AdamW.
        batch_size: images per step, drawn with replacement.
        lr: step size.
        seed: seed of images, times and noise.
    """
    null = int(task.facts["num_classes"])
    for parameter in task.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    with isolate_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        task.train()
        for _ in range(steps):
            part = batch.take(torch.randint(len(batch), (batch_size,)).to(batch.label.device))
            half = torch.rand(len(part)).to(part.image.device) < 0.5
            out = task.recorded_step(replace(part, label=part.label.masked_fill(half, null)), "train")
            loss = out.loss
            for aux in cast(list[AuxLoss], list(task.aux_losses)):
                loss = loss + aux(task.last_records)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        task.last_records = []
