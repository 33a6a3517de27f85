# SPDX-License-Identifier: Apache-2.0
"""The Lightning side of Meta-DMoE: four stages that train one network part by part, and the test of any adapter.

Shape legend: B rows, S support and Q query images, E experts, D features, K classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from typing_extensions import override

from moeapps.moe import MoERecorder
from moeapps.training.inputs import Program
from moeapps.training.shown import Pictures
from moeapps.training.task import BaseTask, Stage, StepOutput
from tasks.adaptation.data.batch import Episode, EpisodeBatch, ImageBatch
from tasks.adaptation.metrics import adaptation_metrics
from tasks.adaptation.model import MetaDMoE
from tasks.adaptation.nets.adapters import Adapter, Answer, Distil, Unadapted
from tasks.adaptation.nets.passes import Passes
from tasks.adaptation.report.predictions import LogitsWriter

FEATURES = "features of the experts"


class AdaptationTask(BaseTask):
    """Base of the stages: a subclass says what trains and by which loss; all are scored by an adapter on episodes.

    Every stage trains its part of one network, so that each begins with all of what the last one has left. In
    evaluation the adapter sees the unlabelled support of a domain, the network is what it was for the next one, and
    ``accuracy`` (``pearson`` for measured values) is that of the query images; ``accuracy_before`` is that of the
    student as it is, and ``gain`` their difference.

    Args:
        net: makes the network from the facts.
        facts: from the data module: ``domains``, ``num_classes``, ``channels``, ``image_size``, ``num_experts``,
            ``expert_of`` and ``target``.
        adapter: what is scored; None means the stage's own.
        beside: further adapters that a test scores on the same network, as ``accuracy_<name>``; None for none.
        cache_features: keep the features of the experts for all training images (E * D numbers each), where experts do
            not train; not for images that change from epoch to epoch.
        options: further arguments of `BaseTask`; ``trained`` is the stage's own unless given.

    Raises:
        ValueError: ``facts`` lacks an entry, or an adapter that cannot work on measured values.
    """

    monitor: ClassVar[str] = "val/validation/accuracy"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    main_metric: ClassVar[str] = "accuracy"
    monitor_unit: ClassVar[str] = "images"
    needed_facts: ClassVar[tuple[str, ...]] = (
        *("num_classes", "channels", "image_size", "num_experts", "expert_of", "target"),
    )
    facts_from: ClassVar[str] = "an AdaptationData"
    stays_whole: ClassVar[bool] = True  # experts are asked, and students adapted, outside of the network's own call
    parts: ClassVar[tuple[str, ...]] = ()
    """Patterns on the names of the parameters that the stage trains."""
    own_adapter: ClassVar[type[Adapter]] = Unadapted
    expert_of: Tensor

    def __init__(
        self,
        *,
        net: Callable[[dict[str, Any]], MetaDMoE],
        facts: dict[str, Any],
        adapter: Adapter | None = None,
        beside: dict[str, Adapter] | None = None,
        cache_features: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(facts=facts, **options)
        self.net = net(facts)
        if self.trained is None:
            names = [name for name, _ in self.named_parameters()]
            self.trained = [pattern for pattern in self.parts if any(fnmatchcase(name, pattern) for name in names)]
        self.adapter = adapter or self.own_adapter()
        self.beside = nn.ModuleDict(beside or {})
        self.cache_features = cache_features
        self.measured = facts["target"] == "regression"
        for each in (self.adapter, *self.beside.values()):
            if self.measured and not each.measures:
                raise ValueError(f"{type(each).__name__} needs classes, but these labels are measured values")
        if self.measured:
            self.monitor, self.main_metric = "val/validation/pearson", "pearson"  # type: ignore[misc]
        self.register_buffer("expert_of", torch.tensor(facts["expert_of"]), persistent=False)
        for module in self.net.modules():
            module.training = True  # Lightning warns of others before `on_train_start`, which says who trains
        self._features: dict[int, Tensor] = {}
        self._state: tuple[Any, ...] = ()  # of the adapter, after the last part of an episode

    def configure_metrics(self, domain: str) -> MetricCollection:
        """Scores after and before adaptation."""
        return adaptation_metrics(int(self.facts["num_classes"]), list(self.beside), measured=self.measured)

    def prediction_writer(self) -> L.Callback:
        """Logits as one CSV file per domain."""
        return LogitsWriter()

    def num_tokens(self, batch: ImageBatch | EpisodeBatch) -> int:
        """Images that are answered."""
        return len(batch)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self.train()

    @override
    def pictures(self, batch: Any, domain: str) -> Pictures:
        answer = None if self.measured or self.last_answer is None else self.last_answer()
        from tasks.adaptation.report.figures import pictures_of  # loads matplotlib

        return {} if answer is None else pictures_of(answer, self.facts["class_names"])

    # Losses -------------------------------------------------------------------------------------------------------

    def task_loss(self, logits_BK: Tensor, label_B: Tensor) -> Tensor:
        """Cross-entropy, or the mean square for measured values, over the rows with a label; nan without any."""
        if self.measured:
            known_B = ~label_B.isnan()
            return nn.functional.mse_loss(logits_BK[known_B, 0], label_B[known_B])
        return nn.functional.cross_entropy(logits_BK, label_B, ignore_index=-1)

    def known(self, label_B: Tensor) -> int:
        """Number of rows with a label."""
        return int((~label_B.isnan() if self.measured else label_B >= 0).sum())

    def trained_logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the logits [B, K] that this stage trains and their labels [B]."""
        raise TypeError(f"{type(self).__name__} must define trained_logits(batch)")

    def stage_loss(self, batch: Any, logits_BK: Tensor, label_B: Tensor) -> Tensor:
        """Return the loss of `trained_logits`, some of whose rows have a label."""
        return self.task_loss(logits_BK, label_B)

    def shared_step(self, batch: ImageBatch | EpisodeBatch, stage: Stage) -> StepOutput:
        """Training: the loss of the stage. Evaluation: the adapter on one episode."""
        if stage == "train":
            logits_BK, label_B = self.trained_logits(batch)
            known = self.known(label_B)
            loss = self.stage_loss(batch, logits_BK, label_B) if known else 0 * logits_BK.sum()
            return StepOutput(loss, len(batch), labelled=known)
        answer = self.answer(batch, self.last_domain or "")
        label_Q = answer.query.label
        known = self.known(label_Q)
        return StepOutput(
            self.task_loss(answer.after, label_Q),
            len(label_Q),
            (answer.after, answer.before, label_Q, self._others(batch) if stage == "test" else {}),
            labelled=known,
            answer=lambda: answer,
        )

    # Features of frozen experts -----------------------------------------------------------------------------------

    def tokens(self, images: ImageBatch) -> tuple[Tensor, Tensor]:
        """Features [B, E, D] of training images with each one's own expert masked, and who is present [B, E]."""
        z_BED = images.image.new_empty(len(images), self.net.num_experts, self.net.student.backbone.dim)
        for number in images.domain.unique().tolist():
            rows = images.domain == number
            if self.caching and (self._features or self._trainer):  # no trainer, no data to look up
                z_BED[rows] = self._features_of(number)[images.index[rows].cpu()].to(z_BED)
            else:
                z_BED[rows] = self._asked(images.image[rows])[0].to(z_BED)  # autocast gives bfloat16
        return self.net.masked(z_BED, self.expert_of[images.domain])

    @property
    def caching(self) -> bool:
        """Whether experts are asked once for all: features by a batch's statistics differ from batch to batch."""
        return self.cache_features and self.net.expert_statistics == "running"

    @torch.no_grad()
    def _asked(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Ask the frozen experts, in evaluation mode, about images of one domain."""
        experts = self.net.layer
        was = experts.training
        experts.eval()
        with MoERecorder(self):  # one of its own: the step's has gradients
            found = self.net.tokens(image)
        experts.train(was)
        return found

    def _features_of(self, number: int) -> Tensor:
        """Features [N, E, D] of all training images of a domain, computed once; on the CPU."""
        if number not in self._features:
            data = cast(Any, self.data)
            name = data.domain_names[number]
            rows = torch.arange(len(data.get_dataset(name, "train"))).split(256)
            parts = (self._asked(data.images(name, "train", part).image.to(self.device))[0] for part in rows)
            self._features[number] = torch.cat([part.cpu() for part in parts])
        return self._features[number]

    # Evaluation ---------------------------------------------------------------------------------------------------

    def answer(self, batch: ImageBatch | EpisodeBatch, domain: str) -> Answer:
        """Adapt to the support of an episode and answer its query; rows without a support are answered as they are.

        Parts of one episode follow each other: the state is kept from one to the next.
        """
        if isinstance(batch, ImageBatch):
            none = batch.take(torch.empty(0, dtype=torch.int64, device=batch.label.device))
            logits = self.net(batch.image)
            return Answer(domain, 0, logits, logits, batch, none, Passes(), Passes(), 0.0)
        (episode,) = batch.episodes
        begun = time.process_time()
        own = int(self.expert_of[episode.domain])
        with torch.no_grad():
            with Passes.of(self.net) as adapting:
                state = self._begin(episode, own)
            with Passes.of(self.net) as answering:
                label = episode.query.label if self.adapter.oracle else None
                after, state = self.adapter.answer(self.net, state, episode.query.image, own, label)
            seconds = time.process_time() - begun
            self._state = (episode.domain, episode.draw, state)
            before = after if isinstance(self.adapter, Unadapted) else self.net(episode.query.image)
        return Answer(
            *(domain, episode.draw, after, before, episode.query, episode.support),
            *(adapting, answering, seconds),
        )

    @torch.no_grad()
    def _others(self, batch: ImageBatch | EpisodeBatch) -> dict[str, Tensor]:
        """Logits [Q, K] of the adapters beside; each part of an episode is adapted to anew."""
        if isinstance(batch, ImageBatch):
            return {}
        (episode,) = batch.episodes
        image, label, own = episode.query.image, episode.query.label, int(self.expert_of[episode.domain])
        found = {}
        for name, adapter in cast(dict[str, Adapter], dict(self.beside.items())).items():
            state = adapter.begin(self.net, episode.support.image, own)
            found[name] = adapter.answer(self.net, state, image, own, label)[0]
        return found

    def _begin(self, episode: Episode, own: int) -> Any:
        """The state of the adapter: after the last part of this episode, or fresh."""
        if self._state[:2] == (episode.domain, episode.draw):
            return self._state[2]
        return self.adapter.begin(self.net, episode.support.image, own)

    @override
    def evaluation_step(self, batch: Any, stage: Literal["val", "test"], batch_idx: int, dataloader_idx: int) -> None:
        self._state = self._state if batch_idx else ()  # the network may have changed since the last evaluation
        super().evaluation_step(batch, stage, batch_idx, dataloader_idx)

    def predict_step(self, batch: EpisodeBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Any]:
        """Answer one episode.

        Returns:
            On the CPU: ``domain`` (name), ``draw``, ``index`` and ``label`` [Q], ``logits`` [Q, K] with adaptation and
            ``before`` [Q, K] without.
        """
        self._state = self._state if batch_idx else ()
        answer = self.answer(batch, self.data.eval_domains("predict")[dataloader_idx])
        parts = {"index": answer.query.index, "label": answer.query.label, "logits": answer.after}
        parts["before"] = answer.before
        return {"domain": answer.domain, "draw": answer.draw, **{name: value.cpu() for name, value in parts.items()}}

    def answer_inputs(self, batches: list[EpisodeBatch]) -> dict[str, Any]:
        """Adapt to images and answer them: ``logits`` [Q, K], ``before`` [Q, K] without adaptation, ``class_names``."""
        ((episode,),) = batches
        if self.adapter.oracle:
            raise ValueError(
                f"{type(self.adapter).__name__} looks at labels and is a bound, no method; load another run"
            )
        image = episode.query.image
        state = self.adapter.begin(self.net, episode.support.image, -1)
        logits, _ = self.adapter.answer(self.net, state, image, -1)
        names = list(self.facts.get("class_names", []))
        return {"logits": logits.cpu(), "before": self.net(image).cpu(), "class_names": names}

    def program(self) -> Program | str:
        """The student; adaptation takes gradients, which a graph of operations does not hold."""
        size, channels = int(self.facts["image_size"]), int(self.facts["channels"])
        image = torch.linspace(-1, 1, 3 * channels * size * size).view(3, channels, size, size)
        covers = "Logits of the student as it is; adaptation takes gradients and is outside."
        return Program(self.net.student, {"image": image}, covers)


class StudentTask(AdaptationTask):
    """Stage 1: the student, on rows of all seen domains (ERM). Batches of one domain each train ARM-BN's student."""

    parts: ClassVar[tuple[str, ...]] = ("net.student.*",)

    @override
    def trained_logits(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        return self.net(batch.image), batch.label


class ExpertsTask(AdaptationTask):
    """Stage 2: every expert on rows of its own seen domains; each begins as the student of the stage before."""

    parts: ClassVar[tuple[str, ...]] = ("net.layer.experts.*", "net.expert_heads.*")
    in_parts: ClassVar[bool] = True

    @override
    def begin(self) -> None:
        first = not self._begun and self.start is not None and self.trainer.ckpt_path is None
        super().begin()
        if first:
            self.net.specialise()

    @override
    def trained_logits(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        own_B = self.expert_of[batch.domain]
        found = []
        for number in own_B.unique().tolist():
            feature_BD = self.net.experts[number](batch.image[own_B == number])
            found.append((self.net.expert_heads[number](feature_BD), batch.label[own_B == number]))
        logits, labels = zip(*found, strict=True)
        return torch.cat(logits), torch.cat(labels)


class WithExperts(AdaptationTask):
    """Base of the stages that ask frozen experts."""

    own_adapter: ClassVar[type[Adapter]] = Distil
    _feature_batches: int | None = None

    @override
    def step_kinds(self, steps: int, planned: int) -> dict[str, int]:
        """Training steps, and the features of the experts, computed once for every training image."""
        if not self.caching:
            return {"step": steps}
        if self._feature_batches is None:  # asked again after the training, when the data are gone
            data = cast(Any, self.data)
            images = sum(len(data.get_dataset(name, "train")) for name in data.present("seen"))
            each = data.batch_size if data.mode == "rows" else data.episodes_per_step * data.support
            self._feature_batches = math.ceil(images / each)
        return {"step": steps, FEATURES: self._feature_batches}

    @override
    def differentiate(self, batch: Any, kind: str) -> None:
        if kind != FEATURES:
            # What is counted is a copy that has no data; what the features are does not matter.
            none = torch.zeros((), device=self.device)
            blank = none.expand(2**40, self.net.num_experts, self.net.student.backbone.dim)
            self._features = dict.fromkeys(range(len(self.expert_of)), blank)
            super().differentiate(batch, kind)
            self._features = {}
            return
        parts = [batch] if isinstance(batch, ImageBatch) else [episode.support for episode in batch]
        self._asked(ImageBatch.cat(parts).image)


class AggregatorTask(WithExperts):
    """Stage 3: the aggregator and a head of its own, on rows of all seen domains, each image's own expert masked.

    Its test, with the step of Meta-DMoE, is distillation without meta-learning.
    """

    parts: ClassVar[tuple[str, ...]] = ("net.aggregator.*", "net.teacher_head.*")

    @override
    def trained_logits(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        return self.net.teacher_head(self.net.target(*self.tokens(batch))), batch.label


class MetaTask(WithExperts):
    """Stage 4: episodes of a domain whose expert is masked; the loss is that of the ADAPTED student on the query.

    It is a mean over the domains of a step, each a mean over its own query images (equation 4; paper: a sum). Its
    gradient reaches student and aggregator through the step. Everything is in evaluation mode, as published: dropout is
    off and batch normalisation uses what it has learned before.

    Source: Meta-DMoE (docs/papers/meta_dmoe.md, equation 4).
    """

    parts: ClassVar[tuple[str, ...]] = ("net.student.*", "net.aggregator.*", "net.step.*")

    @override
    def train(self, mode: bool = True) -> MetaTask:
        super().train(mode)
        self.net.eval()
        return self

    @override
    def trained_logits(self, batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
        found = []
        for episode in batch:
            weights = self.net.adapt(episode.support.image, self.tokens(episode.support), train=True)
            found.append(self.net(episode.query.image, weights))
        return torch.cat(found), batch.query.label

    @override
    def stage_loss(self, batch: EpisodeBatch, logits_BK: Tensor, label_B: Tensor) -> Tensor:
        """Return the mean over the domains with a label: one of few images or labels counts like any other."""
        sizes = [len(episode.query) for episode in batch]
        parts = zip(logits_BK.split(sizes), label_B.split(sizes), strict=True)
        return torch.stack([self.task_loss(*part) for part in parts if self.known(part[1])]).mean()
