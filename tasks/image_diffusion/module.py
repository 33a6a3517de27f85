# SPDX-License-Identifier: Apache-2.0
"""The Lightning side of ProMoE: training at random noise levels, a paired loss for comparisons, samples as answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from moeapps.data.images.batch import ImageBatch
from moeapps.moe.counts import at_least_one, none_negative
from moeapps.moe.losses import AuxLoss
from moeapps.training.inputs import Program
from moeapps.training.shown import Pictures
from moeapps.training.task import BaseTask, Factor, Stage, StepOutput
from tasks.image_diffusion.metrics import TIME_BINS, paired_metrics
from tasks.image_diffusion.model import DiT
from tasks.image_diffusion.nets.flow import RectifiedFlow
from tasks.image_diffusion.nets.process import Process
from tasks.image_diffusion.nets.samplers import image_noise, sample
from tasks.image_diffusion.report.pictures import class_figure
from tasks.image_diffusion.rivals.routers import ClassTable

PAIRED_SEED = 20_251_024
"""Seed of the fixed noise of the paired loss."""


@dataclass
class Sampling:
    """How ``predict`` draws images.

    Args:
        cfg: strength of guidance, >= 0; 1 is none.
        steps: of the solver, >= 1.
        solver: ``euler`` or ``heun`` for a flow, ``ddim`` or ``ancestral`` for a diffusion; None takes the process's.
        seed: of the noise.

    Raises:
        ValueError: a number outside its range.
    """

    cfg: float = 4.0
    steps: int = 25
    solver: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(steps=self.steps)
        none_negative(cfg=self.cfg, seed=self.seed)


class ImageDiffusionTask(BaseTask):
    """Generation of images by class, from several domains at once.

    Scores are paired losses: image i of a domain always meets the same noise and the same time, whatever the model, so
    that two models differ by what they learned alone. ``loss`` is what training minimises on average, (1 - p)
    ``conditional`` + p ``null`` with p the share of dropped labels. In evaluation every image goes through the network
    twice, with its label and without.

    Args:
        net: makes the network from the facts.
        facts: from the data module: ``domains``, ``num_classes``, ``channels``, ``image_size``, ``superclass``.
        process: how images are noised; None means `RectifiedFlow`.
        sampling: how ``predict`` draws images.
        options: further arguments of `BaseTask`: ``aux_losses`` (paper: `RoutingContrast`), ``optimizer`` and
            ``schedule`` (paper: constant).

    Raises:
        ValueError: ``facts`` lacks an entry or a superclass, or the network gives no variance that the process needs.
    """

    monitor: ClassVar[str] = "val/validation/loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"
    main_metric: ClassVar[str] = "loss"
    monitor_minimum: ClassVar[int] = 100
    monitor_unit: ClassVar[str] = "images"
    headlines: ClassVar[Mapping[str, str]] = {
        "generation/frechet": "Fréchet distance of drawn images to real ones (lower is better)",
        "generation/frechet_floor": "the same of real images to other real ones",
        "generation/class_accuracy": "drawn images that a judge takes for the class asked for",
    }
    needed_facts: ClassVar[tuple[str, ...]] = ("num_classes", "channels", "image_size", "superclass")

    def __init__(
        self,
        *,
        net: Callable[[dict[str, Any]], DiT],
        facts: dict[str, Any],
        process: Process | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        super().__init__(facts=facts, **options)
        if len(facts["superclass"]) != facts["num_classes"]:
            raise ValueError(f"facts['superclass'] is {facts['superclass']}; give one entry for each class")
        self.net = net(facts)
        self.process = process or RectifiedFlow()
        self.sampling = sampling or Sampling()
        if self.process.needs_variance and not self.net.learn_sigma:
            raise ValueError(f"{type(self.process).__name__} learns a variance; set net.learn_sigma=true")
        for module in self.modules():
            if isinstance(module, ClassTable):
                module.use_superclasses(facts["superclass"])

    def configure_metrics(self, domain: str) -> MetricCollection:
        """The paired loss in parts."""
        return paired_metrics()

    def num_tokens(self, batch: ImageBatch) -> int:
        """Tokens of an evaluation pass, which holds every image twice: with its label and without."""
        return 2 * len(batch.label) * self.net.num_tokens

    def routing_factors(self, batch: ImageBatch) -> dict[str, Factor]:
        """Class of a token's image, slice of its time (one of ten), place in the image.

        Evaluation routes every image twice; of the two passes only the first, with classes, has labels.
        """
        length, num = self.net.num_tokens, len(batch.label)
        names = tuple(self.facts.get("class_names", ()))
        side = math.isqrt(length)
        places = tuple(f"row {k // side + 1} column {k % side + 1}" for k in range(length)) if side**2 == length else ()
        _, t_B = self.fixed_noise(batch)
        time_B = (t_B * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        return {
            "class": Factor(batch.label.repeat_interleave(length), self.net.num_classes, names),
            "time": Factor(time_B.repeat_interleave(length), TIME_BINS),
            "place": Factor(torch.arange(length, device=batch.label.device).repeat(num), length, places),
        }

    @override
    def pictures(self, batch: ImageBatch, domain: str) -> Pictures:
        label = batch.label.unique()[:8]  # few images in few steps: they cost less than the validation
        image = sample(self, label, cfg=self.sampling.cfg, steps=min(self.sampling.steps, 8), seed=0)
        return {"samples": class_figure(image, [self.facts["class_names"][c] for c in label.tolist()])}

    # Steps --------------------------------------------------------------------------------------------------------

    def shared_step(self, batch: ImageBatch, stage: Stage) -> StepOutput:
        """Training: loss at random times and noise. Evaluation: paired losses."""
        if stage == "train":
            x0 = batch.image
            t_B, eps = self.process.draw_times(len(x0), x0.device), torch.randn_like(x0)
            return StepOutput(self.losses(x0, batch.label, eps, t_B).mean(), len(x0))
        eps, t_B = self.fixed_noise(batch)
        x0, label = batch.image, batch.label
        both = torch.cat([label, torch.full_like(label, self.net.num_classes)])
        twice = [torch.cat([part, part]) for part in (x0, eps, t_B)]
        conditional, null = self.losses(twice[0], both, *twice[1:]).chunk(2)
        dropped = self.net.label.dropout
        loss_B = (1 - dropped) * conditional + dropped * null
        units = {"loss": loss_B, "conditional": conditional, "null": null}
        return StepOutput(loss_B.mean(), len(x0), (conditional, null, t_B), units=units)

    def losses(self, x0: Tensor, label_B: Tensor, eps: Tensor, t_B: Tensor) -> Tensor:
        """Loss of each image [B] for given data, labels (K means none), noise and times."""
        output = self.net(self.process.corrupt(x0, eps, t_B), self.process.network_time(t_B), label_B)
        return self.process.losses(output, x0, eps, t_B)

    def paired_losses(self, batch: ImageBatch, *, null: bool = False) -> Tensor:
        """Loss of each image [B] with the noise and time that belong to it.

        Call it in evaluation mode, in which no label is dropped.

        Args:
            batch: images; those with one ``index`` and ``domain`` meet the same noise in every call.
            null: take the labels away.
        """
        eps, t_B = self.fixed_noise(batch)
        label = torch.full_like(batch.label, self.net.num_classes) if null else batch.label
        return self.losses(batch.image, label, eps, t_B)

    def fixed_noise(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Noise [B, C, H, H] and times [B] from the places of the images in their domains.

        Times are stratified: every ten images in a row visit the ten slices of [0, 1], turned by one from ten to ten so
        that an order of the classes that repeats does not tie a class to a slice; the place within a slice is drawn.
        """
        key = batch.domain.cpu() * 100_003_019 + batch.index.cpu()
        shape = tuple(batch.image.shape[1:])
        eps = image_noise(PAIRED_SEED, key, shape).to(batch.image)
        within = torch.special.ndtr(image_noise(PAIRED_SEED, key, (1,), draw=1).squeeze(1))
        index_B = batch.index.cpu()
        t_B = ((index_B + index_B // TIME_BINS) % TIME_BINS + within) / TIME_BINS
        return eps, t_B.clamp(1e-4, 1 - 1e-4).to(batch.image.device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """See the base; also logs losses on the routing layer by layer."""
        total = super().training_step(batch, batch_idx)
        for aux in cast(list[AuxLoss], list(self.aux_losses)):
            for layer, value in aux.per_layer.items():
                self.log_train(f"aux/{aux.name}/{layer}", value, len(batch.label))
        return total

    def program(self) -> Program | str:
        """The denoiser; the steps of the solver and guidance are outside."""
        size, null = self.net.image_size, self.net.num_classes
        inputs = {"image": torch.zeros(3, self.net.channels, size, size), "time": torch.linspace(0.1, 0.9, 3)}
        covers = f"One pass of the denoiser; time as the network is told it, label {null} is none. Solver and guidance "
        return Program(self.net, inputs | {"label": torch.tensor([0, 0, null])}, f"{covers}are outside.")

    def predict_step(self, batch: ImageBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Draw an image for every label of the batch.

        Returns:
            On the CPU ``image`` float32 [B, C, H, H] in [-1, 1] (latents have no bounds) and ``label``, ``domain``,
            ``index`` int64 [B].
        """
        how = self.sampling
        index = batch.domain.cpu() * 100_003_019 + batch.index.cpu()
        image = sample(self, batch.label, cfg=how.cfg, steps=how.steps, solver=how.solver, seed=how.seed, index=index)
        parts = {"image": image, "label": batch.label, "domain": batch.domain, "index": batch.index}
        return {name: value.cpu() for name, value in parts.items()}
