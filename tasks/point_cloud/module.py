# SPDX-License-Identifier: Apache-2.0
"""The Lightning side of Point-MoE: losses per domain, scores at raw points, predictions and experts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor
from torch_geometric.data import Batch
from torchmetrics import MetricCollection
from typing_extensions import override

from moeapps.moe import MoERecorder, Record
from moeapps.training.inputs import Program
from moeapps.training.shown import Pictures
from moeapps.training.task import BaseTask, Factor, Stage, StepOutput
from tasks.point_cloud.data.labels import IGNORE
from tasks.point_cloud.losses import mean_over_domains, segmentation_loss
from tasks.point_cloud.metrics import scan_parts, segmentation_metrics
from tasks.point_cloud.model import PointMoE
from tasks.point_cloud.nets.head import LanguageHead
from tasks.point_cloud.nets.text import TaxonomyText, TextVectors, normalise_name
from tasks.point_cloud.report.figures import picture_of, scan_figure
from tasks.point_cloud.report.scan_writer import ScanWriter
from tasks.point_cloud.report.tables import write_class_tables
from tasks.point_cloud.report.tally import tally

NORMAL_EDGES = (0.25, 0.5, 0.75)
"""Bins of |z| of the surface normal: upright surfaces, two slants, level surfaces."""
NORMAL_NAMES = ("upright", "steep", "slanted", "level")
RANGE_EDGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Bins of the horizontal distance from the middle of a scan, in metres."""
RANGE_NAMES = ("under 1 m", "1 to 2 m", "2 to 4 m", "4 to 8 m", "8 to 16 m", "16 to 32 m", "over 32 m")


