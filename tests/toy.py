# SPDX-License-Identifier: Apache-2.0
"""A whole task in one small file: Gaussian clusters in five domains, an MLP with one MoE layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from moeapps.data.domain import DomainDataModule, Split
from moeapps.moe.experts import GLUExperts
from moeapps.moe.layer import LayerFactory, MoELayer
from moeapps.moe.losses import AuxLoss
from moeapps.moe.presets import point_moe, top_k_router
from moeapps.training.callbacks import BiasBalancing
from moeapps.training.optim import OptimizerConfig, Schedule
from moeapps.training.shown import Sound
from moeapps.training.stages import Start
from moeapps.training.task import BaseTask, Stage, StepOutput

# Words of the command line that name it, and that run one batch of it.
TOY = ["--config", "tests/toy.yaml"]
FAST = [*TOY, "--trainer.fast_dev_run", "true"]


class ToyData(DomainDataModule):
    """Clusters of two classes in the plane, turned by an angle of the domain's own.

    Args:
        num_items: items per domain and split.
        optional: domains that are treated as missing.
    """

    def __init__(
        self,
        *,
        num_items: int = 24,
        optional: list[str] | None = None,
        seen: list[str] | None = None,
        validation: list[str] | None = None,
        unseen: list[str] | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        mixing: Literal["concat", "balanced", "one_domain"] = "concat",
        eval_batch_size: int | None = None,
        predict: list[str] | None = None,
    ) -> None:
        super().__init__(
            seen=["a", "b", "c"] if seen is None else seen,
            validation=["v"] if validation is None else validation,
            unseen=["u"] if unseen is None else unseen,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            mixing=mixing,
            eval_batch_size=eval_batch_size,
            predict=predict,
        )
        self.num_items = num_items
        self.optional = optional or []

    @property
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "num_classes": 2}

    def available(self, domain: str) -> str | None:
        return "not on this machine" if domain in self.optional else None

    def dataset(self, domain: str, split: Split) -> Dataset[Any]:
        index = self.domain_names.index(domain)
        generator = torch.Generator().manual_seed(100 * index + ["train", "val", "test"].index(split))
        y = torch.arange(self.num_items) % 2
        x = torch.randn(self.num_items, 2, generator=generator) * 0.5 + torch.stack(
            [2.0 * y - 1, torch.zeros(len(y))], 1
        )
        angle = torch.tensor(0.4 * index)
        turn = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)]).reshape(2, 2)
        self.sources[domain] = "generated"
        return TensorDataset(x @ turn.T, y, torch.full_like(y, index))


class ToyNet(nn.Module):
    """Linear, MoE, norm, dropout, linear.

    Args:
        moe: width -> MoE layer; None means the Point-MoE preset.
        width: hidden width.
        num_classes: outputs.
        dropout: probability that a hidden value is dropped, so that training draws random numbers.
        norm: batch normalisation, so that there are running statistics.
    """

    def __init__(
        self,
        moe: LayerFactory | None = None,
        width: int = 8,
        num_classes: int = 2,
        dropout: float = 0.1,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        self.moe = (moe or point_moe())(width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, num_classes)

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        h = F.gelu(self.first(x))
        mixed = self.moe(h, group=group) if isinstance(self.moe, MoELayer) else self.moe(h)
        return self.last(self.dropout(self.norm(h + mixed)))


class ToyTask(BaseTask):
    """Classification of the clusters.

    Args:
        net: the network.
        facts: from the data module.
        aux_losses: losses on the routing.
        optimizer: AdamW's numbers.
        schedule: learning-rate schedule.
        start: what the weights begin as.
        trained: patterns of what is trained.
        fail: raise a ValueError at construction.
    """

    monitor: ClassVar[str] = "val/validation/accuracy"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    main_metric: ClassVar[str] = "accuracy"

    def __init__(
        self,
        *,
        net: ToyNet,
        facts: dict[str, Any],
        aux_losses: list[AuxLoss] | None = None,
        optimizer: OptimizerConfig | None = None,
        schedule: Schedule | None = None,
        start: Start | None = None,
        trained: list[str] | None = None,
        fail: bool = False,
    ) -> None:
        super().__init__(
            facts=facts, aux_losses=aux_losses, optimizer=optimizer, schedule=schedule, start=start, trained=trained
        )
        if fail:
            raise ValueError("fail=True is not allowed; set it to false")
        self.net = net

    def configure_metrics(self, domain: str) -> MetricCollection:
        return MetricCollection({"accuracy": MulticlassAccuracy(self.facts["num_classes"], average="micro")})

    def num_tokens(self, batch: Any) -> int:
        return len(batch[0])

    def shared_step(self, batch: Any, stage: Stage) -> StepOutput:
        x, y, domain = batch
        logits = self.net(x, domain)
        hit = (logits.argmax(-1) == y).float()
        return StepOutput(F.cross_entropy(logits, y), len(y), (logits, y), {"accuracy": hit.mean()}, {"accuracy": hit})

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.net(batch[0], batch[2]).argmax(-1)


class Holder(nn.Module):
    """Two layers made by one factory.

    Args:
        moe: width in, layer out.
    """

    def __init__(self, moe: LayerFactory) -> None:
        super().__init__()
        self.layers = nn.ModuleList([moe(4), moe(6)])


def outputs(*, num_experts: int = 2, router: LayerFactory | None = None) -> LayerFactory:
    """Make linear layers.

    Args:
        num_experts: outputs.
        router: inner factory.
    """
    return lambda width: nn.Linear(width, num_experts)


def biased_moe(*, num_experts: int = 4) -> LayerFactory:
    """Make top-1 layers with a selection bias whose first expert begins far ahead.

    Args:
        num_experts: E.
    """

    def build(width: int) -> MoELayer:
        router = top_k_router(num_experts=num_experts, top_k=1, weighing="sigmoid", balance_bias=True)(width)
        with torch.no_grad():
            router.score.weight[0] = 3.0
        return MoELayer(router, GLUExperts(num_experts, width, width))

    return build


class FastBalancing(BiasBalancing):
    """BiasBalancing with steps large enough for a short run."""

    def __init__(self) -> None:
        super().__init__(rate=0.05)


class ShowingTask(ToyTask):
    """The toy with a picture of each kind, which draws random numbers for them, and a headline."""

    headlines: ClassVar[Mapping[str, str]] = {"half/done": "half of it"}
    calls: ClassVar[list[tuple[str, int]]] = []

    def pictures(self, batch: Any, domain: str) -> dict[str, Any]:
        from matplotlib.figure import Figure

        self.calls.append((domain, self.current_epoch))
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot(torch.rand(3))
        return {"figure": figure, "image": torch.rand(3, 4, 4), "sound": Sound(torch.rand(80), 8000)}


class WronglyShowingTask(ToyTask):
    """The toy with a picture of no kind."""

    def pictures(self, batch: Any, domain: str) -> dict[str, Any]:
        return {"wrong": 3}
