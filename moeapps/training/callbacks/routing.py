# SPDX-License-Identifier: Apache-2.0
"""Routing statistics: load, entropy and specialisation of every MoE layer, from counts alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.files import write_json
from moeapps.moe.metrics import dead_fraction, load, load_cv, mutual_information, token_entropy
from moeapps.moe.objectives import counted_rows
from moeapps.moe.ranks import sum_over_ranks, sums_of_all_ranks
from moeapps.moe.record import Record
from moeapps.moe.routing import DenseRouting, Routing
from moeapps.training.callbacks.side import SideReport
from moeapps.training.run import run_dir
from moeapps.training.task import BaseTask

log = logging.getLogger("moeapps")


@dataclass
class _Layer:
    """Sums of one layer in float64.

    Work per domain and expert [S, E], entropy times rows, rows, and rows by how many experts worked on them [E + 1].
    """

    table_SE: Tensor
    entropy: Tensor
    rows: Tensor
    workers: Tensor


def expert_work(record: Record) -> Tensor:
    """Return what each expert got in one call, float64 [E]: assignments, or sizes of weights where all experts run."""
    if isinstance(record.routing, Routing):
        return record.routing.counts().double()
    weight_NE = record.routing.assignment().detach().double().abs()
    return (weight_NE if record.token_mask is None else weight_NE[record.token_mask]).sum(0)


def rows_by_workers(routing: Routing) -> Tensor:
    """Count rows by how many experts work on them, float64 [E + 1]."""
    real_M = (routing.expert_M < routing.num_experts).long()
    workers_N = torch.zeros(routing.num_rows, dtype=torch.int64, device=real_M.device)
    workers_N = workers_N.index_add(0, routing.row_M, real_M).clamp(max=routing.num_experts)
    return torch.bincount(workers_N, minlength=routing.num_experts + 1).double()


def routing_entropy(record: Record) -> tuple[float | Tensor, int]:
    """Return the mean entropy of the router's probabilities in nats and the number of rows; (0, 0) without any."""
    probs = record.routing.probs_NE
    if probs is None:
        return 0.0, 0
    probs_NE = counted_rows(record, probs.detach())
    return token_entropy(probs_NE), len(probs_NE)