class PointCloudTask(BaseTask):
    """Semantic segmentation of scans from several sensors, each with its own label set.

    The network is not told where a scan comes from; the head is told which label set to answer in. Loss: cross-entropy
    plus Lovász-softmax per domain of the batch, then the mean over domains.

    Args:
        net: makes the network from the facts.
        facts: from the data module: ``domains``, ``domain_names``, ``label_sets`` and ``in_dim``.
        text: vectors of the class names; None means `TaxonomyText`.
        logit_scale: factor of the cosine between a point and a class name, > 0 (paper: about 100).
        learn_logit_scale: train that factor (paper: no).
        lovasz_weight: weight of the Lovász-softmax loss beside cross-entropy (paper's code: 1).
        options: further arguments of `BaseTask`: ``aux_losses`` (paper: none), ``optimizer`` (the paper trains
            parameters named ``*block*`` at 0.3 times the learning rate) and ``schedule`` (paper: one cycle).

    Raises:
        ValueError: ``facts`` lacks an entry.
    """

    monitor: ClassVar[str] = "val/validation/miou"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    main_metric: ClassVar[str] = "miou"
    monitor_minimum: ClassVar[int] = 5
    monitor_unit: ClassVar[str] = "tiles"
    needed_facts: ClassVar[tuple[str, ...]] = ("domain_names", "label_sets", "in_dim")

    def __init__(
        self,
        *,
        net: Callable[[dict[str, Any]], PointMoE],
        facts: dict[str, Any],
        text: TextVectors | None = None,
        logit_scale: float = 100.0,
        learn_logit_scale: bool = False,
        lovasz_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(facts=facts, **options)
        self.net = net(facts)
        self.label_sets: dict[str, list[str]] = facts["label_sets"]
        self.domain_names: list[str] = facts["domain_names"]
        self.lovasz_weight = lovasz_weight
        self.head = LanguageHead(
            self.net.out_dim, self.label_sets, text or TaxonomyText(), scale=logit_scale, learn_scale=learn_logit_scale
        )

    def configure_metrics(self, domain: str) -> MetricCollection:
        """Scores over the label set of a domain."""
        return segmentation_metrics(len(self.label_sets[domain]))

    def prediction_writer(self) -> L.Callback:
        """Scans as coloured PLY and LAS."""
        return ScanWriter()

    def on_test_epoch_end(self) -> None:
        """Write the tables per class beside the results."""
        super().on_test_epoch_end()
        write_class_tables(self, self.label_sets)

    def num_tokens(self, batch: Batch) -> int:
        """Voxels of a batch."""
        return int(batch.num_nodes)

    def routing_factors(self, batch: Batch) -> dict[str, Factor]:
        """Class name (names shared by seen domains are one), normal direction and range of each voxel.

        Range is the distance from the middle of the scan, where the sensors of the driving domains stand; positions of
        sensors are not kept.
        """
        sets = [self.label_sets[domain] for domain in self.data.present("seen")]
        words = list(dict.fromkeys(normalise_name(name) for names in sets for name in names))
        own = [words.index(normalise_name(name)) for name in self.label_sets[str(self.last_domain)]]
        column = torch.tensor(own, device=batch.y.device)
        factors = {"class": Factor(column[batch.y.clamp(min=0)].where(batch.y >= 0, -1), len(words), tuple(words))}
        if getattr(self.data, "features", "common") == "common":  # the other layout has no normal outdoors
            factors["normal"] = _binned(batch.x[:, 5].contiguous(), NORMAL_EDGES)._replace(names=NORMAL_NAMES)
        factors["range"] = _binned(batch.pos[:, :2].norm(dim=1), RANGE_EDGES)._replace(names=RANGE_NAMES)
        return factors

    def routed_rows(self, batch: Batch) -> list[Tensor]:
        """The row of each voxel at every resolution; voxels of a coarse stage count as the voxels they hold."""
        return self.net.rows(batch)

    @override
    def pictures(self, batch: Batch, domain: str) -> Pictures:
        if self.last_answer is None:
            return {}
        picture = picture_of(self.last_answer(), self.data.role_of(domain))
        return {"scan": scan_figure(picture, dpi=60)} if (picture.truth_R != IGNORE).any() else {}

    def forward(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Answer a batch.

        Returns:
            For each domain present, the int64 [n] voxels of its scans and their logits [n, C] over its label set.
        """
        domain_N, row_N = torch.sort(batch.domain[batch.batch], stable=True)
        indices, counts = torch.unique_consecutive(domain_N, return_counts=True)
        parts = [(self.domain_names[i], n) for i, n in zip(indices.tolist(), counts.tolist(), strict=True)]
        logits = self.head.split(self.net(batch).index_select(0, row_N), parts)
        rows = row_N.split([count for _, count in parts])
        return {name: (own, found) for (name, _), own, found in zip(parts, rows, logits, strict=True)}

    def shared_step(self, batch: Batch, stage: Stage) -> StepOutput:
        """Loss of one batch; in evaluation also predictions of voxels and of the raw points behind them."""
        answers = self(batch)
        parts = {
            name: segmentation_loss(logits, batch.y[rows], lovasz_weight=self.lovasz_weight)
            for name, (rows, logits) in answers.items()
        }
        loss = mean_over_domains({name: part["loss"] for name, part in parts.items()})
        logs = {key: mean_over_domains({n: part[key] for n, part in parts.items()}) for key in ("ce", "lovasz")}
        labelled = len(torch.unique(batch.batch[batch.y != IGNORE]))
        if stage == "train":
            if not labelled:  # a graph for the gradient that is zero
                loss = torch.stack([logits.sum() for _, logits in answers.values()]).sum() * 0
            return StepOutput(loss, batch.num_graphs, logs=logs, labelled=labelled)
        pred = most_likely(answers, batch.y)
        raw_pred, raw_scan = self.raw_labels(batch, pred), batch.batch[batch.inverse]
        classes = max(len(self.label_sets[name]) for name in answers)
        # A unit is a whole scan: tiles of one scan carry its name, and are added up.
        unit = torch.tensor([zlib.crc32(name.encode()) for name in batch.name], device=pred.device)
        shares = {"miou": (unit, scan_parts(raw_pred, batch.raw_y, raw_scan, batch.num_graphs, classes))}
        args = (pred, batch.y, raw_pred, batch.raw_y)
        return StepOutput(
            *(loss, batch.num_graphs, args, logs),
            labelled=labelled,
            parts=shares,
            answer=lambda: self._scans(batch, raw_pred, self.last_records),
        )

    def raw_labels(self, batch: Batch, pred_N: Tensor) -> Tensor:
        """Class of every raw point: int64 [R], from its voxel, or from its votes where the batch has votes."""
        if "votes" not in batch:
            return pred_N[batch.inverse]
        most = max(len(self.label_sets[self.domain_names[index]]) for index in batch.domain.tolist())
        sums_RC, _ = tally(self, batch.votes, most, pred_N.device)
        return sums_RC.argmax(dim=1).to(pred_N.device)

    def predict_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Label every raw point of every scan.

        Returns:
            Per scan a dictionary on the CPU: ``name``, ``domain``, ``names`` (class names), ``label`` int64 [R] index
            into ``names``, ``expert`` int64 [R] (expert with the largest weight in the last mixture, -1 for none; None
            where there is nothing to choose), ``inverse`` int64 [R] (voxel of each point), ``pos`` [N, 3] metres
            and ``truth`` int64 [N] of the voxels. For tiles of a data set also ``xyz`` float64 [R, 3] metres in the
            frame of the scan's file, ``raw_row`` int64 [R] (row in the scan) and ``scan_points`` (rows it has).
        """
        with MoERecorder(self.net) as recorder:
            pred = most_likely(self(batch), batch.y)
        return self._scans(batch, self.raw_labels(batch, pred), recorder.records)

    def answer_inputs(self, batches: list[Batch]) -> dict[str, Any]:
        """Label a scan: ``label`` int64 [R] into ``names``, row by row, and ``expert`` (see `predict_step`)."""
        tiles = [tile for batch in batches for tile in self.predict_step(batch)]
        row = torch.cat([tile["raw_row"] for tile in tiles])
        whole: dict[str, Any] = {"names": tiles[0]["names"], "expert": None}
        for name in ("label", "expert"):
            if tiles[0][name] is not None:
                values = torch.cat([tile[name] for tile in tiles])
                whole[name] = torch.full((int(tiles[0]["scan_points"]),), -1).index_put((row,), values)
        return whole

    def program(self) -> Program | str:
        """There is none: voxels, curves and pools depend on the coordinates."""
        return (
            "Which voxels a scan fills decides the sizes of every stage of PointMoE, so there is no graph of fixed "
            "operations on tensors; load the run with moeapps.load."
        )

    def _scans(self, batch: Batch, label: Tensor, records: Sequence[Record]) -> list[dict[str, Any]]:
        """The answer of ``predict_step`` from the labels of the raw points and the records of the pass."""
        choices = [record for record in records if record.routing.num_experts > 1]
        expert = voxel_experts(choices[-1], self.net.rows(batch)) if choices else None
        answers: list[dict[str, Any]] = []
        for i in range(batch.num_graphs):
            start, stop = int(batch.ptr[i]), int(batch.ptr[i + 1])
            own = (batch.inverse >= start) & (batch.inverse < stop)
            inverse = batch.inverse[own]
            domain = self.domain_names[int(batch.domain[i])]
            answers.append(
                {
                    "name": batch.name[i],
                    "domain": domain,
                    "names": list(self.label_sets[domain]),
                    "label": label[own].cpu(),
                    "expert": None if expert is None else expert[inverse].cpu(),
                    "inverse": (inverse - start).cpu(),
                    "pos": batch.pos[start:stop].cpu(),
                    "truth": batch.y[start:stop].cpu(),
                }
            )
            if "raw_pos" in batch:
                origin = torch.tensor(batch.origin[i], dtype=torch.float64)
                answers[-1] |= {
                    "xyz": batch.raw_pos[own].cpu().double() + origin,
                    "raw_row": batch.raw_row[own].cpu(),
                    "scan_points": int(batch.scan_points[i]),
                }
        return answers


def most_likely(answers: dict[str, tuple[Tensor, Tensor]], like_N: Tensor) -> Tensor:
    """Most likely class of each voxel within the label set of its domain: int64 [N]."""
    pred_N = torch.zeros_like(like_N)
    for rows, logits in answers.values():
        pred_N[rows] = logits.argmax(dim=1)
    return pred_N


def voxel_experts(record: Record, rows: list[Tensor]) -> Tensor:
    """Expert with the largest weight for each voxel of a batch in one recorded layer.

    Args:
        record: of a layer of stage i, at resolution i.
        rows: ``PointMoE.rows`` of the same batch.

    Returns:
        int64 [N], -1 where no expert worked.
    """
    return record.chosen()[rows[record.index]]


def _binned(values_N: Tensor, edges: tuple[float, ...]) -> Factor:
    bins_N = torch.bucketize(values_N, torch.tensor(edges, device=values_N.device, dtype=values_N.dtype))
    return Factor(bins_N, len(edges) + 1)
