# SPDX-License-Identifier: Apache-2.0
"""How the gate divides the trained environments: against the hidden families, over training, in numbers and a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from moeapps.files import write_json
from moeapps.moe import MoERecorder
from moeapps.reporting.figures import save_figure
from moeapps.training.callbacks.report import writing_dir
from moeapps.training.callbacks.router_fit import RouterFit, fitted_routers
from moeapps.training.callbacks.side import SideReport
from tasks.dynamics.data.fields import ODEBENCH_ALIKE
from tasks.dynamics.metrics import adjusted_rand_index, merged, purity
from tasks.dynamics.report.figures import gate_figure

if TYPE_CHECKING:
    from tasks.dynamics.module import DynamicsTask


class PartitionReport(SideReport):
    """Log ``moe/partition/ari``, ``/purity`` and ``/experts`` at every validation; write metrics/partition.json.

    Results files get a group ``partition`` with these, ``ari_identifiable`` (families of one field count as one), the
    number of skipped steps and, for fitted gates, of fits and the share of abandoned ones. The hidden families are read
    here and nowhere in training.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self._last: dict[str, float] = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember who went where."""
        task = cast("DynamicsTask", pl_module)
        expert_S = self.experts(task)
        self.history.append({"step": int(task.inner_step), "expert": expert_S.tolist()})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the scores of the partition."""
        if not trainer.sanity_checking:
            for name, value in self.measure(trainer, cast("DynamicsTask", pl_module)).items():
                pl_module.log(f"moe/partition/{name}", value, batch_size=1, rank_zero_only=True)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, for the results file, and write the history."""
        task = cast("DynamicsTask", pl_module)
        self._last = self.measure(trainer, task)
        folder = writing_dir(trainer)
        if folder is not None:
            data = task.training_data()
            names = cast(list[str], task.facts.get("families", []))
            content = {
                "environments": task.facts.get("environments", []),
                "family": [names[f] if 0 <= f < len(names) else str(f) for f in data.family.tolist()],
                "expert": self.experts(task).tolist(),
                "context": task.net.contexts.tolist(),
                "history": self.history,
                "seconds_per_fit": self._seconds_per_fit(trainer),
                **self._last,
            }
            write_json(folder / "metrics" / "partition.json", content)

    def describe_results(self) -> dict[str, Any]:
        """Return the numbers of the last test for the results file."""
        return {"partition": self._last} if self._last else {}

    def experts(self, task: DynamicsTask) -> Tensor:
        """The expert of every trained environment, int64 [S]; -1 for none."""
        layer = task.net.layer
        was = layer.training
        layer.eval()  # while training, a gate that warms up draws experts, from the random numbers of the training
        with torch.no_grad(), MoERecorder(task) as recorder:
            task.net.route(task.net.contexts, task.net.group(task.training_data()))
        layer.train(was)
        return recorder.records[0].chosen()

    def measure(self, trainer: L.Trainer, task: DynamicsTask) -> dict[str, float]:
        """Return scores of the partition and counts of the training."""
        expert_S, family_S = self.experts(task), task.training_data().family
        names = cast(list[str], task.facts.get("families", []))
        values = {
            "ari": adjusted_rand_index(expert_S, family_S),
            "ari_identifiable": adjusted_rand_index(expert_S, merged(family_S, names, ODEBENCH_ALIKE)),
            "purity": purity(expert_S, family_S),
            "experts": float(len(expert_S.unique())),
            "skipped": float(task.skipped),
        }
        for router in fitted_routers(task).values():
            calls = max(1, int(router.partition.calls))
            values |= {"fits": float(router.partition.calls), "abandoned": float(router.partition.abandoned) / calls}
        return values

    def _seconds_per_fit(self, trainer: L.Trainer) -> float | None:
        """Wall seconds of a fit on average; None without a fitted gate or where this process has not trained."""
        fits = [c for c in cast(Any, trainer).callbacks if isinstance(c, RouterFit) and c.steps >= c.every]
        return fits[0].seconds / (fits[0].steps // fits[0].every) if fits else None


class GatePicture(SideReport):
    """Draw figures/gate.png after a test: the expert of every trained environment over training."""

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw what the partition report remembers."""
        task, folder = cast("DynamicsTask", pl_module), writing_dir(trainer)
        history = [c.history for c in cast(Any, trainer).callbacks if isinstance(c, PartitionReport)]
        if folder is None or not history or not history[0]:
            return
        steps, experts = (np.array([entry[key] for entry in history[0]]) for key in ("step", "expert"))
        names = cast(list[str], task.facts.get("families", []))
        figure = gate_figure("experts over training", steps, experts, task.training_data().family.cpu().numpy(), names)
        save_figure(figure, folder / "figures" / "gate.png")
