# SPDX-License-Identifier: Apache-2.0
"""How the gate divides the trained environments: against the hidden families, over training, in numbers and a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from torch import Tensor

from moeapps.training.callbacks.router_fit import RouterFit, fitted_routers
from moeapps.training.run import run_dir, write_json
from tasks.dynamics.metrics import adjusted_rand_index, purity

if TYPE_CHECKING:
    from tasks.dynamics.module import DynamicsTask


class PartitionReport(L.Callback):
    """Log ``moe/partition/ari``, ``/purity`` and ``/experts`` at every validation; write metrics/partition.json.

    Results files get a group ``partition`` with these and, for fitted gates, the share of abandoned fits, the number of
    fits and seconds per fit, and for all the number of skipped steps. The hidden families are read here and nowhere in
    training.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self._last: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self.history = state_dict["history"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember who went where."""
        task = cast("DynamicsTask", pl_module)
        expert_E = self.experts(task)
        self.history.append({"step": int(task.inner_step), "expert": expert_E.tolist()})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the scores of the partition."""
        if not trainer.sanity_checking:
            for name, value in self.measure(trainer, cast("DynamicsTask", pl_module)).items():
                pl_module.log(f"moe/partition/{name}", value, batch_size=1, rank_zero_only=True)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, for the results file, and write the history."""
        task = cast("DynamicsTask", pl_module)
        self._last = self.measure(trainer, task)
        folder = run_dir(trainer)
        if folder is not None and trainer.is_global_zero:
            data = task.training_data()
            names = cast(list[str], task.facts.get("families", []))
            content = {
                "environments": task.facts.get("environments", []),
                "family": [names[f] if 0 <= f < len(names) else str(f) for f in data.family.tolist()],
                "expert": self.experts(task).tolist(),
                "context": task.net.contexts.tolist(),
                "history": self.history,
                **self._last,
            }
            write_json(folder / "metrics" / "partition.json", content)

    def describe_results(self) -> dict[str, Any]:
        """Return the numbers of the last test for the results file."""
        return {"partition": self._last} if self._last else {}

    def experts(self, task: DynamicsTask) -> Tensor:
        """The expert of every trained environment, int64 [E]."""
        with torch.no_grad():
            return task.net.best_experts(task.net.contexts, task.net.group(task.training_data()))

    def measure(self, trainer: L.Trainer, task: DynamicsTask) -> dict[str, float]:
        """Return scores of the partition and counts of the training."""
        expert_E, family_E = self.experts(task), task.training_data().family
        values = {
            "ari": adjusted_rand_index(expert_E, family_E),
            "purity": purity(expert_E, family_E),
            "experts": float(len(expert_E.unique())),
            "skipped": float(task.skipped),
        }
        for router in fitted_routers(task).values():
            calls = max(1, int(router.partition.calls))
            values |= {"fits": float(router.partition.calls), "abandoned": float(router.partition.abandoned) / calls}
            for callback in cast(Any, trainer).callbacks:
                if isinstance(callback, RouterFit) and callback.seconds:
                    values["seconds_per_fit"] = callback.seconds / calls
        return values