class RoutingMonitor(SideReport):
    """Watch the routing of every MoE layer.

    At every evaluation it logs ``moe/<layer>/load_cv``, ``/entropy`` (nats), ``/dead`` (fraction of experts below
    1 percent of the mean load) and ``/mi_domain`` (mutual information of expert and domain over the entropy of the
    domains), writes metrics/routing_<stage>.json and figures/routing_<stage>.png (expert by domain; none where all
    layers have one expert), and warns once when an expert collapses. While training it logs
    ``moe/<layer>/train_load_cv`` of the steps since the last log.

    Args:
        figures: write the heat maps, and show them in TensorBoard where that is on.
        min_mean_load: work per expert and evaluation below which nothing is said about collapse.
    """

    joins_processes = True

    def __init__(self, figures: bool = True, min_mean_load: float = 20.0) -> None:
        self.figures = figures
        self.min_mean_load = min_mean_load
        self._layers: dict[str, _Layer] = {}
        self._always: set[str] = set()
        self._given: dict[str, int] = {}
        self._train: dict[str, Tensor] = {}
        self._domains: list[str] = []
        self._warned = False

    # Training -----------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the counts of the step; log at the trainer's logging steps."""
        for record in cast(BaseTask, pl_module).last_records:
            work_E = expert_work(record)
            earlier_E = self._train.get(record.name)
            self._train[record.name] = work_E if earlier_E is None else earlier_E + work_E
        if self._train and (trainer.fit_loop.epoch_loop.batch_idx + 1) % cast(Any, trainer).log_every_n_steps == 0:
            for name, own_E in self._train.items():
                work_E = sum_over_ranks(own_E)  # a mean of the processes' own would be larger
                pl_module.log(f"moe/{name}/train_load_cv", load_cv(work_E).float(), batch_size=1, sync_dist=True)
            self._train = {}

    # Evaluation ---------------------------------------------------------------------------------------------------

    @override
    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._domains = cast(BaseTask, pl_module).data.eval_domains("test" if trainer.testing else "val")
        self._layers = {}

    on_validation_epoch_start = on_test_epoch_start

    @override
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        task = cast(BaseTask, pl_module)
        for record in task.last_records:
            work_E = expert_work(record)
            if record.name not in self._layers:
                table_SE = work_E.new_zeros(len(self._domains), len(work_E))
                zeros = (work_E.new_zeros(()), work_E.new_zeros(()), work_E.new_zeros(len(work_E) + 1))
                self._layers[record.name] = _Layer(table_SE, *zeros)
            if isinstance(record.routing, DenseRouting):
                self._always.add(record.name)
            layer = self._layers[record.name]
            if isinstance(record.routing, Routing):
                self._given[record.name] = record.routing.num_given
                layer.workers += rows_by_workers(record.routing)
            layer.table_SE[self._domains.index(str(task.last_domain))] += work_E
            entropy, rows = routing_entropy(record)
            layer.entropy += entropy * rows
            layer.rows += rows

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log, write and warn (not after the sanity check)."""
        if not trainer.sanity_checking:
            self._finish(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, pl_module, "test")

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = run_dir(trainer)
        self._join(pl_module.device)
        if not self._layers:
            return
        result: dict[str, dict[str, Any]] = {}
        for name, layer in self._layers.items():
            result[name] = layer_report(layer.table_SE, layer.entropy / layer.rows.clamp_min(1.0))
            result[name]["always"] = name in self._always  # every expert works on every row, whatever is routed
            result[name]["per_row"] = same_for_all(layer.workers)
            result[name]["given"] = self._given.get(name, 0)  # the last ones, which the router is told to use
            for key in ("load_cv", "entropy", "dead", "mi_domain"):
                prefix = "moe" if stage == "val" else "moe_test"
                pl_module.log(f"{prefix}/{name}/{key}", result[name][key], batch_size=1, sync_dist=True)
        if trainer.is_global_zero:
            self._warn(result)
            if folder is not None:
                write_json(folder / "metrics" / f"routing_{stage}.json", {"domains": self._domains, "layers": result})
                last = stage == "test" or trainer.state.fn != "fit" or trainer.current_epoch + 1 == trainer.max_epochs
                if self.figures and last:
                    self._draw(trainer, result, stage)

    def _join(self, device: torch.device) -> None:
        """Sum over processes; one that had padding batches alone has no layer of its own."""
        parts = {(name, part): value for name, layer in self._layers.items() for part, value in vars(layer).items()}
        found = sums_of_all_ranks(parts, device)
        self._layers = {
            name: _Layer(value, found[name, "entropy"], found[name, "rows"], found[name, "workers"])
            for (name, part), value in found.items()
            if part == "table_SE"
        }

    def _warn(self, result: dict[str, dict[str, Any]]) -> None:
        """Say once that experts have collapsed: below 1 percent of the mean load."""
        found = []
        for name, report in result.items():
            work_E = torch.tensor(report["work"], dtype=torch.float64).sum(0)
            if float(work_E.mean()) >= self.min_mean_load:
                found += [(name, e, float(x)) for e, x in enumerate(load(work_E)) if float(x) < 0.01]
        if found and not self._warned:
            name, expert, share = found[0]
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            log.warning(
                "expert %d of %s%s got %.2g of the mean load in an evaluation: it is almost unused. If that lasts "
                "beyond the first steps, balance the router (aux_losses, BiasBalancing) or use fewer experts",
                expert, name, more, share,
            )  # fmt: skip
            self._warned = True

    def _draw(self, trainer: L.Trainer, result: dict[str, dict[str, Any]], stage: str) -> None:
        from PIL import Image

        from moeapps.reporting.figures import save_figure
        from moeapps.reporting.routing import routing_figure

        folder = run_dir(trainer)
        if folder is None:
            return
        figure = routing_figure(result, self._domains)
        if figure is None:
            return
        path = folder / "figures" / f"routing_{stage}.png"
        save_figure(figure, path)
        for logger in trainer.loggers:
            if isinstance(logger, L.pytorch.loggers.TensorBoardLogger):
                with Image.open(path) as drawn:  # once: the file holds what TensorBoard would draw
                    image = np.asarray(drawn.convert("RGB"))
                logger.experiment.add_image(f"routing/{stage}", image, trainer.global_step, dataformats="HWC")


def same_for_all(workers: Tensor) -> int | None:
    """Return how many experts work on each row that has any; None where that differs or is not counted."""
    found = workers[1:].nonzero().flatten() + 1
    return int(found) if len(found) == 1 else None


def layer_report(table_SE: Tensor, entropy: Tensor) -> dict[str, Any]:
    """Return the numbers of one layer as plain values.

    Args:
        table_SE: float64 [S, E], work of each expert for each domain.
        entropy: mean entropy of the router's probabilities in nats.
    """
    work_E = table_SE.sum(0)
    return {
        "num_experts": len(work_E),
        "load_cv": float(load_cv(work_E)),
        "entropy": float(entropy),
        "dead": float(dead_fraction(work_E)),
        "mi_domain": float(mutual_information(table_SE, torch.arange(len(table_SE), device=table_SE.device))),
        "work": table_SE.tolist(),
    }
