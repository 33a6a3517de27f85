# SPDX-License-Identifier: Apache-2.0
"""Clips to hear while training and after a test; the judgement of drawn clips at the end of a test.

Shape legend: n samples, K codebooks, T frames, V codes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.data.domain import Split
from moeapps.files import write_json
from moeapps.training.callbacks.report import Report, writing_dir
from moeapps.training.callbacks.side import SideReport
from moeapps.training.task import BaseTask
from tasks.audio.data.prompt import Prompt
from tasks.audio.datamodule import AudioData
from tasks.audio.report.clips import Heard, write_clips
from tasks.audio.report.drawing import Drawing, draw_codes, prompt_symbols, sounds
from tasks.audio.report.judge import Judge, Judging, get_judge
from tasks.audio.report.judgement import Real, judge_clips

log = logging.getLogger("moeapps")


@dataclass(frozen=True)
class Drawn:
    """Clips drawn for the prompts of real ones.

    Attributes:
        codes: int64 [K, T] of each.
        waves: float32 [n] of each.
        prompts: what was asked for.
        domain: place of the domain among the seen ones.
        real: waves of the clips that the prompts are of.
        seconds: CPU time that drawing the codes took.
    """

    codes: list[Tensor]
    waves: list[Tensor]
    prompts: list[Prompt]
    domain: list[int]
    real: list[Tensor]
    seconds: float


def draw_like(task: Any, data: AudioData, split: Split, per_domain: int, how: Drawing) -> Drawn:
    """Draw a clip for the prompts of the first clips of a split of each seen domain.

    Args:
        task: an `AudioTask`.
        data: its data, prepared.
        split: whose prompts.
        per_domain: clips of each domain, as many as there are at most.
        how: how they are drawn.
    """
    chosen = [
        (number, name, clip)
        for number, name in enumerate(data.present("seen"))
        for clip in data.clips(name, split)[:per_domain]
    ]
    prompts = [clip.prompt for _, _, clip in chosen]
    symbols = prompt_symbols(data.vocabulary, prompts, data.prompt_symbols).to(task.device)
    place = torch.tensor([data.domain_names.index(name) for _, name, _ in chosen], device=task.device)
    before = time.process_time()
    codes = draw_codes(task.net, symbols, data.facts["frame_rate"], how, domain=place)
    seconds = time.process_time() - before
    waves = sounds(data.tokenizer, codes)
    return Drawn(codes, waves, prompts, [n for n, _, _ in chosen], [clip.wave for _, _, clip in chosen], seconds)


class AudioSamples(SideReport):
    """Write clips to samples/epoch_<k>/ while training and to samples/test/ after a test, and to TensorBoard.

    Each has a WAV, a spectrogram and its prompt; index.html plays them all. While training the prompts are those of
    validation clips, the same every time, and the weights those that validation uses; after a test those of test clips,
    with the real clip beside (as the tokenizer gives it back: the best that any model of its codes can sound like).

    Args:
        every_n_epochs: epochs between two sets; the last epoch has one in any case.
        per_domain: clips of each seen domain.
        drawing: how they are drawn.

    Raises:
        ValueError: a count below 1.
    """

    runs_network = True

    def __init__(self, *, every_n_epochs: int = 5, per_domain: int = 2, drawing: Drawing | None = None) -> None:
        for name, value in {"every_n_epochs": every_n_epochs, "per_domain": per_domain}.items():
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed; use 1 or more")
        self.every_n_epochs, self.per_domain, self.drawing = every_n_epochs, per_domain, drawing or Drawing()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw before the first batch: averaged weights are in place by then, whatever the order of callbacks."""
        if batch_idx or dataloader_idx or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        epoch = trainer.current_epoch
        last = trainer.max_epochs is not None and epoch + 1 == trainer.max_epochs
        if not (epoch + 1) % self.every_n_epochs or last:
            self._write(trainer, pl_module, "val", f"epoch_{epoch}")

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, "test", "test")

    def _write(self, trainer: L.Trainer, task: L.LightningModule, split: Split, name: str) -> None:
        folder = writing_dir(trainer)
        if folder is None:
            return
        data = cast(AudioData, cast(Any, trainer).datamodule)
        drawn = draw_like(task, data, split, self.per_domain, self.drawing)
        domains, rate = data.present("seen"), int(data.facts["sample_rate"])
        clips, counted = [], dict.fromkeys(domains, 0)
        for wave, prompt, number, real in zip(drawn.waves, drawn.prompts, drawn.domain, drawn.real, strict=True):
            stem = f"{domains[number]}-{counted[domains[number]]}"
            counted[domains[number]] += 1
            clips.append(Heard(stem, wave, str(prompt)))
            if split == "test":
                codes = data.tokenizer.encode(real.unsqueeze(0))
                clips.append(Heard(f"{stem}-real", sounds(data.tokenizer, list(codes))[0], str(prompt)))
        write_clips(folder / "samples" / name, clips, rate, title=f"{folder.parent.parent.name}: {name}")
        for clip in clips:
            if len(clip.wave):
                add_to_boards(trainer, f"{split}/{clip.name}", clip.wave, rate)
        log.info("clips to hear: %s", folder / "samples" / name / "index.html")


