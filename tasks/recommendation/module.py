# SPDX-License-Identifier: Apache-2.0
"""The Lightning side of multi-task ranking: one masked loss, scores within users, probabilities.

Shape legend: B rows, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from moeapps.moe.losses import AuxLoss
from moeapps.training.optim import OptimizerConfig, Schedule
from moeapps.training.task import BaseTask, Factor, Stage, StepOutput
from tasks.recommendation.data.batch import Interactions
from tasks.recommendation.metrics import DEFAULT_KINDS, Kind, ranking_metrics
from tasks.recommendation.model import Ranker
from tasks.recommendation.report.score_writer import ScoreWriter


class RankingTask(BaseTask):
    r"""Probabilities of several behaviours for each impression, from one network.

    Loss: :math:`\sum_t \frac{1}{|M_t|} \sum_{n \in M_t} BCE(logit_{nt}, y_{nt})` over the rows :math:`M_t` whose label
    t is known; a task without one is left out. The equal weights are recalled (docs/papers/home.md, equation 8). With
    ``uncertainty`` it is :math:`\sum_t e^{-s_t} L_t + s_t` with learned :math:`s_t`.

    Args:
        facts: from the data module: domains, tasks, categories and the sizes of the features.
        net: makes the network from the facts; None means `Ranker`, HoME on `FeatureEncoder`.
        uncertainty: learn the weights of the tasks (Kendall et al.; what one re-implementation of HoME does).
        positive_weight: task -> weight of its positives in the loss; a weight other than 1 spoils calibration.
        scores: kinds of scores, per task and as mean over tasks.
        aux_losses: losses on the routing (paper: none).
        optimizer: AdamW's numbers.
        schedule: learning-rate schedule.

    Raises:
        ValueError: ``facts`` lacks an entry, a weight names no task, or is not above 0.
    """

    monitor: ClassVar[str] = "val/validation/gauc"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    main_metric: ClassVar[str] = "gauc"
    monitor_minimum: ClassVar[int] = 200  # of 46 (MovieLens-100K's smallest genre) epochs are ranked by chance
    monitor_unit: ClassVar[str] = "users"
    needed_facts: ClassVar[tuple[str, ...]] = ("tasks", "categories")

    def __init__(
        self,
        *,
        facts: dict[str, Any],
        net: Callable[[dict[str, Any]], Ranker] | None = None,
        uncertainty: bool = False,
        positive_weight: dict[str, float] | None = None,
        scores: list[Kind] | None = None,
        aux_losses: list[AuxLoss] | None = None,
        optimizer: OptimizerConfig | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(facts=facts, aux_losses=aux_losses, optimizer=optimizer, schedule=schedule)
        self.tasks: list[str] = list(facts["tasks"])
        self.kinds = list(DEFAULT_KINDS if scores is None else scores)
        self.net = (net or Ranker)(facts)
        weights = positive_weight or {}
        if set(weights) - set(self.tasks) or any(value <= 0 for value in weights.values()):
            raise ValueError(f"positive_weight={weights}: give weights above 0 for some of the tasks {self.tasks}")
        self.register_buffer("positive_weight", torch.tensor([weights.get(name, 1.0) for name in self.tasks]))
        self.log_variance = nn.Parameter(torch.zeros(len(self.tasks))) if uncertainty else None

    def configure_metrics(self, domain: str) -> MetricCollection:
        """GAUC, AUC, log-loss and calibration, per task and as means over tasks."""
        return ranking_metrics(self.tasks, self.kinds)

    def prediction_writer(self) -> L.Callback:
        """Scores as one Parquet or CSV file per domain."""
        return ScoreWriter()

    def num_tokens(self, batch: Interactions) -> int:
        """Rows of a batch."""
        return len(batch)

    def routing_factors(self, batch: Interactions) -> dict[str, Factor]:
        """The known answers of each row, task by task."""
        label_BT = batch.label.long().where(batch.mask, -1)
        return {name: Factor(label_BT[:, t], 2) for t, name in enumerate(self.tasks)}

    def forward(self, batch: Interactions) -> Tensor:
        """Logits [B, T]."""
        logits: Tensor = self.net(batch)
        return logits

    def shared_step(self, batch: Interactions, stage: Stage) -> StepOutput:
        """Loss of one batch, and what the scores need."""
        logits = self(batch)
        losses_T = masked_losses(logits, batch.label, batch.mask, self.get_buffer("positive_weight"))
        known_T = batch.mask.any(0)
        s_T = self.log_variance
        # With learned weights, too: the s of a task without a label would only fall and fall.
        given_T = losses_T.where(known_T, 0)  # before the product, whose gradient by s would be nan
        loss = (given_T if s_T is None else (given_T * torch.exp(-s_T) + s_T).where(known_T, 0)).sum()
        logs = {f"loss_{name}": losses_T[t] for t, name in enumerate(self.tasks)} if stage == "train" else {}
        labelled = int(batch.mask.any(1).sum())
        args = (logits, batch.label, batch.mask, batch.user, batch.oracle)
        return StepOutput(loss, len(batch), args, logs, labelled=labelled)

    def predict_step(self, batch: Interactions, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Answer a batch.

        Returns:
            On the CPU: ``probability`` float32 [B, T] in the order of the tasks, ``row`` and ``user`` int64 [B].
        """
        probability = self(batch).sigmoid()
        return {"probability": probability.float().cpu(), "row": batch.row.cpu(), "user": batch.user.cpu()}


def masked_losses(logits_BT: Tensor, label_BT: Tensor, mask_BT: Tensor, positive_weight_T: Tensor) -> Tensor:
    """Mean binary cross-entropy of each task over its known labels, [T]; NaN (with gradient 0) for one without any."""
    each_BT = F.binary_cross_entropy_with_logits(logits_BT, label_BT, reduction="none", pos_weight=positive_weight_T)
    known_T = mask_BT.sum(0)
    return (each_BT.where(mask_BT, 0).sum(0) / known_T.clamp(min=1)).masked_fill(known_T == 0, torch.nan)
