# SPDX-License-Identifier: Apache-2.0
"""What experts know: the information in a layer's choice of experts about domain, class and noise level of a token.

Shape legend: N tokens, L labels of a factor, E experts.
"""

from __future__ import annotations

import re
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from moeapps.files import write_json
from moeapps.moe import PrototypeScore, Record, Routing
from moeapps.moe.metrics import contingency, load, mutual_information
from moeapps.training.run import run_dir
from tasks.image_diffusion.data.batch import ImageBatch
from tasks.image_diffusion.losses import num_routed
from tasks.image_diffusion.metrics import TIME_BINS
from tasks.image_diffusion.module import ImageDiffusionTask

FACTORS = ("domain", "class", "time", "place")


class ExpertReport(L.Callback):
    """After a test, say what each layer's choice of routed experts tells about a token with a class.

    Over the test images of the seen domains, each token spread evenly over the experts that took it:

    * ``mi_domain``, ``mi_class``, ``mi_time``, ``mi_place``: mutual information of expert and factor over the entropy
      of the factor, in [0, 1]; time is one of ten slices of t, place the position of the token in the image,
    * ``least``, ``most``: work of the least and the most used expert over the mean (0: it starves),
    * ``per_token``: experts per token, ``gate``: mean weight of an assignment,
    * ``alike``: largest cosine between two prototypes, where there are any.

    Written with the tables (work by factor and expert) to metrics/experts.json, and as groups ``experts`` (means over
    layers) and ``experts.<block>`` into the summary of metrics/test.json.
    """

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, Tensor]] = {}
        self._sums: dict[str, Tensor] = {}
        self._alike: dict[str, float] = {}
        self.result: dict[str, dict[str, float]] = {}

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting anew."""
        self._tables, self._sums, self._alike, self.result = {}, {}, {}, {}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the tokens of the batch; of its two passes only the one with classes routes them."""
        task = cast(ImageDiffusionTask, pl_module)
        if task.last_domain not in task.data.present("seen"):
            return
        _, t_B = task.fixed_noise(batch)
        length, num = task.net.num_tokens, len(batch.label)
        labels = {
            "domain": (batch.domain.repeat_interleave(length), len(task.data.domain_names)),
            "class": (batch.label.repeat_interleave(length), task.net.num_classes),
            "time": ((t_B * TIME_BINS).long().clamp(0, TIME_BINS - 1).repeat_interleave(length), TIME_BINS),
            "place": (torch.arange(length, device=batch.label.device).repeat(num), length),
        }
        for record in task.last_records:
            if isinstance(record.routing, Routing) and num_routed(record) > 1:
                self._count(record, num * length, labels)

    def _count(self, record: Record, rows: int, labels: dict[str, tuple[Tensor, int]]) -> None:
        found = re.search(r"blocks\.(\d+)\.", record.name)
        name, num_experts = found[1] if found else record.name, num_routed(record)
        weight_NE = record.routing.assignment().detach()[:rows, :num_experts].double()
        taken_NE = (weight_NE != 0).double()
        work_NE = taken_NE / taken_NE.sum(1, keepdim=True).clamp_min(1)
        tables = self._tables.setdefault(name, {})
        for factor, (label_N, num_labels) in labels.items():
            table_LE = contingency(work_NE, label_N, num_labels)
            tables[factor] = tables[factor] + table_LE if factor in tables else table_LE
        sums = torch.stack([weight_NE.sum(), taken_NE.sum(), taken_NE.new_tensor(float(rows))])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        scores = [module for module in record.layer.router.modules() if isinstance(module, PrototypeScore)]
        if scores:
            unit_ED = torch.nn.functional.normalize(scores[0].prototypes.detach().double(), dim=-1)
            self._alike[name] = float((unit_ED @ unit_ED.T).fill_diagonal_(-1).max())

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute and write."""
        if trainer.world_size > 1:
            for value in (*self._sums.values(), *(t for tables in self._tables.values() for t in tables.values())):
                torch.distributed.all_reduce(value)
        layers = {name: self._numbers(name) for name in self._tables}
        if not layers:
            return
        keys = next(iter(layers.values()))
        means = {key: sum(numbers[key] for numbers in layers.values()) / len(layers) for key in keys}
        self.result = {"experts": means, **{f"experts.{name}": numbers for name, numbers in layers.items()}}
        folder = run_dir(trainer)
        if folder is not None and trainer.is_global_zero:
            tables = {name: {f: t.tolist() for f, t in parts.items()} for name, parts in self._tables.items()}
            write_json(folder / "metrics" / "experts.json", {"numbers": self.result, "work": tables})

    def _numbers(self, name: str) -> dict[str, float]:
        tables = self._tables[name]
        told = {f"mi_{factor}": _told(tables[factor]) for factor in FACTORS}
        load_E = load(tables["place"].sum(0))
        weight, pairs, rows = self._sums[name].tolist()
        numbers = told | {"least": float(load_E.min()), "most": float(load_E.max())}
        numbers |= {"per_token": pairs / max(1.0, rows), "gate": weight / max(1.0, pairs)}
        return numbers | ({"alike": self._alike[name]} if name in self._alike else {})

    def describe_results(self) -> dict[str, dict[str, float]]:
        """Return the numbers for the summary of the results file."""
        return self.result


def _told(table_LE: Tensor) -> float:
    """I(expert; label) / H(label) of a table of labels by experts."""
    return float(mutual_information(table_LE, torch.arange(len(table_LE), device=table_LE.device)))
