# SPDX-License-Identifier: Apache-2.0
"""Model summary that knows experts: total and ACTIVE parameters, FLOPs per token and of the whole training."""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table
from torch import nn
from typing_extensions import override

from moeapps.moe import MoELayer
from moeapps.moe.ranks import alone
from moeapps.moe.routers.chooser import Pool
from moeapps.training.cost import Cost, TrainingCost, measure_cost, measure_training
from moeapps.training.placement import is_placed
from moeapps.training.task import BaseTask

_CHOICES: dict[Pool, str] = {
    "row": "chosen for each row by itself",
    "group": "chosen among the rows of its group",
    "batch": "chosen among ALL rows of a batch",
}


TWIN_NAMES = {"flops": "active FLOPs", "params": "parameters"}
TWIN_TOLERANCE = 0.02
log = logging.getLogger("moeapps")


class MoESummary(L.Callback):
    """Print parts, MoE layers, total and active parameters and FLOPs per token and of the training before it begins.

    Training steps are counted as they are taken, so that results say what was spent, over interruptions too, and with
    what the runs had spent that this one started from.

    Args:
        depth: levels of sub-modules in the table, >= 1.
    """

    def __init__(self, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth} shows nothing; use 1 or more, or trainer.enable_model_summary false")
        self.depth = depth
        self.cost: Cost | None = None
        self.training: TrainingCost | None = None
        self.steps = 0
        self._earlier: int | None = None
        self._task: BaseTask | None = None  # once this process trains it
        self._resumes = False

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        task = cast(BaseTask, pl_module)
        task.begin()  # what is measured are the weights that training begins with
        self.training, self._task = self._measure_training(trainer, task), task
        self._measure(trainer, task, show=True)
        if trainer.world_size > 1 and trainer.is_global_zero:
            tell_of_batch_statistics(task)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Save how many steps were taken and what they have cost."""
        return {"steps": self.steps, "train_flops": self.train_flops}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whether a training goes on: that of a network in parts is told only once it has begun."""
        self._resumes = trainer.state.fn == TrainerFn.FITTING

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from there; after a training in this process the checkpoint is but the best of its own."""
        if self._task is None or self._resumes:
            self.steps = int(state_dict.get("steps", 0))
            self._earlier = state_dict.get("train_flops")

    @property
    def train_flops(self) -> int | None:
        """What the training steps so far have cost, with those of the runs it started from; None if not known."""
        if self._task is None:
            return self._earlier
        if self.training is None:  # what was spent before this training is not all
            return None
        before = 0 if self._task.origin is None else self._task.origin.train_flops
        own = self.training.flops(self._task.step_kinds(self.steps, self.training.steps))
        return None if before is None else before + own

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure for the results file, if that has not happened."""
        self._measure(trainer, cast(BaseTask, pl_module), show=False)

    on_validation_start = on_test_start

    def describe_run(self) -> dict[str, Any]:
        """Return parameters, active parameters, FLOPs per token and of the training for the results file."""
        if self.cost is None:
            return {}
        spent = self.train_flops
        return {
            "params_total": self.cost.total,
            "params_active": self.cost.active,
            "flops_per_token": self.cost.flops_per_token,
            **({} if spent is None else {"train_flops": spent, "train_steps": self.steps}),
        }

    def _measure_training(self, trainer: L.Trainer, task: BaseTask) -> TrainingCost | None:
        """Every process asks for the number of steps, which builds the loaders; the first one counts."""
        batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        if not trainer.is_global_zero or not math.isfinite(batches) or is_placed(task):
            return None
        first = task.data.first_training_batch()
        with alone():  # the other processes train on: what routers and losses ask of them must not be waited for
            return measure_training(task, first, int(batches), trainer.precision_plugin, trainer.world_size)

    def _measure(self, trainer: L.Trainer, task: BaseTask, *, show: bool) -> None:
        if self.cost is None and trainer.is_global_zero and not is_placed(task):  # no process can run it by itself
            with alone():
                self.cost = measure_cost(task, task.data.example_batch(), trainer.precision_plugin)
            if show:
                warn_of_twin(self.cost)
                Console().print(summary_table(task, self.cost, self.depth, self.training))


