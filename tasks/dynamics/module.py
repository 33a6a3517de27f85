# SPDX-License-Identifier: Apache-2.0
"""The Lightning side of MixER: proximal alternating minimisation, fitted gates, adaptation, scores of roll-outs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MetricCollection
from typing_extensions import override

from moeapps.moe.record import record_call
from moeapps.training.callbacks import RouterFit
from moeapps.training.callbacks.router_fit import fitted_routers
from moeapps.training.inputs import Program
from moeapps.training.optim import build_adamw
from moeapps.training.shown import Pictures
from moeapps.training.task import BaseTask, Factor, Stage, StepOutput
from tasks.dynamics.data.batch import Trajectories, collate_environments
from tasks.dynamics.losses import scaled_errors, scored_samples
from tasks.dynamics.metrics import environment_errors, trajectory_metrics
from tasks.dynamics.model import FieldMixER, MixER
from tasks.dynamics.nets.adaptation import Adaptation, Adapted, TryExperts
from tasks.dynamics.nets.alternation import Alternation, Phase
from tasks.dynamics.nets.programs import StateProgram
from tasks.dynamics.report.figures import trajectory_figure
from tasks.dynamics.report.partition import PartitionReport
from tasks.dynamics.report.predictions import TrajectoryWriter

log = logging.getLogger("moeapps")
FIT = "fit of the gate"


class DynamicsTask(BaseTask):
    """Reconstruction of families of dynamical systems from the trajectories of their environments.

    Trained environments keep a context; validation and test roll out new initial conditions of theirs, and first adapt
    a fresh context to the support trajectories of every other environment. Errors are divided by the mean squared
    increment of their environment, so that families of all sizes count the same.

    Args:
        net: makes the network from the facts.
        facts: from the data module: ``domains``, ``num_environments``, ``state_dim`` and ``kind``.
        alternation: steps on contexts and weights.
        gate_every: steps between two fits of a fitted gate; without effect on other gates.
        context_lr: Adam's step size for the contexts, under the same schedule.
        adaptation: how new environments get a context; None means `TryExperts`.
        options: further arguments of `BaseTask`: ``aux_losses``, ``optimizer`` (Adam's numbers for the weights;
            published: AdaBelief, no decay) and ``schedule`` (of contexts and weights, each over its own steps).

    Raises:
        ValueError: ``facts`` lacks an entry, or the data is of another kind than the network.
    """

    monitor: ClassVar[str] = "val/validation/relative_mse_median"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"
    main_metric: ClassVar[str] = "relative_mse_median"
    monitor_minimum: ClassVar[int] = 4
    monitor_unit: ClassVar[str] = "environments"
    headlines: ClassVar[Mapping[str, str]] = {
        "partition/ari": "hidden families found by the experts (adjusted Rand index, 1 at best)",
        "partition/experts": "experts in use",
    }
    needed_facts: ClassVar[tuple[str, ...]] = ("num_environments", "state_dim", "kind")
    stays_whole: ClassVar[bool] = True  # the gate is fitted between steps, which average their gradients themselves
    inner_step: Tensor
    skipped: Tensor

    def __init__(
        self,
        *,
        net: Callable[[dict[str, Any]], MixER],
        facts: dict[str, Any],
        alternation: Alternation | None = None,
        gate_every: int = 2,
        context_lr: float = 5e-3,
        adaptation: Adaptation | None = None,
        **options: Any,
    ) -> None:
        super().__init__(facts=facts, **options)
        if gate_every < 1 or not context_lr > 0:
            raise ValueError(f"gate_every={gate_every} must be 1 or more and context_lr={context_lr} above 0")
        self.automatic_optimization = False
        self.net = net(facts)
        if self.net.kind != facts["kind"]:
            raise ValueError(
                f"the data is a {facts['kind']}, but {type(self.net).__name__} models a {self.net.kind}; use "
                f"{'FieldMixER' if facts['kind'] == 'field' else 'SequenceMixER'}"
            )
        self.alternation = alternation or Alternation()
        self.gate_every, self.context_lr = gate_every, context_lr
        self.adaptation = adaptation or TryExperts()
        self.register_buffer("inner_step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self._skipped_in_a_row = 0
        self._round_start: list[Tensor] = []
        self._training: Trajectories | None = None
        self._own_callbacks: list[L.Callback] = []

    def configure_callbacks(self) -> Sequence[L.Callback]:
        """Return the partition report and, for a fitted gate, the callback that fits it."""
        if not self._own_callbacks:
            fit = [RouterFit(self.gate_every)] if fitted_routers(self) else []
            self._own_callbacks = [*fit, PartitionReport()]
        attached = cast(Any, self.trainer).callbacks
        return [callback for callback in self._own_callbacks if callback not in attached]

    def prediction_writer(self) -> L.Callback:
        """Trajectories as one npz file per domain."""
        return TrajectoryWriter()

    def configure_metrics(self, domain: str) -> MetricCollection:
        """Scores of whole roll-outs."""
        return trajectory_metrics()

    def num_tokens(self, batch: Trajectories) -> int:
        """Samples of a batch."""
        return batch.x.shape[0] * batch.x.shape[1] * batch.x.shape[2]

    def routing_factors(self, batch: Trajectories) -> dict[str, Factor]:
        """The hidden family of each environment, where it is known."""
        names = tuple(self.facts.get("families", []))
        return {"family": Factor(batch.family, len(names), names)}

    @override
    def pictures(self, batch: Trajectories, domain: str) -> Pictures:
        if self.last_answer is None:
            return {}
        answer = self.last_answer()
        truth, pred, dt = (answer[key].cpu().numpy() for key in ("truth", "x", "dt"))
        names = [f"expert {int(k)}" for k in answer["expert"]]
        return {"trajectories": trajectory_figure(domain, truth, pred, dt, names, most=3, given=batch.num_given)}

    # Training -----------------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        given = self.trainer.precision
        # Roll-outs add up small steps, which half precision rounds away; no gradient here is scaled for float16.
        if given not in ("32-true", "64-true", "bf16-mixed"):
            raise ValueError(f"--trainer.precision {given}: a roll-out needs 32-true, 64-true or bf16-mixed; give one")
        super().setup(stage)

    @property
    def model_parameters(self) -> list[nn.Parameter]:
        """The parameters that the model phase trains: all but the contexts."""
        return [p for p in self.net.parameters() if p.requires_grad and p is not self.net.contexts]

    def training_step(self, batch: Trajectories, batch_idx: int) -> Tensor:
        """Take one step on the contexts or on the weights and return the loss before it."""
        step, options = int(self.inner_step), self.alternation
        if options.begins(step) or not self._round_start:
            self._round_start = [p.detach().clone() for p in (self.net.contexts, *self.model_parameters)]
        phase = self.phase(step)
        params = [self.net.contexts] if phase == "context" else self.model_parameters
        out = self.recorded_step(batch, "train")
        self.inner_step += 1
        total = out.loss + self._proximal(phase) + options.context_l1 * self.net.contexts.abs().mean()
        total = self.with_aux_losses(total, out.batch_size)
        self._descend(total, params, cast(list[LightningOptimizer], self.optimizers())[phase == "model"])
        cast(list[LRScheduler], self.lr_schedulers())[phase == "model"].step()
        self.last_loss = out.loss.detach()
        self._log_step(self.last_loss, out.batch_size)
        return self.last_loss

    def phase(self, step: int) -> Phase:
        """Whether step ``step`` is one on the contexts or on the weights."""
        return self.alternation.phase(step)

    def step_kinds(self, steps: int, planned: int) -> dict[str, int]:
        """Steps on contexts and on weights, from sample to sample and over whole roll-outs; fits of the gate.

        A fit tries every expert on every environment. One that came after the gate had frozen is counted all the same.
        """
        ways = ("one sample ahead", "roll-out")
        kinds = (f"{self.phase(step)}, {ways[self._rolls_out(step, planned)]}" for step in range(steps))
        early = [max(0, router.warmup - 1) for router in fitted_routers(self).values()]
        fits = sum(max(0, steps // self.gate_every - calls) for calls in early)
        return {**Counter(kinds), **({FIT: fits} if early else {})}

    def differentiate(self, batch: Trajectories, kind: str) -> None:
        """Run forward and backward of one step of a kind, or what a fit of the gate reads."""
        if kind == FIT:
            with torch.no_grad():
                self._losses_of_experts(batch)
            return
        phase, way = kind.split(", ")
        loss = self.training_loss(self._contributing(batch), rollout=way == "roll-out")
        params = [self.net.contexts] if phase == "context" else self.model_parameters
        torch.autograd.grad(loss, params, allow_unused=True)

    def training_loss(self, data: Trajectories, *, rollout: bool) -> Tensor:
        """Mean over environments of their scaled error under the gate."""
        context_Sc = self.net.contexts[data.env]
        routing = self.net.route(context_Sc, self.net.group(data))
        anchor_Sc = None
        modulation = self.net.modulation if isinstance(self.net, FieldMixER) else None
        if modulation is not None:
            near_Sp = modulation.choose(context_Sc)
            pool = near_Sp.shape[1]
            data = data.environments(torch.arange(len(data.x), device=data.x.device).repeat_interleave(pool))
            anchor_Sc = context_Sc[near_Sp.flatten()]
            context_Sc = context_Sc.repeat_interleave(pool, 0)
            routing = routing.repeat_rows(pool)  # type: ignore[union-attr]
        return self.net.errors(data, context_Sc, routing, anchor_Sc, rollout=rollout).mean()

    def _trains_rollouts(self, step: int) -> bool:
        return self._rolls_out(step, int(self.trainer.estimated_stepping_batches))

    def _rolls_out(self, step: int, planned: int) -> bool:
        return step >= round((1 - self.alternation.rollout_share) * planned)

    def _contributing(self, batch: Trajectories) -> Trajectories:
        """The environments of the batch that this step reads."""
        rows = self.alternation.chosen(self.net.contexts[batch.env].detach())
        return batch if rows is None else batch.environments(rows)

    def _proximal(self, phase: Phase) -> Tensor:
        """beta/2 times the mean squared distance of what this phase moves to the start of the round."""
        context, *weights = self._round_start
        if phase == "context":
            return self.alternation.prox / 2 * (self.net.contexts - context).square().mean()
        pairs = zip(self.model_parameters, weights, strict=True)
        squares = [(p - old).square().sum() for p, old in pairs]
        return self.alternation.prox / 2 * torch.stack(squares).sum() / sum(p.numel() for p in weights)

    def _descend(self, total: Tensor, params: list[nn.Parameter], optimizer: LightningOptimizer) -> None:
        """Step along the gradient of ``total``; a step with anything that is not finite is skipped and counted."""
        # Not backward(): each phase wants the gradient of its own parameters alone, and pays for no other.
        found = torch.autograd.grad(total, params, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
        told = total.detach().clone()
        self._average([*grads, told])  # the loss, too: a step is skipped on all processes or on none
        norm = torch.stack([g.norm() for g in grads]).norm()
        if not bool(norm.isfinite() & told.isfinite()):
            self._skip()
            return
        self._skipped_in_a_row = 0
        limit = self.alternation.max_grad_norm
        scale = 1.0 if limit is None else min(1.0, limit / (float(norm) + 1e-12))
        for p, g in zip(params, grads, strict=True):
            p.grad = g * scale if scale < 1 else g
        optimizer.step()
        for p in params:
            p.grad = None

    def _average(self, grads: list[Tensor]) -> None:
        """Average over processes, in place; a value that is not finite on one is so on all."""
        if self.trainer.world_size > 1:
            for g in grads:
                torch.distributed.all_reduce(g)
                g /= self.trainer.world_size

    def _skip(self) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.alternation.max_skipped:
            raise RuntimeError(
                f"training diverged: {self._skipped_in_a_row} steps in a row had a loss or gradient that is not finite "
                f"({int(self.skipped)} in all). Lower model.optimizer.lr or context_lr, lower "
                "alternation.rollout_share (long roll-outs explode), or give the solver more substeps."
            )

    def _log_step(self, loss: Tensor, num: int) -> None:
        self.log_train("loss", loss, num, prog_bar=True)
        self.log_train("skipped", self.skipped.float(), num)
        self.log_train("lr", torch.tensor(float(self.trainer.optimizers[1].param_groups[0]["lr"])), num)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam for the contexts, and AdamW with its groups for weights and gate, each with the schedule."""
        context = torch.optim.Adam([self.net.contexts], lr=self.context_lr)
        self.net.contexts.requires_grad_(False)  # not for the groups of the weights
        model = build_adamw(self, self.optimizer_config)
        self.net.contexts.requires_grad_(True)
        phases = [self.phase(step) for step in range(int(self.trainer.estimated_stepping_batches))]
        lengths = {context: phases.count("context"), model: phases.count("model")}
        schedulers = [
            {"scheduler": self.schedule(each, max(1, steps)), "interval": "step"} for each, steps in lengths.items()
        ]
        return cast(OptimizerLRScheduler, ([context, model], schedulers))

    # Fitted gates -------------------------------------------------------------------------------------------------

    def training_data(self) -> Trajectories:
        """All training environments in the order of their numbers."""
        if self._training is None:
            data = self.data
            parts = [data.get_dataset(name, "train") for name in data.present("seen")]
            items = [part[i] for part in parts for i in range(len(cast(Any, part)))]
            self._training = collate_environments(items).each(self._placed)
        return self._training

    def _placed(self, part: Tensor) -> Tensor:
        """On the device, and in the dtype that the trainer gives to batches."""
        return part.to(self.device, cast(torch.dtype, self.dtype) if part.is_floating_point() else part.dtype)

    @torch.no_grad()
    def routing_losses(self, layer: str, *, needed: bool) -> tuple[Tensor, Tensor | None]:
        """Contexts [S, c] and the one-step loss [S, E] of every environment under every expert; for ``RouterFit``."""
        contexts_Sc = self.net.contexts.detach()
        if not needed:
            return contexts_Sc, None
        return contexts_Sc, self._losses_of_experts(self.training_data())

    def _losses_of_experts(self, data: Trajectories) -> Tensor:
        """The one-step loss [S, E] of every environment, in the order of their numbers, under every expert."""
        S, E = len(data.x), self.net.num_experts
        rows = torch.arange(S, device=self.device).repeat(E)
        expert = torch.arange(E, device=self.device).repeat_interleave(S)
        every, context = data.environments(rows), self.net.contexts.detach()[rows]
        error = self.net.errors(every, context, self.net.route_to(expert, context), rollout=False)
        return error.view(E, S).T

    # Evaluation ---------------------------------------------------------------------------------------------------

    def find_contexts(self, data: Trajectories) -> Adapted:
        """The contexts and experts of a batch: known for trained environments, adapted for all others."""
        net = self.net
        if bool((data.env >= 0).all()):
            context_Sc = net.contexts[data.env].detach()
            expert_S = net.best_experts(context_Sc, net.group(data))
            zero_S = torch.zeros(len(expert_S), device=self.device)
            return Adapted(context_Sc, expert_S, zero_S, torch.ones_like(expert_S, dtype=torch.bool))
        # Adaptation needs gradients of the contexts, which inference mode forbids even inside enable_grad.
        with torch.inference_mode(False):
            return self.adaptation(net, data.support.each(torch.clone), net.group(self.training_data()))

    def predict_trajectories(self, data: Trajectories) -> tuple[Tensor, Adapted]:
        """Roll out the query trajectories of a batch: [S, N, T, D], with the contexts and experts used."""
        found, net = self.find_contexts(data), self.net
        routing = net.route_to(found.expert, found.context)
        record_call(net.layer, routing, group=net.group(data))
        with torch.no_grad():
            return net.rollout(data.query, found.context, routing), found

    def shared_step(self, batch: Trajectories, stage: Stage) -> StepOutput:
        """Training: the loss of this step's kind. Evaluation: scores of the roll-outs of one batch of environments."""
        if stage == "train":
            rollout = self._trains_rollouts(int(self.inner_step))
            return StepOutput(self.training_loss(self._contributing(batch), rollout=rollout), len(batch.x))
        pred, found = self.predict_trajectories(batch)
        query = batch.query
        scored = scored_samples(query)
        known_S = scored.flatten(1).any(1)
        error_S = scaled_errors(pred, query.x, scored, query.scale)[known_S]  # of none the mean is NaN
        units = environment_errors(pred, query.x, scored)
        return StepOutput(
            *(error_S.mean(), len(batch.x), (pred, query.x, scored)),
            units=units,
            labelled=int(known_S.sum()),
            answer=lambda: self._answer(str(self.last_domain), batch, pred, found),
        )

    def predict_step(self, batch: Trajectories, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Any]:
        """Roll out one batch.

        Returns:
            On the CPU: ``domain``, ``x`` and ``truth`` [S, N, T, D], ``dt`` [S], ``env``, ``family`` and ``expert``
            int64 [S], ``context`` [S, c], ``support_loss`` [S] and ``gate_agrees`` bool [S].
        """
        return self._answer(self.data.eval_domains("predict")[dataloader_idx], batch, *self.predict_trajectories(batch))

    def answer_inputs(self, batches: list[Any]) -> dict[str, Any]:
        """Adapt to a new environment, roll out: ``x`` [M, steps, D], ``expert``, ``context`` [c], ``support_loss``."""
        ((batch, steps),) = batches
        pred, found = self.predict_trajectories(batch)
        answer = {"x": pred[0, :, :steps], "context": found.context[0], "support_loss": found.support_loss[0]}
        return {"expert": int(found.expert[0]), **{name: value.detach().cpu() for name, value in answer.items()}}

    def program(self) -> Program | str:
        """The right-hand side; solver and adaptation are outside."""
        field = self.net.kind == "field"
        width = self.net.state_dim * (1 if field else 2)
        state = torch.linspace(-1, 1, 6 * width).view(3, 2, width)
        what = "dx/dt" if field else "The next state, of [model state, observed state],"
        return Program(
            StateProgram(self.net),
            {"context": self.net.contexts.detach()[:1].repeat(3, 1), "state": state},
            f"{what} for contexts and states; the solver and the search for a context are outside.",
        )

    def _answer(self, domain: str, batch: Trajectories, pred: Tensor, found: Adapted) -> dict[str, Any]:
        truth = batch.query.x
        parts = {"x": pred, "truth": truth, "dt": batch.dt, "env": batch.env, "family": batch.family, **vars(found)}
        return {"domain": domain, **{name: value.detach().cpu() for name, value in parts.items()}}

    # Checkpoints --------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._round_start = [value.to(self.device) for value in self._round_start]  # a checkpoint is read to the CPU

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the start of the current round, if a round has begun."""
        checkpoint["round_start"] = [value.clone() for value in self._round_start]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._round_start = checkpoint.get("round_start", [])
