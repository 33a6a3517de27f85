# SPDX-License-Identifier: Apache-2.0
"""What experts know: how much a layer's choice of experts tells about the factors that a task names.

Shape legend: N rows (tokens, voxels, users) of a batch, D seen domains, L labels of a factor, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.files import write_json
from moeapps.moe.metrics import contingency, load, mutual_information
from moeapps.moe.objectives import routed
from moeapps.moe.ranks import sums_of_all_ranks
from moeapps.moe.record import Kept, Place, Record
from moeapps.moe.routers.score import PrototypeScore
from moeapps.training.callbacks.report import Groups, Report
from moeapps.training.placement import at_hand
from moeapps.training.task import BaseTask, Factor


@dataclass
class LayerWork:
    """What one layer did in a test, in float64.

    Args:
        work_DE: work of each expert on each seen domain, a row counting 1.
        sums: [3], the sum of the weights, assignments to an expert, rows.
        tables: factor -> [D, L, E], the work by label, too; rows without a label are left out.
        alike: see `prototype_likeness`; read with the batch, since averaged weights are in place only then.
    """

    work_DE: Tensor
    sums: Tensor
    tables: dict[str, Tensor] = field(default_factory=dict)
    alike: dict[str, float] = field(default_factory=dict)


class ExpertReport(Report):
    """After a test, say what each layer's choice of routed experts tells about a row.

    Over the test batches of the seen domains, each row spread evenly over the experts that took it (by weight where all
    experts work); layers of one block are counted together:

    * ``mi_domain`` and ``mi_<factor>`` for every factor of `BaseTask.routing_factors`: mutual information of expert and
      factor over the entropy of the factor, in [0, 1],
    * ``least``, ``most``: work of the least and the most used expert over the mean (0: it starves),
    * ``per_token``: experts per row, ``gate``: mean weight of an assignment,
    * ``alike``: largest cosine between two prototypes, where there are any.

    Written with the tables (work by domain, label and expert) and the names of labels to metrics/experts.json, and into
    the summary of metrics/test.json as groups ``experts`` (means over layers) and ``experts.<number>`` (a layer); where
    a network has several stages each has its groups: ``encoder``, ``encoder.<stage>.<block>``, ``decoder`` ...

    The network is not run for it: the report reads the records of the test's own pass. A task with numbers of its own
    overrides `numbers`, `count` or `finish`.
    """

    joins_processes = True
    keep: ClassVar[tuple[Kept, ...]] = ()
    """What records must hold besides the routing, see `MoERecorder`."""
    by_stage: ClassVar[bool] = False
    """Whether the only stage of a network keeps its name, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[Place, LayerWork] = {}
        self.domains: list[str] = []
        self.labels: dict[str, list[str]] = {}

    @override
    def start(self, task: BaseTask) -> None:
        self.layers, self.domains, self.labels = {}, task.data.present("seen"), {}

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Ask the records of the batch for what the report needs."""
        task = cast(BaseTask, pl_module)
        if self.keep and self.wants(task.data.eval_domains("test")[dataloader_idx]):
            task.record_keeps = {*task.record_keeps, *self.keep}

    @override
    def gather(self, task: BaseTask, batch: Any, domain: str, batch_idx: int) -> None:
        if task.last_records and self.wants(domain):
            self.count(task, batch, task.last_records, self.domains.index(domain))

    # What a task may replace --------------------------------------------------------------------------------------

    def wants(self, domain: str) -> bool:
        """Whether the next batch of a domain is counted: all of the seen ones."""
        return domain in self.domains

    def count(self, task: BaseTask, batch: Any, records: list[Record], domain: int) -> None:
        """Add one batch of the seen domain number ``domain``."""
        choices = [part for part in map(routed, records) if part.routing.num_experts > 1]
        if not choices:
            return
        factors, rows = task.routing_factors(batch), task.routed_rows(batch)
        num = len(next(iter(factors.values())).label_N) if factors else None
        for record in choices:
            held = slice(num) if rows is None else rows[record.index]
            self._count_layer(record, held, factors, domain)

    def numbers(self, layer: LayerWork) -> dict[str, float]:
        """Return the numbers of one layer."""
        told = {"mi_domain": information(layer.work_DE)}
        told |= {f"mi_{factor}": information(table_DLE.sum(0)) for factor, table_DLE in layer.tables.items()}
        load_E = load(layer.work_DE.sum(0))
        told |= {"least": float(load_E.min()), "most": float(load_E.max())}
        weight, pairs, rows = layer.sums.tolist()
        told |= {"per_token": pairs / max(1.0, rows), "gate": weight / max(1.0, pairs)}
        return told | layer.alike

    def finish(self, task: BaseTask, folder: Path | None) -> None:
        """Set ``result`` and, where there is a folder, write metrics/experts.json."""
        self._sum_over_processes(task.device)
        names = group_names(list(self.layers), by_stage=self.by_stage)
        self.result = with_means({names[place]: self.numbers(layer) for place, layer in self.layers.items()})
        if self.layers and folder is not None:
            work = {
                names[place]: {factor: table_DLE.tolist() for factor, table_DLE in layer.tables.items()}
                for place, layer in self.layers.items()
            }
            told = {"domains": self.domains, **self.result, "labels": self.labels, "work": work}
            write_json(folder / "metrics" / "experts.json", told)

    def _count_layer(self, record: Record, held: slice | Tensor, factors: dict[str, Factor], domain: int) -> None:
        work_NE, weight_NE = record.work()[held], record.routing.assignment().detach()[held]
        num_experts = work_NE.shape[1]
        layer = self.layers.setdefault(
            record.place, LayerWork(work_NE.new_zeros(len(self.domains), num_experts), work_NE.new_zeros(3))
        )
        layer.alike = prototype_likeness(record)
        layer.work_DE[domain] += work_NE.sum(0)
        layer.sums += torch.stack(
            [weight_NE.double().sum(), (weight_NE != 0).double().sum(), work_NE.new_tensor(float(len(work_NE)))]
        )
        for name, factor in factors.items():
            if name not in layer.tables:
                layer.tables[name] = work_NE.new_zeros(len(self.domains), factor.num_labels, num_experts)
            layer.tables[name][domain] += contingency(work_NE, factor.label_N, factor.num_labels)
            if factor.names:
                self.labels[name] = list(factor.names)

    def _sum_over_processes(self, device: torch.device) -> None:
        """Join the layers of all processes; one that had no batch of a seen domain has none of its own."""
        own: dict[tuple[Place, str, str], Tensor] = {}
        for place, layer in self.layers.items():
            own |= {(place, "sums", "work"): layer.work_DE, (place, "sums", "sums"): layer.sums}
            own |= {(place, "table", factor): table for factor, table in layer.tables.items()}
        found = sums_of_all_ranks(own, device)
        for place, kind, name in found:
            if (kind, name) == ("sums", "work"):
                layer = LayerWork(found[place, "sums", "work"], found[place, "sums", "sums"])
                layer.alike = self.layers[place].alike if place in self.layers else {}
                layer.tables = {n: found[p, k, n] for p, k, n in found if (p, k) == (place, "table")}
                self.layers[place] = layer


def information(table_LE: Tensor) -> float:
    """I(expert; label) / H(label) of a table of work by label and expert [L, E]."""
    return float(mutual_information(table_LE, torch.arange(len(table_LE), device=table_LE.device)))


def prototype_likeness(record: Record) -> dict[str, float]:
    """``alike``: the largest cosine between two prototypes of a layer's router; nothing where it has none, or parts."""
    scores = [module for module in record.layer.router.modules() if isinstance(module, PrototypeScore)]
    if not scores:
        return {}
    prototypes_ED = at_hand(scores[0].prototypes.detach())
    if prototypes_ED is None:
        return {}
    unit_ED = torch.nn.functional.normalize(prototypes_ED.double(), dim=-1)
    return {"alike": float((unit_ED @ unit_ED.T).fill_diagonal_(-1).max())}


def group_names(places: list[Place], *, by_stage: bool = False) -> dict[Place, str]:
    """Name each layer after its stage and numbers; unless ``by_stage`` an only stage is called ``experts``."""
    only = not by_stage and len({place.stage for place in places}) == 1
    return {place: ".".join(["experts" if only else place.stage, *map(str, place.numbers)]) for place in places}


def with_means(layers: Groups) -> Groups:
    """Return the means over the layers of each stage, then the layers (named ``<stage>.<number> ...``)."""
    means: Groups = {}
    for stage in dict.fromkeys(name.split(".")[0] for name in layers):
        own = [numbers for name, numbers in layers.items() if name.split(".")[0] == stage]
        means[stage] = {key: sum(numbers[key] for numbers in own) / len(own) for key in own[0]}
    return {**means, **layers}