def add_to_boards(trainer: L.Trainer, tag: str, wave: Tensor, sample_rate: int) -> None:
    """Add a clip float32 [n] to every logger that takes audio (TensorBoard's does)."""
    for logger in trainer.loggers:
        add = getattr(cast(Any, logger).experiment, "add_audio", None)
        if add is not None:
            add(tag, wave.clamp(-1, 1).unsqueeze(0), trainer.global_step, sample_rate=sample_rate)


class GenerationQuality(Report):
    """Draw clips at the end of a test and judge them beside real ones.

    Adds the groups ``generation`` and ``generation.<domain>`` of `judge_clips` to the summary of metrics/test.json and
    writes metrics/generation.json: those, how the clips were drawn, the judge's hash. The judge is trained on first
    use. Drawn by the first process alone; not under fast_dev_run.

    Args:
        per_domain: clips of each seen domain, as many as it has test clips at most.
        drawing: how they are drawn.
        judging: how the judge is trained.

    Raises:
        ValueError: a count below 1.
    """

    runs_network = True

    def __init__(self, *, per_domain: int = 40, drawing: Drawing | None = None, judging: Judging | None = None) -> None:
        super().__init__()
        if per_domain < 1:
            raise ValueError(f"per_domain={per_domain} is not allowed; use 1 or more")
        self.per_domain, self.drawing, self.judging = per_domain, drawing or Drawing(), judging

    @override
    def finish(self, task: BaseTask, folder: Path | None) -> None:
        if folder is None:
            return
        data = cast(AudioData, task.data)
        drawn = draw_like(task, data, "test", self.per_domain, self.drawing)
        judge = get_judge(data, self.judging)
        real = Real.of(data)
        self.result = judge_clips(drawn.codes, drawn.waves, drawn.prompts, drawn.domain, real, judge)
        sounding = sum(map(len, drawn.waves)) / data.facts["sample_rate"]
        self.result["generation"]["seconds_per_cpu_second"] = sounding / max(drawn.seconds, 1e-9)
        self._write(folder, judge)

    def _write(self, folder: Path, judge: Judge) -> None:
        how = {"per_domain": self.per_domain, **asdict(self.drawing)}
        write_json(folder / "metrics" / "generation.json", {"how": how, "judge": judge.key, **self.result})
        told = self.result["generation"]
        log.info(
            "drawn clips: %s; see %s",
            ", ".join(f"{name} {told[name]:.3f}" for name in HEADLINE if name in told),
            folder / "metrics" / "generation.json",
        )


HEADLINE: Sequence[str] = ("loudness", "silent", "domain_accuracy", "real_domain_accuracy", "frechet", "frechet_floor")
