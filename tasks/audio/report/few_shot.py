# SPDX-License-Identifier: Apache-2.0
"""Few-shot tuning: how much a language or an artist never heard costs before and after a few steps on its clips."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from moeapps.moe.ranks import alone
from moeapps.training.callbacks.report import Report
from moeapps.training.scores import over_processes
from moeapps.training.task import BaseTask
from moeapps.training.tuning import restored, tuned_parameters
from tasks.audio.data.batch import CodeClips
from tasks.audio.datamodule import AudioData


class FewShot(Report):
    """After a test, tune on training clips of every unseen domain, score its test clips, and forget it again.

    Adds a group ``few_shot_<k>.<domain>`` to the summary of metrics/test.json for every number of steps k, and
    ``few_shot_<k>`` with their means: ``bits_0`` and ``bits`` after k steps, ``gain`` = ``bits_0`` before - after.
    Losses on the routing are left out. Weights, buffers and random states are left as they were. Not under
    fast_dev_run.

    Args:
        steps: numbers of steps after which the domain is scored; 0 is zero-shot.
        batch_size: clips per step, drawn with replacement.
        lr: step size of AdamW, constant.
        tuned: shell patterns of the names of tuned parameters.
        seed: seed of the choice of clips.

    Raises:
        ValueError: a count out of range, or no pattern.
    """

    runs_network = True

    def __init__(
        self,
        *,
        steps: Sequence[int] = (0, 16, 64),
        batch_size: int = 16,
        lr: float = 1e-3,
        tuned: Sequence[str] = ("*",),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not steps or min(steps) < 0 or batch_size < 1 or not tuned:
            raise ValueError(
                f"steps={list(steps)}, batch_size={batch_size}, tuned={list(tuned)}; steps are 0 or more, clips of a "
                "step 1 or more, and at least one number of steps and one pattern is needed"
            )
        self.steps, self.batch_size, self.lr = sorted({0, *steps}), batch_size, lr
        self.tuned, self.seed = list(tuned), seed

    @override
    def finish(self, task: BaseTask, folder: Path | None) -> None:
        data = cast(AudioData, task.data)
        if folder is None or not tuned_parameters(task, self.tuned):
            return
        with alone(), torch.inference_mode(False), isolate_rng():
            for domain in data.present("unseen"):
                self._domain(task, data, domain)
        domains = [name.partition(".")[2] for name in self.result if name.startswith("few_shot_0.")]
        for count in self.steps if domains else ():
            found = [self.result[f"few_shot_{count}.{domain}"] for domain in domains]
            self.result[f"few_shot_{count}"] = {key: sum(f[key] for f in found) / len(found) for key in found[0]}

    def _domain(self, task: BaseTask, data: AudioData, domain: str) -> None:
        with restored(task):
            scores = [score(task, data, domain)]
            optimizer = torch.optim.AdamW(tuned_parameters(task, self.tuned), lr=self.lr, weight_decay=0.0)
            torch.manual_seed(self.seed)
            for first, last in pairwise(self.steps):
                tune(task, data, domain, optimizer, steps=last - first, batch_size=self.batch_size)
                scores.append(score(task, data, domain))
        for count, found in zip(self.steps, scores, strict=True):
            gain = scores[0]["bits_0"] - found["bits_0"]
            self.result[f"few_shot_{count}.{domain}"] = {**found, "gain": gain}


@torch.no_grad()
def score(task: BaseTask, data: AudioData, domain: str) -> dict[str, float]:
    """``bits_0`` and ``bits`` of a domain's test clips, as the test counts them."""
    metrics = over_processes(task.configure_metrics(domain)).to(task.device)
    task.eval()
    clips = cast(CodeClips, data.get_dataset(domain, "test"))
    for rows in torch.arange(len(clips)).split(data.eval_batch_size):
        metrics.update(*task.shared_step(clips.batch(rows).to(task.device), "test").metric_args)
    found = metrics.compute()
    return {name: float(found[name]) for name in ("bits_0", "bits")}


@torch.enable_grad()
def tune(
    task: BaseTask, data: AudioData, domain: str, optimizer: torch.optim.Optimizer, *, steps: int, batch_size: int
) -> None:
    """Take steps of an optimizer on a domain's training clips by the task's own loss."""
    clips = cast(CodeClips, data.get_dataset(domain, "train"))
    task.train()
    for _ in range(steps):
        batch = clips.batch(torch.randint(len(clips), (batch_size,))).to(task.device)
        optimizer.zero_grad()
        task.shared_step(batch, "train").loss.backward()
        optimizer.step()
