# SPDX-License-Identifier: Apache-2.0
"""A small log and a small task around it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from moeapps.training.optim import OptimizerConfig
from moeapps.training.task import BaseTask, Stage, StepOutput
from tasks.recommendation.data.batch import Interactions
from tasks.recommendation.data.multitask_log import MultitaskLog
from tasks.recommendation.metrics import ranking_metrics
from tasks.recommendation.nets.embeddings import FeatureEncoder, PlainTable


def small_log(**options: Any) -> MultitaskLog:
    """A log of some thousand rows."""
    sizes = {"num_users": 30, "num_items": 80, "train_rows": 600, "val_rows": 300, "test_rows": 500}
    return MultitaskLog(**{**sizes, **options})


def make_batch(rows: int = 6, tasks: int = 2, seed: int = 0) -> Interactions:
    """Random rows: 3 numbers, fields of 5 and 7 ids, one bag of 9 ids."""
    g = torch.Generator().manual_seed(seed)
    bag = torch.randint(0, 9, (rows, 4), generator=g)
    return Interactions(
        dense=torch.randn(rows, 3, generator=g),
        ids=torch.stack([torch.randint(0, 5, (rows,), generator=g), torch.randint(0, 7, (rows,), generator=g)], 1),
        bags={"bag": (bag, (bag > 0).float())},
        label=torch.randint(0, 2, (rows, tasks), generator=g).float(),
        mask=torch.rand(rows, tasks, generator=g) < 0.8,
        user=torch.randint(0, 3, (rows,), generator=g),
        row=torch.arange(rows),
    )


FACTS: dict[str, Any] = {"dense_dim": 3, "fields": {"a": 5, "b": 7}, "bags": {"bag": 9}}


class LinearTask(BaseTask):
    """Logistic regression on all features, tables with sparse gradients."""

    monitor: ClassVar[str] = "val/validation/gauc"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    main_metric: ClassVar[str] = "gauc"

    def __init__(self, *, facts: dict[str, Any], optimizer: OptimizerConfig | None = None) -> None:
        super().__init__(facts=facts, optimizer=optimizer)
        self.encoder = FeatureEncoder(facts, table=lambda sizes, dim: PlainTable(sizes, dim, sparse=True))
        self.head = nn.Linear(self.encoder.out_dim, len(facts["tasks"]))

    def configure_metrics(self, domain: str) -> MetricCollection:
        return ranking_metrics(self.facts["tasks"])

    def num_tokens(self, batch: Interactions) -> int:
        return len(batch)

    def shared_step(self, batch: Interactions, stage: Stage) -> StepOutput:
        logits = self.head(self.encoder(batch))
        each = F.binary_cross_entropy_with_logits(logits, batch.label, reduction="none")
        loss = (each * batch.mask).sum() / batch.mask.sum().clamp(min=1)
        return StepOutput(loss, len(batch), (logits, batch.label, batch.mask, batch.user, batch.oracle))

    def predict_step(self, batch: Interactions, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        return self.head(self.encoder(batch)).sigmoid()
