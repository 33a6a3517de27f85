# SPDX-License-Identifier: Apache-2.0
"""The Lightning side of the audio task: what is scored, what rows are called, what predict gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import torch.nn.functional as F
from audio_task_common import small_data, small_net, small_task, trainer
from torch import Tensor

from moeapps.moe.record import MoERecorder
from tasks.audio.data.batch import NO_CODE, AudioBatch
from tasks.audio.datamodule import AudioData
from tasks.audio.module import TIME_BINS, Answers, AudioTask, label_ids
from tasks.audio.report.drawing import Drawing

SHORT = Drawing(max_seconds=0.6, min_seconds=0.1, top_k=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> AudioData:
    return small_data(tmp_path_factory.mktemp("cache"))


def batch_of(data: AudioData, domain: str = "organ", count: int = 3) -> AudioBatch:
    return data.codes(domain, "test", torch.arange(count))


def test_the_loss_is_that_of_every_code_after_those_before_it(data: AudioData) -> None:
    """The network is asked for one target at a time, with nothing but what may be known before it."""
    task, batch = small_task(data).eval(), batch_of(data, count=1)
    with torch.no_grad():
        out = task.shared_step(batch, "val")
        inputs, target = task.net.targets(batch)
        nats: list[list[float]] = [[], []]
        for step in range(inputs.shape[2]):
            logits = task.net(batch.prompt, inputs[:, :, : step + 1])[0, -1]
            for book in range(2):
                symbol = int(target[0, step, book])
                if symbol >= 0:
                    nats[book].append(float(-F.log_softmax(logits[book], 0)[symbol]))

    assert [len(book) for book in nats] == [int(batch.lengths[0]) + int(batch.ends[0]), int(batch.lengths[0])]
    assert out.loss.item() == pytest.approx(sum(sum(book) / len(book) for book in nats), rel=1e-4)


def test_rows_of_layers_are_those_that_labels_and_flops_speak_of(data: AudioData) -> None:
    task, batch = small_task(data).eval(), batch_of(data)
    with MoERecorder(task) as recorder:
        task.shared_step(batch, "val")
    factors = task.routing_factors(batch)

    assert len(recorder.records) == 2
    for record in recorder.records:
        assert record.routing.num_rows == task.num_tokens(batch)
    assert all(len(factor.label_N) == task.num_tokens(batch) for factor in factors.values())


def test_labels_of_rows_are_the_slice_of_the_clip_and_what_its_prompt_says(data: AudioData) -> None:
    """Counted clip by clip from its length and its real prompt."""
    task = small_task(data)
    rows = {name: data.clips(name, "test")[:2] for name in ("organ", "low_voice")}
    batch = AudioBatch.cat([batch_of(data, name, 2) for name in rows])
    clips = [clip for found in rows.values() for clip in found]
    steps = batch.codes.shape[2] + 1
    factors = task.routing_factors(batch)

    assert set(factors) == {"time", "kind", "voice", "timbre", "tempo", "mode"}
    for row, clip in enumerate(clips):
        length = int((batch.codes[row, 0] != NO_CODE).sum())
        start = batch.prompt.shape[1]
        for name, factor in factors.items():
            label = factor.label_N.view(len(clips), -1)[row]
            assert (label[:start] == -1).all()
            assert (label[start + length :] == -1).all()
            if name == "time":
                wanted = [step * TIME_BINS // length for step in range(length)]
                assert factor.num_labels == TIME_BINS
            else:
                values = [label.partition("=")[2] for label in data.facts["labels"] if label.startswith(f"{name}=")]
                said = {**clip.prompt.labels, "kind": clip.prompt.kind}.get(name)
                wanted = [values.index(said) if said is not None else -1] * length
                assert factor.num_labels == len(values)
            assert label[start : start + length].tolist() == wanted, name
        assert len(factors["time"].label_N.view(len(clips), -1)[row]) == start + steps


def test_kinds_of_labels_with_one_value_tell_nothing_apart() -> None:
    assert label_ids(["kind=speech", "voice=a", "voice=b"]) == {"voice": [4, 5]}


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, 1.0, 1.0]])
def test_wrong_weights_of_books_are_told(data: AudioData, weights: list[float]) -> None:
    with pytest.raises(ValueError, match="2 books"):
        small_task(data, codebook_weights=weights)


def test_weights_of_books_weigh_the_loss_and_not_the_scores(data: AudioData) -> None:
    task, batch = small_task(data).eval(), batch_of(data)
    plain = task.shared_step(batch, "val")
    task.codebook_weights = [2.0, 2.0]
    doubled = task.shared_step(batch, "val")

    assert doubled.loss.item() == pytest.approx(2 * plain.loss.item())
    assert torch.equal(doubled.metric_args[0], plain.metric_args[0])


def test_facts_of_other_data_are_told(data: AudioData) -> None:
    facts = {name: value for name, value in data.facts.items() if name != "num_codes"}
    with pytest.raises(ValueError, match="num_codes"):
        AudioTask(net=small_net, facts=facts)


# --- predict ----------------------------------------------------------------------------------------------------------


def test_predict_keeps_the_beginning_of_each_clip_and_goes_on(data: AudioData) -> None:
    task = small_task(data, answers=Answers(keep=0.3, drawing=SHORT)).eval()
    batch = batch_of(data)
    wanted = round(0.3 * data.facts["frame_rate"])
    found = task.predict_step(batch)

    for row, codes in enumerate(found["codes"]):
        kept = int(found["kept"][row])
        assert kept == min(wanted, int(batch.lengths[row]) // 2)
        assert torch.equal(codes[:, :kept], batch.codes[row, :, :kept])
        assert kept < codes.shape[1] <= round(0.6 * data.facts["frame_rate"])
        assert 0 <= int(codes.min()) <= int(codes.max()) < 16


def test_clips_of_different_length_are_answered_each_by_its_own_share(data: AudioData) -> None:
    task = small_task(data, answers=Answers(keep=0.5, drawing=SHORT)).eval()
    batch = batch_of(data)
    short = batch.codes.clone()
    short[1, :, 4:] = NO_CODE
    found = task.predict_step(AudioBatch(short, batch.prompt, batch.ends, batch.domain, batch.index))

    assert found["kept"].tolist() == [round(0.5 * data.facts["frame_rate"]), 2, found["kept"][2]]
    assert torch.equal(found["codes"][1][:, :2], short[1, :, :2])


def test_predict_without_a_beginning_draws_for_the_prompt_alone(data: AudioData) -> None:
    task = small_task(data, answers=Answers(keep=0.0, drawing=SHORT)).eval()
    batch = batch_of(data)
    other = AudioBatch((batch.codes + 1) % 16, batch.prompt, batch.ends, batch.domain, batch.index)
    found, again = task.predict_step(batch), task.predict_step(other)

    assert found["kept"].tolist() == [0, 0, 0]
    for a, b in zip(found["codes"], again["codes"], strict=True):
        assert torch.equal(a, b)


def test_a_clip_is_answered_alike_in_any_batch(data: AudioData) -> None:
    task = small_task(data, answers=Answers(keep=0.3, drawing=SHORT)).double().eval()
    together = task.predict_step(batch_of(data))["codes"]
    for row, codes in enumerate(together):
        (alone,) = task.predict_step(data.codes("organ", "test", torch.tensor([row])))["codes"]
        assert torch.equal(alone, codes)


@pytest.mark.filterwarnings("ignore:.*custom batch sampler `ShardedBatches` for prediction")
def test_predictions_are_sounds_pictures_and_prompts_of_a_users_clips(data: AudioData, tmp_path: Path) -> None:
    task = small_task(data, answers=Answers(keep=0.2, drawing=SHORT))
    data.predicted = ["bell"]
    writer = task.prediction_writer()
    trainer(tmp_path / "run", writer).predict(task, datamodule=data, return_predictions=False)
    data.predicted = None
    folder = tmp_path / "run" / "predictions" / "bell" / "batch-00000"

    for row, clip in enumerate(data.clips("bell", "test")):
        wave, rate = soundfile.read(folder / f"{row:05d}.wav", dtype="float32")
        assert rate == 8000
        assert 0 < len(wave) <= 0.6 * 8000 + 256
        assert (folder / f"{row:05d}.png").is_file()
        text = (folder / f"{row:05d}.txt").read_text()
        assert text.startswith("music")
        assert clip.prompt.text in text
    assert (folder / "index.html").read_text().count("<audio") == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Answers(keep=-1.0), "keep=-1.0"),
        (lambda: Answers(keep=2.0, drawing=Drawing(max_seconds=1.0)), "keep=2.0"),
        (lambda: Drawing(cfg=-0.1), "cfg=-0.1"),
        (lambda: Drawing(temperature=-1.0), "temperature=-1.0"),
        (lambda: Drawing(top_k=0), "top_k=0"),
        (lambda: Drawing(top_p=0.0), "top_p=0"),
        (lambda: Drawing(min_seconds=2.0, max_seconds=1.0), "min_seconds=2.0"),
        (lambda: Drawing(min_seconds=0.0, max_seconds=0.0), "max_seconds=0.0"),
    ],
)
def test_wrong_ways_to_draw_are_told_at_construction(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def rest(value: Tensor) -> Tensor:
    return value.detach().clone()


def test_training_lowers_the_loss(data: AudioData, tmp_path: Path) -> None:
    task, batch = small_task(data), batch_of(data, "low_voice")
    task.eval()
    before = rest(task.shared_step(batch, "val").loss)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    task.train()
    for _ in range(20):
        optimizer.zero_grad()
        task.shared_step(batch, "train").loss.backward()
        optimizer.step()

    assert task.eval().shared_step(batch, "val").loss.item() < 0.8 * before.item()
