# SPDX-License-Identifier: Apache-2.0
"""The Lightning side: several tasks for each impression (HoME), and lists of candidates (AW-MoE).

Shape legend: B rows or lists, T tasks, N candidates, H past items, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from typing_extensions import override

from moeapps.moe import MoERecorder
from moeapps.training.inputs import Program
from moeapps.training.shown import Pictures
from moeapps.training.task import BaseTask, Factor, Stage, StepOutput
from tasks.recommendation.data.batch import Interactions
from tasks.recommendation.data.lists import Lists
from tasks.recommendation.losses import (
    RANKING_LOSSES,
    RankingLoss,
    Similarity,
    check_contrast,
    info_nce,
    random_mask,
    scorable_lists,
)
from tasks.recommendation.metrics import DEFAULT_KINDS, Kind, ranking_metrics
from tasks.recommendation.model import ListRanker, Ranker
from tasks.recommendation.nets.list_banks import ListScores
from tasks.recommendation.nets.programs import ListProgram, RowProgram, list_inputs, row_inputs
from tasks.recommendation.report.list_metrics import KEEP, gate_stability, list_auc, list_metrics, user_parts
from tasks.recommendation.report.ranks import ranks_figure
from tasks.recommendation.report.score_writer import ListWriter, ScoreWriter


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
        options: further arguments of `BaseTask`: ``aux_losses`` (paper: none), ``optimizer`` and ``schedule``.

    Raises:
        ValueError: ``facts`` lacks an entry, a weight names no task, or is not above 0.
    """

    monitor: ClassVar[str] = "val/validation/gauc"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    main_metric: ClassVar[str] = "gauc"
    monitor_minimum: ClassVar[int] = 200  # of 46 (MovieLens-100K's smallest genre) epochs are ranked by chance
    monitor_unit: ClassVar[str] = "users"
    needed_facts: ClassVar[tuple[str, ...]] = ("tasks", "categories")
    facts_from: ClassVar[str] = (
        "impressions: RecommendationData, as in configs/home.yaml (lists, as in configs/data/ml100k_lists.yaml, go "
        "with configs/aw_moe.yaml)"
    )

    def __init__(
        self,
        *,
        facts: dict[str, Any],
        net: Callable[[dict[str, Any]], Ranker] | None = None,
        uncertainty: bool = False,
        positive_weight: dict[str, float] | None = None,
        scores: list[Kind] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(facts=facts, **options)
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
        return {name: Factor(label_BT[:, t], 2, ("no", "yes")) for t, name in enumerate(self.tasks)}

    @override
    def pictures(self, batch: Interactions, domain: str) -> Pictures:
        probability_BT = self(batch).sigmoid()
        kept = [batch.mask[:, t] for t in range(len(self.tasks))]
        scores = [probability_BT[rows, t] for t, rows in enumerate(kept)]
        taken = [batch.label[rows, t] > 0 for t, rows in enumerate(kept)]
        return {"ranks": ranks_figure(self.tasks, scores, taken, title=f"{domain}: the rows of a batch, by task")}

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

    def program(self) -> Program | str:
        """Ids and numbers to probabilities."""
        covers = f"Ids as the source encodes them (not checked), to the probabilities of {', '.join(self.tasks)}."
        return Program(RowProgram(self.net, list(self.facts["bags"])), row_inputs(self.facts), covers)


class ListRankingTask(BaseTask):
    r"""Rank the candidates of lists: :math:`L = L_{rank} + \lambda L_{cl}`.

    The contrast asks that a list's gate (for the candidate that was taken) barely changes when past items are dropped
    at random, and differs from those of other users. It runs while training alone; its draws come from a generator of
    its own that depends on ``mask_seed``, step and process, so that a run with weight 0 is the run without.

    Args:
        facts: from the data module: domains, fields, names of the factors.
        net: makes the network from the facts; None means `ListRanker`, AW-MoE.
        ranking_loss: pointwise (binary cross-entropy, recalled), pairwise (BPR) or softmax (over the list).
        contrast_weight: lambda; 0 leaves the contrast out.
        contrast_on: the ``gate`` (paper) or, as an ablation, the user's vector: ``interest``.
        temperature: tau.
        similarity: cosine or dot.
        mask_probability: p, with which a past item is dropped.
        mask_rank_branch: drop past items before ranking, too: data augmentation, the control of the contrast.
        mask_seed: seed of what is dropped.
        options: further arguments of `BaseTask`: ``aux_losses`` (paper: none), ``optimizer`` and ``schedule``.

    Raises:
        ValueError: ``facts`` lacks an entry; a number outside its range, an unknown choice; a contrast of what no
            history moves.

    Source: AW-MoE (docs/papers/aw_moe.md, equations 5 to 7).
    """

    monitor: ClassVar[str] = "val/validation/list_auc"
    monitor_mode: ClassVar[Literal["min", "max"]] = "max"
    main_metric: ClassVar[str] = "list_auc"
    monitor_minimum: ClassVar[int] = 200
    monitor_unit: ClassVar[str] = "lists"
    headlines: ClassVar[Mapping[str, str]] = {
        "gates/gate_ari": "tastes found by the gate (adjusted Rand index, 1 at best)",
    }
    needed_facts: ClassVar[tuple[str, ...]] = ("item_fields", "query_fields", "profile_fields", "history", "factors")
    facts_from: ClassVar[str] = (
        "lists: ListData, as in configs/aw_moe.yaml or configs/data/ml100k_lists.yaml (impressions, as in "
        "configs/data/ml100k.yaml, go with configs/home.yaml)"
    )

    def __init__(
        self,
        *,
        facts: dict[str, Any],
        net: Callable[[dict[str, Any]], nn.Module] | None = None,
        ranking_loss: RankingLoss = "pointwise",
        contrast_weight: float = 0.0,
        contrast_on: Literal["gate", "interest"] = "gate",
        temperature: float = 0.1,
        similarity: Similarity = "cosine",
        mask_probability: float = 0.3,
        mask_rank_branch: bool = False,
        mask_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(facts=facts, **options)
        if ranking_loss not in RANKING_LOSSES or contrast_on not in ("gate", "interest"):
            raise ValueError(
                f"ranking_loss={ranking_loss!r}, contrast_on={contrast_on!r}: the first is one of "
                f"{', '.join(RANKING_LOSSES)}, the second gate or interest"
            )
        if contrast_weight < 0 or not 0 <= mask_probability < 1:
            raise ValueError(
                f"contrast_weight={contrast_weight}, mask_probability={mask_probability}: give a weight of at least 0 "
                "and a probability in [0, 1)"
            )
        check_contrast(temperature, similarity)
        self.ranking_loss: RankingLoss = ranking_loss
        self.contrast_weight, self.contrast_on = contrast_weight, contrast_on
        self.temperature, self.similarity = temperature, similarity
        self.mask_probability, self.mask_rank_branch, self.mask_seed = mask_probability, mask_rank_branch, mask_seed
        self.net = (net or ListRanker)(facts)
        if contrast_weight:
            check_contrasted(self.net, contrast_on)

    def configure_metrics(self, domain: str) -> MetricCollection:
        """Scores within lists and within users."""
        return list_metrics()

    def prediction_writer(self) -> L.Callback:
        """Scores as one Parquet or CSV file per domain, a row per candidate."""
        return ListWriter()

    def num_tokens(self, batch: Lists) -> int:
        """Candidates of a batch, on all of which the experts run."""
        return batch.label.numel()

    def routing_factors(self, batch: Lists) -> dict[str, Factor]:
        """What an expert may stand for (a taste, a genre), of each row that the gate routes."""
        if not self.facts["factors"]:
            return {}
        each = batch.label.shape[1] if getattr(self.net, "gates_candidates", False) else 1
        names = tuple(self.facts["factors"])
        return {"factor": Factor(batch.factor.repeat_interleave(each), len(names), names)}

    @override
    def pictures(self, batch: Lists, domain: str) -> Pictures:
        logits_BN, shown = self(batch).logits, range(min(len(batch), 12))
        kept = [batch.candidate_mask[b] for b in shown]
        scores = [logits_BN[b][rows] for b, rows in zip(shown, kept, strict=True)]
        taken = [batch.label[b][rows] > 0 for b, rows in zip(shown, kept, strict=True)]
        names = [f"user {int(batch.user[b])}" for b in shown]
        return {"lists": ranks_figure(names, scores, taken, title=domain)}

    def forward(self, batch: Lists, *, history_mask: Tensor | None = None) -> ListScores:
        """Scores of a batch."""
        scores: ListScores = self.net(batch, history_mask=history_mask)
        return scores

    def shared_step(self, batch: Lists, stage: Stage) -> StepOutput:
        """Loss of one batch, and what the scores need."""
        generator = self.mask_generator()
        mask_BH = batch.history_mask
        if stage == "train" and self.mask_rank_branch:
            mask_BH = random_mask(mask_BH, self.mask_probability, generator)
        out = self(batch, history_mask=mask_BH)
        loss = RANKING_LOSSES[self.ranking_loss](out.logits, batch.label, batch.candidate_mask)
        logs: dict[str, Tensor] = {}
        if stage == "train" and self.contrast_weight:
            contrast, logs = self.contrast(batch, out, random_mask(mask_BH, self.mask_probability, generator))
            logs |= {"loss_rank": loss, "loss_contrast": contrast}
            loss = loss + self.contrast_weight * contrast
        labelled = int(scorable_lists(self.ranking_loss, batch.label, batch.candidate_mask).sum())
        if stage == "train":
            return StepOutput(loss, len(batch), (), logs, labelled=labelled)
        found = list_auc(out.logits, batch.label, batch.candidate_mask)
        parts = {"list_auc": user_parts(found, batch.user)} if stage == "test" else {}
        return StepOutput(loss, len(batch), self.scored(batch, out), labelled=labelled, parts=parts)

    def scored(self, batch: Lists, out: ListScores) -> tuple[Any, ...]:
        """What `ListMetrics` reads: the scores, those of a cut and of an empty history, the gates of the first two."""
        kept_BH = batch.history_mask & (batch.history_mask.cumsum(1) <= KEEP)
        with MoERecorder():  # reports are of the whole history
            cut = self(batch, history_mask=kept_BH)
            none = self(batch, history_mask=torch.zeros_like(kept_BH))
        gates = [None if found.gate is None else of_taken(found.gate, batch) for found in (out, cut)]
        events_B = batch.history_mask.sum(1)
        given = (out.logits, batch.label, batch.candidate_mask, batch.user, events_B, batch.oracle)
        return (*given, cut.logits, none.logits, *gates)

    def mask_generator(self) -> torch.Generator:
        """The source of what is dropped, another one for each training step and process; nothing to save or resume."""
        place = self.global_step * 4096 + self.global_rank
        return torch.Generator().manual_seed((self.mask_seed * 1_000_003 + place) % (1 << 63))

    def contrast(self, batch: Lists, out: ListScores, kept_BH: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the contrastive loss of lists with a history, and the cosines behind it."""
        first, second = self.two_views(batch, out, kept_BH)
        known_B = batch.history_mask.any(1)  # an empty history has nothing to drop, and one gate for all users
        first, second, user = first[known_B], second[known_B], batch.user[known_B]
        loss = info_nce(first, second, user, temperature=self.temperature, similarity=self.similarity)
        same, between = gate_stability(first.detach(), second.detach(), user)
        return loss, {"gate_same": same.float(), "gate_between": between.float()}

    def two_views(self, batch: Lists, out: ListScores, kept_BH: Tensor) -> tuple[Tensor, Tensor]:
        """What is contrasted, with the history that was ranked by and with a part of it; of the taken candidate."""
        assert isinstance(self.net, ListRanker)  # see `check_contrasted`; a `ListRanker` gives all of these
        assert out.encoded is not None
        assert out.gate is not None
        assert out.interest is not None
        place_B = batch.label.argmax(1)
        with MoERecorder():  # auxiliary losses and reports are of the ranking branch alone
            gate_BK, v_Bd = self.net.view(batch, out.encoded, kept_BH, place_B)
        if self.contrast_on == "interest":
            return of_taken(out.interest, batch), v_Bd
        return of_taken(out.gate, batch), gate_BK

    def predict_step(self, batch: Lists, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Answer a batch.

        Returns:
            On the CPU: ``probability`` float32 [B, N] (0 at padding), ``item`` int64 [B, N] (-1 at padding), ``row``
            and ``user`` int64 [B]; with a gate also ``gate`` float32 [B, K], the mean over the candidates.
        """
        out = self(batch)
        probability = out.logits.sigmoid().where(batch.candidate_mask, 0)
        answer = {"probability": probability.float(), "item": batch.candidate_item}
        answer |= {"row": batch.row, "user": batch.user}
        if out.gate is not None:
            real_BN1 = batch.candidate_mask[:, : out.gate.shape[1], None]
            answer["gate"] = (out.gate * real_BN1).sum(1) / real_BN1.sum(1).clamp(min=1)
        return {name: value.detach().cpu() for name, value in answer.items()}

    def program(self) -> Program | str:
        """Ids of items to probabilities."""
        covers = "Ids as the source encodes them (not checked), to the probability of each candidate; 0 is padding."
        return Program(ListProgram(self.net), list_inputs(self.facts, int(self.facts["candidates"])), covers)


def check_contrasted(net: nn.Module, what: Literal["gate", "interest"]) -> None:
    """Refuse a contrast that could teach nothing: its two views differ in the history alone.

    Raises:
        ValueError: the network has no gate, or one that no past item reaches.
    """
    if not isinstance(net, ListRanker):
        raise ValueError(f"{type(net).__name__} has no gate to contrast; set contrast_weight to 0")
    if what == "gate" and net.reads in ("nothing", "category"):
        raise ValueError(
            f"the gate reads {net.reads} and is the same for every history, so contrasting it teaches nothing; set "
            "contrast_weight to 0, or contrast_on to interest"
        )


def of_taken(values_BNK: Tensor, batch: Lists) -> Tensor:
    """The values [B, K] of the first candidate that was taken (of the first of all where none was).

    Args:
        values_BNK: one vector per candidate, or [B, 1, K], one per list.
        batch: the lists.
    """
    if values_BNK.shape[1] == 1:
        return values_BNK[:, 0]
    return values_BNK[torch.arange(len(batch), device=values_BNK.device), batch.label.argmax(1)]


def masked_losses(logits_BT: Tensor, label_BT: Tensor, mask_BT: Tensor, positive_weight_T: Tensor) -> Tensor:
    """Mean binary cross-entropy of each task over its known labels, [T]; NaN (with gradient 0) for one without any."""
    each_BT = F.binary_cross_entropy_with_logits(logits_BT, label_BT, reduction="none", pos_weight=positive_weight_T)
    known_T = mask_BT.sum(0)
    return (each_BT.where(mask_BT, 0).sum(0) / known_T.clamp(min=1)).masked_fill(known_T == 0, torch.nan)
