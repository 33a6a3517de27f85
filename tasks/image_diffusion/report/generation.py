# SPDX-License-Identifier: Apache-2.0
"""Grids of samples while training; the judgement of samples at the end of a test."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.files import write_arrays, write_json
from moeapps.reporting.figures import save_figure
from moeapps.training.callbacks.report import Report, writing_dir
from moeapps.training.callbacks.side import SideReport
from moeapps.training.task import BaseTask
from tasks.image_diffusion.datamodule import ImageData
from tasks.image_diffusion.nets.samplers import sample
from tasks.image_diffusion.report.inception import InceptionFeatures
from tasks.image_diffusion.report.judge import Judging, get_judge, training_images
from tasks.image_diffusion.report.judgement import RealImages, class_table, distance_to_real, judge_images
from tasks.image_diffusion.report.pictures import class_figure, spread, visible

log = logging.getLogger("moeapps")


class SampleGrid(SideReport):
    """Write figures/samples-epoch_<k>.png while training: each class by its name, the same noise every time.

    The images are drawn by the weights that validation uses, averaged ones where they are averaged.

    Args:
        every_n_epochs: epochs between two grids.
        classes: labels to draw; None spreads ``most_classes`` over all.
        most_classes: classes at most.
        per_class: images of a class.
        cfg: strength of guidance.
        steps: steps of the solver.
        solver: as `sample` names it; None takes the process's own.
        seed: seed of the noise.

    Raises:
        ValueError: a count below 1.
    """

    runs_network = True

    def __init__(
        self,
        *,
        every_n_epochs: int = 5,
        classes: list[int] | None = None,
        most_classes: int = 30,
        per_class: int = 4,
        cfg: float = 4.0,
        steps: int = 20,
        solver: str | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in {"every_n_epochs": every_n_epochs, "per_class": per_class, "steps": steps}.items():
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed; use 1 or more")
        self.every_n_epochs, self.classes, self.most_classes = every_n_epochs, classes, most_classes
        self.per_class, self.cfg, self.steps, self.solver, self.seed = per_class, cfg, steps, solver, seed

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw before the first batch: averaged weights are in place by then, whatever the order of callbacks."""
        folder = writing_dir(trainer)
        if batch_idx or dataloader_idx or trainer.sanity_checking or folder is None:
            return
        epoch = trainer.current_epoch
        last = trainer.max_epochs is not None and epoch + 1 == trainer.max_epochs
        if (epoch + 1) % self.every_n_epochs and not last:
            return
        number = int(cast(Any, pl_module).facts["num_classes"])
        rows = self.classes if self.classes is not None else spread(number, self.most_classes)
        label = torch.tensor(rows).repeat_interleave(self.per_class)
        image = sample(pl_module, label, cfg=self.cfg, steps=self.steps, seed=self.seed, solver=self.solver)
        names = cast(Any, pl_module).facts["class_names"]
        figure = class_figure(image, [names[c] for c in label.tolist()])
        save_figure(figure, folder / "figures" / f"samples-epoch_{epoch}.png")


class GenerationQuality(Report):
    """Draw images at the end of a test and judge them beside real ones.

    Adds the groups ``generation`` and ``generation.<domain>`` of `judge_images` to the summary of metrics/test.json and
    writes metrics/generation.json (those, the accuracy of each class, how it was drawn, the judge's hash),
    figures/samples.png and, for a page, gallery/samples.npz: four images of each class. The judge is trained on first
    use. Drawn by the first process alone; not under fast_dev_run.

    Args:
        num_images: images to draw, classes in turn; distances need 1500 or more to say much, the floor shows it.
        cfg: strength of guidance.
        steps: steps of the solver.
        solver: as `sample` names it; None takes the process's own.
        seed: seed of the noise.
        batch_size: images at a time.
        judging: how the judge is trained.
        inception: weight file of the FID's network: adds ``fid`` and ``fid_floor``, the real ones. A file that is
            missing is an error before training.

    Raises:
        ValueError: fewer than 2 images, a missing weight file.
    """

    runs_network = True

    def __init__(
        self,
        *,
        num_images: int = 1500,
        cfg: float = 4.0,
        steps: int = 25,
        solver: str | None = None,
        seed: int = 0,
        batch_size: int = 128,
        judging: Judging | None = None,
        inception: Path | None = None,
    ) -> None:
        super().__init__()
        if num_images < 2 or steps < 1 or batch_size < 1:
            raise ValueError(
                f"num_images={num_images}, steps={steps}, batch_size={batch_size}; at least 2 images, else 1 or more"
            )
        self.num_images, self.cfg, self.steps, self.solver, self.seed = num_images, cfg, steps, solver, seed
        self.batch_size, self.judging = batch_size, judging
        self.inception = None if inception is None else InceptionFeatures(inception)

    @override
    def finish(self, task: BaseTask, folder: Path | None) -> None:
        if folder is None:
            return
        data = cast(ImageData, task.data)
        real = RealImages(training_images(data), training_images(data, "test"), data.domain_names)
        label = real.labels(self.num_images)
        image = sample(
            task,
            label,
            cfg=self.cfg,
            steps=self.steps,
            seed=self.seed,
            solver=self.solver,
            batch_size=self.batch_size,
        ).cpu()
        judge = get_judge(data, self.judging, images=real.train)
        self.result = judge_images(image, label, real, judge, self.seed)
        if self.inception is not None:
            fid, floor = distance_to_real(image, real, self.inception, self.seed)
            self.result["generation"] |= {"fid": fid, "fid_floor": floor}
        classes: dict[str, float] = {}
        if "class_accuracy" in self.result["generation"]:
            classes = class_table(image, label, judge, data.facts["class_names"])
        self._write(folder, image, label, classes, judge.key, data.facts["class_names"])

    def _write(
        self, folder: Path, image: Tensor, label: Tensor, classes: dict[str, float], key: str, names: list[str]
    ) -> None:
        how = {name: getattr(self, name) for name in ("num_images", "cfg", "steps", "solver", "seed")}
        write_json(
            folder / "metrics" / "generation.json", {"how": how, "judge": key, **self.result, "classes": classes}
        )
        shown = torch.cat([torch.nonzero(label == c).flatten()[:4] for c in label.unique()[:60]])
        pixels = visible(image[shown]).permute(0, 2, 3, 1).numpy()
        named = [names[c] for c in label[shown].tolist()]
        write_arrays(folder / "gallery" / "samples.npz", image=pixels, name=np.array(named))
        save_figure(class_figure(image[shown], named), folder / "figures" / "samples.png")
        all_of_it = self.result["generation"]
        told = ("class_accuracy", "real_class_accuracy", "domain_accuracy", "nearest_ratio")
        shares = ", ".join(f"{name} {all_of_it[name]:.3f}" for name in told if name in all_of_it)
        log.info("samples: %s; see %s", shares, folder / "metrics" / "generation.json")