def tell_of_batch_statistics(task: nn.Module) -> None:
    """Say once that each process normalises by its own rows, what that means and what can be done."""
    kinds: dict[str, bool] = {}
    for module in task.modules():
        own = dict(module.named_buffers(recurse=False))
        if hasattr(module, "momentum") and own and not isinstance(module, nn.SyncBatchNorm):
            kinds[type(module).__name__] = isinstance(module, nn.modules.batchnorm._BatchNorm)
    if not kinds:
        return
    torch_own = [name for name, known in kinds.items() if known]
    joined = f"--trainer.sync_batchnorm true joins those of {', '.join(torch_own)} (on GPUs)" if torch_own else ""
    log.info(
        "batch statistics (%s) are of the rows of each process, and those of the first are saved, so that n processes "
        "do not equal one with n times the batch; %s",
        ", ".join(sorted(kinds)),
        joined or "larger batches bring both closer",
    )


def warn_of_twin(cost: Cost) -> None:
    """Warn where a dense twin is not matched within 2 per cent."""
    if cost.twin is not None and abs(cost.twin[1] - 1) > TWIN_TOLERANCE:
        match, ratio = cost.twin
        log.warning(
            "this dense twin has %.3f of the mixture's %s; at most %.0f per cent apart is fair: change the mixture's "
            "widths so that they divide, or report it beside the numbers",
            ratio,
            TWIN_NAMES[match],
            100 * TWIN_TOLERANCE,
        )


def summary_table(task: L.LightningModule, cost: Cost, depth: int, training: TrainingCost | None = None) -> Table:
    """Return a rich table of the sub-modules with parameters, and the totals below."""
    table = Table(title="model")
    table.add_column("part")
    table.add_column("type")
    table.add_column("parameters", justify="right")
    for name, module in task.named_modules():
        size = sum(parameter.numel() for parameter in module.parameters())
        if name and name.count(".") < depth and size:
            table.add_row("  " * name.count(".") + name, type(module).__name__, f"{size:,}")
    table.add_section()
    frozen = cost.total - cost.trainable
    table.add_row("total", f"of which {frozen:,} frozen" if frozen else "", f"{cost.total:,}")
    table.add_row("active per token", "", f"{cost.active:,}")
    table.add_row("FLOPs per token (forward)", "", f"{cost.flops_per_token:,.0f}")
    if cost.twin is not None:
        match, ratio = cost.twin
        table.add_row("dense twin", f"{TWIN_NAMES[match]} over the mixture's", f"{ratio:.3f}")
    if training is not None:
        told = f"{training.steps:,} steps, forward and backward"
        table.add_row("FLOPs of the training", told, f"{training.flops():.4g}")
    origin = getattr(task, "origin", None)
    if origin is not None:
        spent = "not known" if origin.train_flops is None else f"{origin.train_flops:.4g}"
        table.add_row("FLOPs of earlier stages", "", spent)
    if cost.layers:
        table.add_row("MoE layers", experts_of(cost), str(len(cost.layers)))
        if any(layer.num_experts > 1 for layer in cost.layers):
            table.add_row("experts in evaluation", choice_of(task), "")
    return table


def experts_of(cost: Cost) -> str:
    """Say how many experts of a layer work for a token."""
    kinds = {(layer.num_experts, round(layer.mean_k, 2)) for layer in cost.layers}
    if all(num_experts == 1 for num_experts, _ in kinds):
        return "dense: one expert, always on"
    if len(kinds) > 1:
        return "several kinds"
    num_experts, mean_k = kinds.pop()
    return f"{mean_k:.3g} of {num_experts} experts"


def choice_of(task: nn.Module) -> str:
    """Say which other rows decide a row's experts in evaluation."""
    pools = {layer.router.pool for layer in task.modules() if isinstance(layer, MoELayer)}
    return "; ".join(text for pool, text in _CHOICES.items() if pool in pools)
