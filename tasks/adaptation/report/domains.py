# SPDX-License-Identifier: Apache-2.0
"""After a test: what adaptation did to each domain, what each expert gave to it, and what that cost.

Shape legend: S support images, E experts, Q query images.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.files import write_arrays, write_json
from moeapps.moe.ranks import objects_of_all_ranks
from moeapps.reporting.figures import save_figure
from moeapps.training.callbacks.report import Report, writing_dir
from moeapps.training.scores import ScoreTable
from moeapps.training.task import BaseTask
from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.module import AdaptationTask, WithExperts
from tasks.adaptation.nets.adapters import Answer
from tasks.adaptation.report.figures import attention_figure, changed_figure, gain_figure

log = logging.getLogger("moeapps")


Changed = dict[str, list[tuple[str, Tensor, int, int, int]]]
"""``mended`` and ``spoilt`` -> domain, image [C, H, W] in [-1, 1], label, answer before, answer after."""


class DomainReport(Report):
    """Write metrics/adaptation.json, figures/{attention,gain,changed}.png and gallery/changed.npz after a test.

    Per domain: scores with and without adaptation, images whose answer adaptation made right and wrong, passes and
    seconds of the processor per target, and how much the aggregator attends to each expert (mean over the support
    images of all draws). ``worst`` of the summary of metrics/test.json is the lowest score of a domain, by role.

    Args:
        shown: changed images in the picture, of each kind.
        figures: draw the pictures.
    """

    joins_processes = True

    def __init__(self, shown: int = 12, *, figures: bool = True) -> None:
        super().__init__()
        self.shown, self.figures = shown, figures
        self._task: AdaptationTask | None = None
        self._forget()

    def _forget(self) -> None:
        self._sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._attention: dict[str, Tensor] = {}
        self._changed: Changed = {"mended": [], "spoilt": []}

    @override
    def start(self, task: BaseTask) -> None:
        self._task = cast(AdaptationTask, task)
        self._forget()

    @override
    def gather(self, task: BaseTask, batch: Any, domain: str, batch_idx: int) -> None:
        task = cast(AdaptationTask, task)
        if task.last_answer is None:
            return
        answer = cast(Answer, task.last_answer())
        sums = self._sums[answer.domain]
        told = {
            "items": 1,
            "images": len(answer.query),
            "seconds": answer.seconds,
            "adapting_forward": answer.adapting.forward,
            "adapting_backward": answer.adapting.backward,
            "answering_forward": answer.answering.forward,
            "answering_backward": answer.answering.backward,
        }
        for name, value in told.items():
            sums[name] += value
        sums["draws"] = max(sums["draws"], answer.draw + 1)
        if not task.measured:
            self._note_changes(answer, task.data.role_of(answer.domain) == "unseen")
        if isinstance(task, WithExperts) and len(answer.support):
            z_SED, present_SE = task.net.tokens(answer.support.image)
            attention_E = attention_of(task.net, z_SED, present_SE).cpu()
            self._attention[answer.domain] = self._attention.get(answer.domain, torch.zeros(())) + attention_E

    @override
    def finish(self, task: BaseTask, folder: Path | None) -> None:
        """Join what all processes have seen; what is shown are the first process's images, then the next one's."""
        parts = objects_of_all_ranks(
            ({name: dict(sums) for name, sums in self._sums.items()}, self._attention, self._changed)
        )
        self._forget()
        for sums, attention, changed in parts:
            for domain, numbers in sums.items():
                own = self._sums[domain]
                for name, value in numbers.items():
                    own[name] = max(own[name], value) if name == "draws" else own[name] + value
            for domain, share_E in attention.items():
                self._attention[domain] = self._attention.get(domain, torch.zeros(())) + share_E
            for kind, images in changed.items():
                self._changed[kind] += images

    def _note_changes(self, answer: Answer, unseen: bool) -> None:
        label, after, before = answer.query.label, answer.after.argmax(1), answer.before.argmax(1)
        for kind, rows in (
            ("mended", (after == label) & (before != label)),
            ("spoilt", (after != label) & (before == label)),
        ):
            self._sums[answer.domain][kind] += int(rows.sum())
            places = torch.nonzero(rows).flatten().tolist()[: 2 if unseen and answer.draw == 0 else 0]
            self._changed[kind] += [
                (answer.domain, answer.query.image[p].cpu(), int(label[p]), int(before[p]), int(after[p]))
                for p in places
            ]

    def describe_results(self) -> dict[str, dict[str, float]]:
        """Return the lowest score of a domain, for each role and score, and passes per unseen target."""
        if self._task is None:
            return {}
        unseen = [n for n in self._sums if self._task.data.role_of(n) == "unseen"]
        costs = [self._passes(name) for name in unseen]
        cost = {key: sum(each[key] for each in costs) / len(costs) for key in costs[0]} if costs else {}
        return {**worst(self._task.results), **({"cost": cost} if cost else {})}

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = writing_dir(trainer)
        if folder is None or not self._sums:
            return
        write_json(folder / "metrics" / "adaptation.json", self.table(cast(AdaptationTask, pl_module)))
        if self.figures:
            self._draw(folder / "figures", cast(AdaptationTask, pl_module))

    def table(self, task: AdaptationTask) -> dict[str, Any]:
        """Return the content of metrics/adaptation.json."""
        scores: dict[str, dict[str, float]] = defaultdict(dict)
        for row in task.results.scores:
            scores[row.domain][row.metric] = row.value
        domains = {}
        for name, sums in self._sums.items():
            draws, images = max(1.0, sums["draws"]), max(1.0, sums["images"])
            domains[name] = {
                "role": task.data.role_of(name),
                **scores[name],
                **{kind: sums[kind] / images for kind in ("mended", "spoilt")},
                "passes_per_target": self._passes(name),
                "cpu_seconds_per_target": sums["seconds"] / draws,
                **({"attention": self._share(name)} if name in self._attention else {}),
            }
        return {
            "adapter": f"{type(task.adapter).__module__}.{type(task.adapter).__qualname__}",
            "form": task.adapter.form,
            "oracle": task.adapter.oracle,
            "chosen_by": "validation domains alone: the checkpoint with the best " + task.monitor,
            "experts": expert_names(task),
            "domains": domains,
        }

    def _passes(self, domain: str) -> dict[str, float]:
        """Passes of images through networks: for adapting to a target, and for each image that is answered."""
        sums = self._sums[domain]
        draws, images = max(1.0, sums["draws"]), max(1.0, sums["images"])
        return {
            "adapting_forward": sums["adapting_forward"] / draws,
            "adapting_backward": sums["adapting_backward"] / draws,
            "per_image_forward": sums["answering_forward"] / images,
            "per_image_backward": sums["answering_backward"] / images,
        }

    def _share(self, domain: str) -> list[float]:
        share: list[float] = (self._attention[domain] / self._attention[domain].sum()).tolist()
        return share

    def _draw(self, folder: Path, task: AdaptationTask) -> None:
        names = list(self._attention)
        if names:
            figure = attention_figure([self._share(name) for name in names], names, expert_names(task))
            save_figure(figure, folder / "attention.png", dpi=150)
        rows = {name: (row[task.main_metric], row[f"{task.main_metric}_before"]) for name, row in self._rows(task)}
        save_figure(gain_figure(rows, task.main_metric), folder / "gain.png", dpi=150)
        if any(self._changed.values()):
            shown = {kind: items[: self.shown] for kind, items in self._changed.items()}
            write_changed(folder.parent / "gallery" / "changed.npz", shown, task.facts["class_names"])
            save_figure(changed_figure(shown, task.facts["class_names"]), folder / "changed.png", dpi=150)

    def _rows(self, task: AdaptationTask) -> list[tuple[str, dict[str, float]]]:
        return list(self.table(task)["domains"].items())


def write_changed(path: Path, changed: Changed, names: list[str]) -> None:
    """Write images whose answer adaptation changed: pixels, domain, what it is, and what was said before and after."""
    items = [(kind, item) for kind, found in changed.items() for item in found]
    images = [item[1] for _, item in items]
    pixels = torch.stack([image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1) for image in images])
    write_arrays(
        path,
        image=((pixels + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy(),
        kind=np.array([kind for kind, _ in items]),
        domain=np.array([item[0] for _, item in items]),
        label=np.array([names[item[2]] for _, item in items]),
        before=np.array([names[item[3]] for _, item in items]),
        after=np.array([names[item[4]] for _, item in items]),
    )


def worst(table: ScoreTable) -> dict[str, dict[str, float]]:
    """Return, as ``worst_<role>``, the lowest score of a domain for each score of which more is better."""
    found: dict[str, dict[str, float]] = {}
    for score in table.scores:
        if score.direction == "max":
            lowest = found.setdefault(f"worst_{score.role}", {})
            lowest[score.metric] = min(score.value, lowest.get(score.metric, float("inf")))
    return found


def attention_of(net: MetaDMoE, z_SED: Tensor, present_SE: Tensor) -> Tensor:
    """Return the aggregator's attention to each expert, [E], the mean over images."""
    with torch.no_grad():
        return net.aggregator.attention(z_SED, present_SE).mean(0)


def expert_names(task: AdaptationTask) -> list[str]:
    """Return for each expert the seen domains it was trained on."""
    numbers, names = task.facts["expert_of"], task.data.domain_names
    return ["+".join(n for n, e in zip(names, numbers, strict=True) if e == k) for k in range(task.net.num_experts)]
