# SPDX-License-Identifier: Apache-2.0
"""The Lightning side of every task: one ``shared_step``, everything else is done here."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from lightning.pytorch.core.mixins import hparams_mixin
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from moeapps.data.domain import STAGE_ROLES
from moeapps.moe.losses import AuxLoss
from moeapps.moe.ranks import sum_over_ranks
from moeapps.moe.record import Kept, MoERecorder, Record
from moeapps.training.contract import ContractError, check_facts, check_mode, check_output, tell_idle_layers
from moeapps.training.evaluated import Evaluated
from moeapps.training.inputs import AnswersInputs
from moeapps.training.optim import Constant, OptimizerConfig, Schedule
from moeapps.training.placement import is_placed
from moeapps.training.run import run_dir
from moeapps.training.scores import DomainScores
from moeapps.training.shown import Shown
from moeapps.training.sparse import build_optimizer, clip_gradients
from moeapps.training.stages import Origin, Start, freeze_all_but, hold_statistics
from moeapps.training.step import Factor as Factor
from moeapps.training.step import Stage as Stage
from moeapps.training.step import StepOutput as StepOutput

PATIENCE = 50
"""Training batches without a single known label after which a training without any stops."""


class BaseTask(AnswersInputs, Shown, Evaluated):
    """Base class of all task modules.

    A subclass sets the three class variables, defines ``shared_step``, ``configure_metrics`` and, where it makes
    something, ``predict_step``. The base records routing, adds auxiliary losses, keeps metrics per domain and logs
    ``train/...``, ``val/<domain>/<metric>``, ``val/<role>/<metric>``, ``test/...`` and ``test/gap/<metric>``.

    ``needed_facts`` are the entries of ``facts`` without which nothing can be built, ``facts_from`` says in the error
    which data has them. ``monitor`` chooses best.ckpt if at least ``monitor_minimum`` scorable units (called
    ``monitor_unit``) lie behind it, see `moeapps.training.selection`. ``stays_whole``: the network is used between
    steps, too, so that no strategy may cut it over processes. ``in_parts``, of the task or of a module within it: a
    batch may use some of the weights only, which DDP must then look for.

    Args:
        facts: plain values from the data module (linked by the command line); ``facts["domains"]`` names the roles.
        aux_losses: losses on the routing, each added with its own weight and logged as ``train/aux/<name>``.
        optimizer: AdamW's numbers and parameter groups by name pattern.
        schedule: learning-rate schedule over the run.
        start: what the weights begin as, from an earlier run; None draws them. A resumed run does not begin again.
        trained: patterns on full parameter names; only these are trained. None trains all.

    Raises:
        ValueError: ``facts`` without domains or one of ``needed_facts``, or two auxiliary losses of one name.
        StageError: when training begins, if ``start`` or ``trained`` do not fit.
    """

    monitor: ClassVar[str] = "val/validation/loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"
    main_metric: ClassVar[str] = "loss"
    monitor_minimum: ClassVar[int] = 1
    monitor_unit: ClassVar[str] = "items"
    needed_facts: ClassVar[tuple[str, ...]] = ()
    facts_from: ClassVar[str] = "those of the task's data module"
    stays_whole: ClassVar[bool] = False
    in_parts: ClassVar[bool] = False

    def __init__(
        self,
        *,
        facts: dict[str, Any],
        aux_losses: list[AuxLoss] | None = None,
        optimizer: OptimizerConfig | None = None,
        schedule: Schedule | None = None,
        start: Start | None = None,
        trained: list[str] | None = None,
    ) -> None:
        super().__init__()
        if hparams_mixin._given_hyperparameters.get() is not None:
            # Only the command line gives plain values; live modules would make the checkpoint unsafe to load.
            self.save_hyperparameters(logger=False)
        missing = sorted({"domains", *self.needed_facts} - set(facts))
        if missing:
            raise ValueError(
                f"{type(self).__name__}: facts lacks {missing}, it has {sorted(facts)}; the data must be "
                f"{self.facts_from}"
            )
        check_facts(type(self).__name__, facts)
        check_mode(self)
        names = [loss.name for loss in aux_losses or []]
        if len(set(names)) < len(names):
            raise ValueError(f"auxiliary losses {names} share a name; give each its own")
        self.facts = facts
        self.aux_losses = nn.ModuleList(aux_losses or [])
        self.optimizer_config = optimizer or OptimizerConfig()
        self.schedule = schedule or Constant()
        self.start, self.trained = start, trained
        self.origin: Origin | None = None
        self.scores: dict[str, DomainScores] = {}
        self.last_records: list[Record] = []
        self.last_answer: Callable[[], Any] | None = None
        self.last_loss: Tensor | None = None  # of the task alone, of the last training step that had one
        self.last_domain: str | None = None
        self.record_keeps: Collection[Kept] = ()  # what callbacks want of the next test batch's records
        self._last_step = 0
        self._label_seen = self._labels_told = False
        self._steps_without = 0
        self._trained: dict[str, int] = {}
        self._begun = False
        self._ran: set[str] | None = set()  # MoE layers so far; None once they were looked at
        self._checked: set[str] = set()
        self.stop_asked: type[BaseException] | None = None  # to be raised after the step, see InterruptCheckpoint

    # What a subclass provides -------------------------------------------------------------------------------------

    def shared_step(self, batch: Any, stage: Stage) -> StepOutput:
        """Return loss and metric arguments of one batch."""
        raise ContractError(f"{type(self).__name__} must define shared_step(batch, stage)")

    def configure_metrics(self, domain: str) -> MetricCollection:
        """Return fresh metrics for one domain; their names are the ``<metric>`` of the keys."""
        return MetricCollection({})

    def prediction_writer(self) -> L.Callback | None:
        """Return what writes the answers of ``predict``; None keeps them as they are, one ``.pt`` file per batch."""
        return None

    def num_tokens(self, batch: Any) -> int:
        """Return how many tokens (points, frames, pixels, rows) a batch holds: the unit of FLOPs per token."""
        raise ContractError(f"{type(self).__name__} must define num_tokens(batch)")

    def routing_factors(self, batch: Any) -> dict[str, Factor]:
        """Return what is known about the rows that layers route: class, time, place ...; for reports, never a loss.

        Labels may be of the first rows alone; further ones are then left out of reports.
        """
        return {}

    def routed_rows(self, batch: Any) -> list[Tensor] | None:
        """Return, where layers route at several resolutions, which row of stage 0, 1, ... holds what a label is of.

        None: labels are those of the rows themselves.
        """
        return None

    # Steps --------------------------------------------------------------------------------------------------------

    def recorded_step(self, batch: Any, stage: Stage) -> StepOutput:
        """Run ``shared_step`` under a recorder and keep records and answer for losses and callbacks."""
        with MoERecorder(self, keep=self.record_keeps) as recorder:
            out = self.shared_step(batch, stage)
        check_output(self, out, StepOutput)
        self.last_records, self.last_answer = recorder.records, out.answer
        if self._ran is not None:
            self._ran |= {record.name for record in recorder.records}
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss plus the weighted auxiliary losses, and log its parts."""
        self.last_domain = None
        out = self.recorded_step(batch, "train")
        total = self.with_aux_losses(out.loss, out.batch_size)
        for name, value in out.logs.items():
            if out.weight and not (out.labelled is not None and value.isnan()):  # not defined: no label in this batch
                self.log_train(name, value, out.batch_size)
        if out.weight:
            self.last_loss = out.loss.detach()
            self.log_train("loss", out.loss, out.batch_size, prog_bar=True)
        self._expect_labels(out.weight)
        optimizers = self.trainer.optimizers
        if optimizers:
            self.log_train("lr", torch.tensor(float(optimizers[0].param_groups[0]["lr"])), out.batch_size)
        return total

    def step_kinds(self, steps: int, planned: int) -> dict[str, int]:
        """Return how many of the first ``steps`` training steps are of each kind, where kinds differ in compute.

        Work between the steps that costs as much (MixER's fits of its gate) is a kind of its own.

        Args:
            steps: steps taken.
            planned: steps of the whole run, should the kind of a step depend on it.
        """
        return {"step": steps}

    def differentiate(self, batch: Any, kind: str) -> None:
        """Run forward and backward of one training step of a kind, for a count of its FLOPs; nothing is logged.

        A task that defines its own ``training_step`` says here what such a step runs.
        """
        out = self.recorded_step(batch, "train")
        total = out.loss
        for aux in cast(list[AuxLoss], list(self.aux_losses)):
            total = total + aux.value(self.last_records)
        total.backward()

    def with_aux_losses(self, loss: Tensor, batch_size: int) -> Tensor:
        """Return ``loss`` plus every weighted auxiliary loss on the last records; log each without its weight."""
        for aux in cast(list[AuxLoss], list(self.aux_losses)):
            value = aux.value(self.last_records)
            loss = loss + aux.weight * value
            self.log_train(f"aux/{aux.name}", value, batch_size)
        return loss

    def _expect_labels(self, labelled: int) -> None:
        """Stop a training that has met no label, after some steps or at the end of the first epoch.

        Raises:
            ValueError: there was none so far.
        """
        if self._labels_told:
            return
        self._label_seen = self._label_seen or labelled > 0
        self._steps_without += 1
        self._labels_told = self._steps_without >= PATIENCE or cast(Any, self.trainer).is_last_batch
        if self._labels_told and not sum_over_ranks(torch.tensor(int(self._label_seen), device=self.device)):
            raise ValueError(
                f"no item of the first {self._steps_without} training batches has a known label, so nothing can be "
                f"learned; look at the labels of the seen domains {self.facts['domains']['seen']} (names of classes, "
                "ids to ignore, masks)"
            )

    @property
    def logs_now(self) -> bool:
        """Whether loggers (``log_every_n_steps``) or the end of the epoch will read the scalars of this step.

        A call of Lightning's ``log`` costs half a millisecond, and a step of a small network takes ten.
        """
        trainer = cast(Any, self.trainer)
        if trainer.barebones:
            return False
        return bool(trainer._logger_connector.should_update_logs or trainer.is_last_batch or trainer.fast_dev_run)

    def log_train(self, name: str, value: Tensor, batch_size: int, *, prog_bar: bool = False) -> None:
        """Log one training scalar of this step as ``train/<name>``, at the steps whose scalars are kept."""
        if not self.logs_now:
            return
        self.log(
            f"train/{name}", value.detach(), batch_size=batch_size, prog_bar=prog_bar, on_step=True, on_epoch=False
        )

    # Around a run -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Build the metrics of every configured domain, once, and agree with the other processes on the run folder."""
        run_dir(self.trainer)
        if stage == "fit" and self.trained is not None:  # before an optimizer or a strategy asks what has gradients
            freeze_all_but(self, self.trained)
        roles = cast(dict[str, list[str]], self.facts["domains"])
        for name, wanted in STAGE_ROLES.items():
            if name not in self.scores:
                domains: dict[str, str] = {domain: role for role in wanted for domain in roles[role]}
                self.scores[name] = DomainScores(domains, self.configure_metrics)
                self.add_module(f"{name}_scores", self.scores[name])
        # A checkpoint is loaded before Lightning converts the module: double weights would be rounded to single ones.
        self.trainer.precision_plugin.convert_module(self)

    def configure_model(self) -> None:
        """Let the strategy place the network, where it spreads networks over processes.

        Raises:
            ValueError: a strategy for networks that place themselves, which ours do not.
        """
        strategy = None if self._trainer is None else self._trainer.strategy
        spread = getattr(strategy, "spread", None)
        if spread is not None:
            if cast(Any, self.trainer).state.fn == "fit":
                self.begin()  # weights to start from are whole
            spread(self)
        elif isinstance(strategy, ModelParallelStrategy):
            raise ValueError(
                "ModelParallelStrategy leaves it to the network to place itself; use "
                "moeapps.training.parallel.ModelParallel, as configs/trainer/ep.yaml and fsdp2.yaml do"
            )
        elif isinstance(strategy, DDPStrategy) and any(getattr(part, "in_parts", False) for part in self.modules()):
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)

    def on_fit_start(self) -> None:
        """Begin with the weights of an earlier run, where there is one to start from."""
        self.begin()

    def begin(self) -> None:
        """Take over the weights of an earlier run, once, unless the training is resumed: then they are its own.

        Raises:
            StageError: a checkpoint that is missing or of another network.
        """
        if self.start is not None and not self._begun and self.trainer.ckpt_path is None:
            self.origin = self.start.begin(self, self.data)
        self._begun = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the run started from."""
        if self.origin is not None:
            checkpoint["started_from"] = self.origin.as_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note how far the training of the checkpoint had come, and what it had started from, for results."""
        self._trained = {name: int(checkpoint[name]) for name in ("epoch", "global_step") if name in checkpoint}
        if "started_from" in checkpoint:
            self.origin = Origin.of(checkpoint["started_from"])

    def on_train_start(self) -> None:
        """Remember where the optimizer stands (a resumed run does not start at 0); hold what is frozen."""
        self._trained = {}  # from here on the weights are those of no checkpoint, until one is loaded
        self._last_step = self.trainer.global_step
        if self.trained is not None:
            hold_statistics(self)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let go of the records, which hold the step's graph; tell the losses if the optimizer has stepped.

        This is the last that hears of a step: if Ctrl-C came in it, training stops here, unless more batches are to be
        accumulated: no checkpoint holds the gradients so far.

        Raises:
            KeyboardInterrupt: it did.
            SIGTERMException: SIGTERM came in it, and there are several processes.
        """
        self.last_records = []
        if self._ran is not None:
            tell_idle_layers(self, self._ran)
            self._ran = None
        if self.trainer.global_step != self._last_step:
            self._last_step = self.trainer.global_step
            for aux in cast(list[AuxLoss], list(self.aux_losses)):
                aux.on_optimizer_step()
        if self.stop_asked is not None and not cast(Any, self.trainer).fit_loop._should_accumulate():
            raise self.stop_asked

    # Optimisation -------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with the configured groups and the schedule over the trainer's total number of steps.

        Embeddings with sparse gradients are stepped by SparseAdam, joined with it.

        Raises:
            ValueError: the training has no end.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError(
                "max_epochs=-1 gives the training no end, which its schedule counts on; give --trainer.max_epochs or "
                "--trainer.max_steps, and --trainer.max_time as well if it may end earlier"
            )
        optimizer = build_optimizer(self, self.optimizer_config)
        scheduler = self.schedule(optimizer, max(1, int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says; sparse and spread gradients by our own function, since torch's knows neither."""
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        ours = is_placed(self) or any(p.grad is not None and p.grad.is_sparse for p in held)
        if gradient_clip_val is None or not ours:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            clip_gradients(held, float(gradient_clip_val), gradient_clip_algorithm or "norm")
