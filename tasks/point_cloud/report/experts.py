# SPDX-License-Identifier: Apache-2.0
"""What experts know: mutual information of expert and domain, class, normal direction and range, layer by layer.

Shape legend: N voxels of a batch, D domains, L labels of a factor, E experts.
"""

from __future__ import annotations

import re
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch_geometric.data import Batch

from moeapps.files import write_json
from moeapps.moe import Record, Routing
from moeapps.moe.metrics import contingency, mutual_information
from moeapps.training.run import run_dir
from tasks.point_cloud.module import PointCloudTask
from tasks.point_cloud.nets.text import normalise_name

NORMAL_EDGES = (0.25, 0.5, 0.75)
"""Bins of |z| of the surface normal: upright surfaces, two slants, level surfaces."""
RANGE_EDGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Bins of the horizontal distance from the middle of a scan, in metres."""
PARTS = ("encoder", "decoder")


class ExpertReport(L.Callback):
    """After a test, say what each layer's choice of experts tells about a voxel.

    Per layer, over the test scans of the seen domains, each domain weighing the same and each voxel spread evenly over
    its experts (by weight where all experts work):

    * ``mi_domain``: I(expert; domain) / H(domain),
    * ``mi_class``: I(expert; class name) / H(class name), names shared by domains being one,
    * ``mi_class_within``, ``mi_normal_within``, ``mi_range_within``: the same for class, normal direction and range
      within each domain, averaged over domains; what a domain's own statistics give away does not count here.

    All lie in [0, 1]. Voxels of a coarse layer are counted as the voxels they hold. Range is the distance from the
    middle of the scan, where the sensors of the driving domains stand; positions of sensors are not kept. Written to
    metrics/experts.json, and as groups ``encoder``, ``decoder`` (means over layers) and ``encoder.<stage>.<block>`` ...
    into the summary of metrics/test.json.
    """

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, Tensor]] = {}
        self._domains: list[str] = []
        self._vocabulary: list[str] = []
        self.result: dict[str, dict[str, float]] = {}

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting anew."""
        task = cast(PointCloudTask, pl_module)
        self._tables, self.result, self._domains = {}, {}, task.data.present("seen")
        names = [normalise_name(name) for domain in self._domains for name in task.label_sets[domain]]
        self._vocabulary = list(dict.fromkeys(names))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the voxels of the batch."""
        task = cast(PointCloudTask, pl_module)
        records = [record for record in task.last_records if record.routing.num_experts > 1]
        if records and task.last_domain in self._domains:
            labels, rows = self._labels(task, batch), task.net.rows(batch)
            for record in records:
                self._count(record, rows, labels, self._domains.index(task.last_domain))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute and write."""
        for tables in self._tables.values():
            for table_DLE in tables.values() if trainer.world_size > 1 else ():
                torch.distributed.all_reduce(table_DLE)
        layers = {name: information(tables) for name, tables in self._tables.items()}
        self.result = {**part_means(layers), **layers}
        folder = run_dir(trainer)
        if layers and folder is not None and trainer.is_global_zero:
            write_json(folder / "metrics" / "experts.json", {"domains": self._domains, **self.result})

    def describe_results(self) -> dict[str, dict[str, float]]:
        """Return the numbers for the summary of the results file."""
        return self.result

    def _labels(self, task: PointCloudTask, batch: Batch) -> dict[str, tuple[Tensor, int]]:
        """For each factor the label of each voxel, int64 [N], -1 for none, and the number of labels."""
        own = task.label_sets[str(task.last_domain)]
        column = torch.tensor([self._vocabulary.index(normalise_name(name)) for name in own], device=batch.y.device)
        labels = {"class": (column[batch.y.clamp(min=0)].where(batch.y >= 0, -1), len(self._vocabulary))}
        if getattr(task.data, "features", "common") == "common":  # the other layout has no normal outdoors
            labels["normal"] = _binned(batch.x[:, 5].contiguous(), NORMAL_EDGES), len(NORMAL_EDGES) + 1
        labels["range"] = _binned(batch.pos[:, :2].norm(dim=1), RANGE_EDGES), len(RANGE_EDGES) + 1
        return labels

    def _count(self, record: Record, rows: list[Tensor], labels: dict[str, tuple[Tensor, int]], domain: int) -> None:
        name, level = layer_place(record.name)
        work_NE = voxel_work(record)[rows[level]]
        tables = self._tables.setdefault(name, {})
        for factor, (label_N, num_labels) in labels.items():
            if factor not in tables:
                tables[factor] = work_NE.new_zeros(len(self._domains), num_labels, work_NE.shape[1])
            tables[factor][domain] += contingency(work_NE, label_N, num_labels)


def layer_place(name: str) -> tuple[str, int]:
    """Short name of a recorded layer, ``encoder.<stage>.<block>`` or ``decoder...``, and its resolution."""
    found = re.search(r"(encoder|decoder)\.(\d+)\.blocks\.(\d+)\.", name)
    assert found is not None, name
    return ".".join(found.groups()), int(found[2])


def voxel_work(record: Record) -> Tensor:
    """How the work on each row is spread over the experts: float64 [rows, E], rows sum to 1 (0 without any)."""
    weight = record.routing.assignment().detach()
    work_NE = (weight != 0).double() if isinstance(record.routing, Routing) else weight.double()
    return work_NE / work_NE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def information(tables: dict[str, Tensor]) -> dict[str, float]:
    """The numbers of one layer.

    Args:
        tables: factor -> float64 [D, L, E], voxels of each domain by label and expert; ``class`` is one of them.
    """
    even = {key: value / value.sum(dim=(1, 2), keepdim=True).clamp(min=1e-300) for key, value in tables.items()}
    numbers = {"mi_domain": _told(even["class"].sum(dim=1)), "mi_class": _told(even["class"].sum(dim=0))}
    for factor, table_DLE in even.items():
        inside = [_told(table_LE) for table_LE in table_DLE if int((table_LE.sum(dim=1) > 0).sum()) > 1]
        numbers[f"mi_{factor}_within"] = sum(inside) / len(inside) if inside else 0.0
    return numbers


def part_means(layers: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Means over the layers of encoder and decoder, of those that have any."""
    means = {}
    for part in PARTS:
        own = [numbers for name, numbers in layers.items() if name.startswith(f"{part}.")]
        if own:
            means[part] = {key: sum(numbers[key] for numbers in own) / len(own) for key in own[0]}
    return means


def _told(table_LE: Tensor) -> float:
    """I(expert; label) / H(label) of a table of labels by experts."""
    return float(mutual_information(table_LE, torch.arange(len(table_LE), device=table_LE.device)))


def _binned(values_N: Tensor, edges: tuple[float, ...]) -> Tensor:
    return torch.bucketize(values_N, torch.tensor(edges, device=values_N.device, dtype=values_N.dtype))
