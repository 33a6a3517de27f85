# SPDX-License-Identifier: Apache-2.0
"""The Lightning side of UniMoE-Audio: the next step of every codebook, bits per code, clips as answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from moeapps.training.inputs import Program
from moeapps.training.shown import Pictures, Sound
from moeapps.training.task import BaseTask, Factor, Stage, StepOutput
from tasks.audio.data.batch import NO_CODE, AudioBatch
from tasks.audio.data.prompt import UNKNOWN
from tasks.audio.losses import code_nats, codec_loss
from tasks.audio.metrics import audio_metrics, code_bits, unit_parts
from tasks.audio.model import AudioLM
from tasks.audio.nets.language_model import CodecLM
from tasks.audio.report.clips import spectrogram_figure
from tasks.audio.report.drawing import Drawing, draw_codes, sounds
from tasks.audio.report.writer import ClipWriter

TIME_BINS = 8
"""Equal slices of a clip, from its first frame to its last."""


@dataclass
class Answers:
    """How ``predict`` answers a clip.

    Args:
        keep: seconds of a clip that are kept and continued, but never more than half of it; 0 draws a new clip for its
            prompt.
        drawing: how codes are drawn.

    Raises:
        ValueError: ``keep`` below 0, or not below ``drawing.max_seconds``.
    """

    keep: float = 0.5
    drawing: Drawing = field(default_factory=Drawing)

    def __post_init__(self) -> None:
        if not 0 <= self.keep < self.drawing.max_seconds:
            raise ValueError(
                f"keep={self.keep} seconds of at most max_seconds={self.drawing.max_seconds}: keep 0 or more, and less"
            )


class AudioTask(BaseTask):
    """Generation of speech and music as codes, from several domains at once.

    Training predicts the next step of every codebook; the loss is the sum over the books of their mean cross-entropy.
    Scores are bits per code, teacher-forced and exact: ``bits_0`` (the first book, in which nearly all that differs
    between models shows), ``bits_1`` ..., and ``bits``, the mean over the books.

    Args:
        net: makes the network from the facts.
        facts: from the data module: ``domains``, ``num_codebooks``, ``num_codes``, ``frame_rate``, ``labels``.
        codebook_weights: factor of each book's cross-entropy; None is 1 for all (paper).
        answers: how ``predict`` draws clips.
        options: further arguments of `BaseTask`: ``aux_losses`` (paper: `ChosenBalance` with an annealed weight),
            ``optimizer`` and ``schedule`` (paper: cosine).

    Raises:
        ValueError: ``facts`` lacks an entry; not one positive weight per codebook.
    """

    monitor: ClassVar[str] = "val/validation/bits_0"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"
    main_metric: ClassVar[str] = "bits_0"
    monitor_minimum: ClassVar[int] = 20
    monitor_unit: ClassVar[str] = "clips"
    headlines: ClassVar[Mapping[str, str]] = {
        "generation/domain_accuracy": "drawn clips that a judge takes for their domain",
        "generation/real_domain_accuracy": "real clips that it does",
        "capacity/real": "routed experts per row, of those that are not null",
    }
    needed_facts: ClassVar[tuple[str, ...]] = ("num_codebooks", "num_codes", "frame_rate", "labels")

    def __init__(
        self,
        *,
        net: Callable[[dict[str, Any]], CodecLM],
        facts: dict[str, Any],
        codebook_weights: list[float] | None = None,
        answers: Answers | None = None,
        **options: Any,
    ) -> None:
        super().__init__(facts=facts, **options)
        books = int(facts["num_codebooks"])
        if codebook_weights is not None and (len(codebook_weights) != books or min(codebook_weights) <= 0):
            raise ValueError(
                f"codebook_weights={codebook_weights}, but the codes have {books} books: give one number above 0 for "
                "each, or none for equal weights"
            )
        self.net = net(facts)
        self.codebook_weights = codebook_weights
        self.answers = answers or Answers()
        self.label_ids = label_ids(facts["labels"])

    def configure_metrics(self, domain: str) -> MetricCollection:
        """Bits per code."""
        return audio_metrics(int(self.facts["num_codebooks"]))

    def prediction_writer(self) -> L.Callback:
        """WAV, spectrogram and prompt of every clip."""
        return ClipWriter()

    def num_tokens(self, batch: AudioBatch) -> int:
        """Rows of a pass: symbols of the prompts and steps of the audio."""
        return batch.prompt.numel() + len(batch) * self.net.delay.num_steps(batch.codes.shape[2]) - len(batch)

    def routing_factors(self, batch: AudioBatch) -> dict[str, Factor]:
        """Slice of the clip that a step lies in, and every kind of label with several values (kind, language, ...).

        Rows of the prompt and steps after a clip's end have no label.
        """
        steps = self.net.delay.num_steps(batch.codes.shape[2]) - 1
        step_L = torch.arange(steps, device=batch.device)
        length_B1 = batch.lengths.unsqueeze(1).clamp(min=1)
        time_BL = (step_L * TIME_BINS // length_B1).where(step_L < length_B1, -1)
        inside_BL = step_L < length_B1
        found = {"time": self._rows(batch, time_BL, TIME_BINS)}
        for name, ids in self.label_ids.items():
            known = torch.tensor(ids, device=batch.device)
            hit_BSV = batch.prompt.unsqueeze(-1) == known
            label_B1 = hit_BSV.any(1).long().argmax(1, keepdim=True).where(hit_BSV.any((1, 2)).unsqueeze(1), -1)
            values = tuple(self.facts["labels"][place - UNKNOWN - 1].partition("=")[2] for place in ids)
            rows = self._rows(batch, label_B1.expand(-1, steps).where(inside_BL, -1), len(ids))
            found[name] = rows._replace(names=values)
        return found

    def _rows(self, batch: AudioBatch, label_BL: Tensor, num_labels: int) -> Factor:
        """Labels of all rows of a pass: those of a prompt have none, and come first."""
        return Factor(torch.cat([torch.full_like(batch.prompt, -1), label_BL], 1).flatten(), num_labels)

    @override
    def pictures(self, batch: AudioBatch, domain: str) -> Pictures:
        if domain != self.data.present("seen")[0]:  # one clip takes as long as many batches
            return {}
        rate, drawing = int(self.facts["sample_rate"]), self.answers.drawing
        frames = float(self.facts["frame_rate"])
        codes = draw_codes(self.net, batch.prompt[:1], frames, drawing, domain=batch.domain[:1])
        wave = sounds(cast(Any, self.data).tokenizer, codes)[0]
        return {"clip": Sound(wave, rate), "spectrogram": spectrogram_figure(wave, rate)} if len(wave) else {}

    # Steps --------------------------------------------------------------------------------------------------------

    def shared_step(self, batch: AudioBatch, stage: Stage) -> StepOutput:
        """Predict the step that follows each step of a batch."""
        inputs, target = self.net.targets(batch)
        nats = code_nats(self.net(batch.prompt, inputs, batch.domain), target)
        loss = codec_loss(nats, target, self.codebook_weights)
        if stage == "train":
            return StepOutput(loss, len(batch))
        bits, counts = code_bits(nats.detach(), target, int(self.facts["num_codes"]))
        return StepOutput(loss, len(batch), (bits, counts), parts=unit_parts(batch.index, bits, counts))

    def predict_step(self, batch: AudioBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> dict[str, Any]:
        """Continue every clip of the batch, or draw a new one for its prompt.

        Returns:
            On the CPU: ``codes``, a list of int64 [K, T]; ``kept`` int64 [B], how many of the frames were given;
            ``prompt`` int64 [B, S]; ``domain``, ``index`` int64 [B].
        """
        rate = float(self.facts["frame_rate"])
        kept_B = (batch.lengths // 2).clamp(max=round(self.answers.keep * rate))
        longest = int(kept_B.max())
        inside = torch.arange(longest, device=batch.device) < kept_B[:, None, None]
        keep = batch.codes[:, :, :longest].where(inside, NO_CODE)
        drawing = self.answers.drawing
        codes = draw_codes(
            self.net,
            batch.prompt,
            rate,
            drawing,
            domain=batch.domain,
            keep=keep if longest else None,
            place=batch.index,
        )
        known = {"kept": kept_B, "prompt": batch.prompt, "domain": batch.domain, "index": batch.index}
        return {"codes": codes, **{name: value.cpu() for name, value in known.items()}}

    def answer_inputs(self, batches: list[AudioBatch]) -> dict[str, Any]:
        """Draw a clip for each prompt, behind the frames given: ``wave`` float32 [n] and ``codes`` [K, T] of each."""
        (batch,) = batches
        keep = batch.codes if batch.codes.shape[2] else None
        rate = float(self.facts["frame_rate"])
        codes = draw_codes(self.net, batch.prompt, rate, self.answers.drawing, domain=batch.domain, keep=keep)
        waves = sounds(cast(Any, self.data).tokenizer, codes)
        return {"wave": waves, "codes": codes, "sample_rate": int(self.facts["sample_rate"])}

    def program(self) -> Program | str:
        """Prompts and steps to logits; drawing and the tokenizer are outside."""
        if not isinstance(self.net, AudioLM):
            return f"{type(self.net).__name__} is a rival without a graph of its own; load the run with moeapps.load."
        steps = torch.full((3, int(self.facts["num_codebooks"]), 6), self.net.delay.begin)
        prompt = torch.tensor([[0, 1, 2]]).repeat(3, 1)
        covers = "Logits of the step after each of those given; drawing of codes and their sound are outside."
        return Program(self.net, {"prompt": prompt, "steps": steps}, covers)


def label_ids(labels: Sequence[str]) -> dict[str, list[int]]:
    """Symbols of the values of every kind of label that has several.

    Args:
        labels: ``name=value``, in the order of the vocabulary.

    Returns:
        name -> symbols as `PromptVocabulary` numbers them.
    """
    found: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        found.setdefault(label.partition("=")[0], []).append(UNKNOWN + 1 + place)
    return {name: ids for name, ids in found.items() if len(ids) > 1}
