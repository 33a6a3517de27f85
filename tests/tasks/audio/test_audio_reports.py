# SPDX-License-Identifier: Apache-2.0
"""Samples while training, judgement and capacity at the end of a test: run by a trainer on a few generated clips."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from audio_task_common import small_data, small_task, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from moeapps.moe.record import Record
from moeapps.moe.routing import Routing
from tasks.audio.datamodule import AudioData
from tasks.audio.report import generation
from tasks.audio.report.capacity import CapacityReport, count_rows, shares
from tasks.audio.report.drawing import Drawing, sounds
from tasks.audio.report.few_shot import FewShot
from tasks.audio.report.generation import AudioSamples, GenerationQuality
from tasks.audio.report.judge import Judging, get_judge
from tasks.audio.report.judgement import Real, judge_clips
from tests.pictured import check_readable

SHORT = Drawing(max_seconds=0.4, min_seconds=0.1, top_k=4)
QUICK = Judging(steps=60, batch_size=16, width=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> AudioData:
    return small_data(tmp_path_factory.mktemp("cache"))


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_drawn_every_few_epochs_at_the_last_and_after_a_test(data: AudioData, tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="run", version=0)
    run = trainer(
        tmp_path,
        AudioSamples(every_n_epochs=2, per_domain=1, drawing=SHORT),
        epochs=3,
        logger=board,
        log_every_n_steps=1,
    )
    task = small_task(data)
    run.fit(task, datamodule=data)
    run.test(task, datamodule=data, verbose=False)
    folder = tmp_path / "run" / "version_0" / "samples"

    assert sorted(path.name for path in folder.iterdir()) == ["epoch_1", "epoch_2", "test"]
    names = {path.name for path in (folder / "epoch_1").glob("*.wav")}
    assert names == {f"{domain}-0.wav" for domain in data.roles["seen"]}
    names = {path.name for path in (folder / "test").glob("*.wav")}
    assert names == {f"{domain}-0{end}.wav" for domain in data.roles["seen"] for end in ("", "-real")}
    prompt = data.clips("organ", "test")[0].prompt
    assert (folder / "test" / "organ-0.txt").read_text() == f"{prompt}\n"
    events = b"".join(path.read_bytes() for path in folder.parent.glob("events*"))
    assert b"test/organ-0" in events
    assert events.count(b"RIFF") == 2 * 4 + 2 * 4  # two sets of four while training, four and their real ones after


def test_nothing_is_drawn_under_fast_dev_run(data: AudioData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("drew")

    monkeypatch.setattr(generation, "draw_like", never)
    run = L.Trainer(
        accelerator="cpu",
        fast_dev_run=True,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        callbacks=[AudioSamples(every_n_epochs=1), GenerationQuality(), CapacityReport()],
    )
    run.fit(small_task(data), datamodule=data)
    run.test(small_task(data), datamodule=data, verbose=False)
    assert not (tmp_path / "metrics").exists()


# --- judgement --------------------------------------------------------------------------------------------------------


def real_as_drawn(data: AudioData) -> dict[str, Any]:
    """Training clips of every seen domain, as if they had been drawn."""
    seen = data.present("seen")
    clips = [(number, clip) for number, name in enumerate(seen) for clip in data.clips(name, "train")[:3]]
    waves = [clip.wave for _, clip in clips]
    return {
        "codes": [data.tokenizer.encode(wave[None])[0] for wave in waves],
        "waves": waves,
        "prompts": [clip.prompt for _, clip in clips],
        "domain": [number for number, _ in clips],
    }


def test_real_clips_are_judged_as_real(data: AudioData) -> None:
    judge, real = get_judge(data, QUICK), Real.of(data)
    found = judge_clips(**real_as_drawn(data), real=real, judge=judge)

    assert set(found) == {"generation", *(f"generation.{name}" for name in data.present("seen"))}
    told = found["generation"]
    assert told["domain_accuracy"] >= 0.9
    assert told["silent"] == 0.0
    assert told["loudness"] == pytest.approx(-20.0, abs=1.5)  # clips have an RMS of 0.1
    assert told["quietest"] <= told["loudness"]
    assert told["frechet"] < told["frechet_floor"]  # they are training clips
    assert told["code_divergence"] < told["code_divergence_floor"]
    assert told["chroma"] > told["chroma_shuffled"]
    assert "chroma" in found["generation.organ"]
    assert "chroma" not in found["generation.low_voice"]
    assert told["clips"] == 12


def test_silence_noise_and_the_wrong_domain_are_judged_as_such(data: AudioData) -> None:
    judge, real, drawn = get_judge(data, QUICK), Real.of(data), real_as_drawn(data)
    moved = [(number + 1) % 4 for number in drawn["domain"]]
    assert judge_clips(**{**drawn, "domain": moved}, real=real, judge=judge)["generation"]["domain_accuracy"] <= 0.1

    silent = judge_clips(**{**drawn, "waves": [0 * w for w in drawn["waves"]]}, real=real, judge=judge)["generation"]
    assert silent["silent"] == 1.0
    good = judge_clips(**drawn, real=real, judge=judge)["generation"]
    assert silent["frechet"] > 5 * good["frechet"]
    one_code = [torch.zeros_like(codes) for codes in drawn["codes"]]
    assert judge_clips(**{**drawn, "codes": one_code}, real=real, judge=judge)["generation"]["code_divergence"] > 0.5


def test_a_clip_without_frames_counts_as_silent(data: AudioData) -> None:
    judge, real, drawn = get_judge(data, QUICK), Real.of(data), real_as_drawn(data)
    drawn["codes"][0], drawn["waves"][0] = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0)

    found = judge_clips(**drawn, real=real, judge=judge)
    assert found["generation.low_voice"]["silent"] == pytest.approx(1 / 3)
    assert found["generation"]["quietest"] == found["generation.low_voice"]["quietest"] == -120.0
    assert found["generation.organ"]["quietest"] > -40


def test_the_judge_is_kept_for_clips_and_settings(data: AudioData, monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_judge(data, QUICK)
    monkeypatch.setattr("tasks.audio.report.judge.train_judge", lambda *args: pytest.fail("trained again"))
    again = get_judge(data, QUICK)

    assert again.key == first.key
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_test_ends_with_numbers_files_and_figures(data: AudioData, tmp_path: Path) -> None:
    quality = GenerationQuality(per_domain=2, drawing=SHORT, judging=QUICK)
    run = trainer(tmp_path / "run", quality, CapacityReport())
    task = small_task(data)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    run.test(task, datamodule=data, verbose=False)
    folder = tmp_path / "run"

    summary = json.loads((folder / "metrics" / "test.json").read_text())["summary"]
    assert {"generation", "generation.pluck", "capacity", "capacity.0", "capacity.1"} <= set(summary)
    told = json.loads((folder / "metrics" / "generation.json").read_text())
    assert told["how"]["top_k"] == 4
    assert told["generation"]["clips"] == 8
    assert told["generation"]["seconds_per_cpu_second"] > 0
    assert (folder / "figures" / "capacity.png").is_file()
    for name, value in before.items():
        assert torch.equal(value, task.state_dict()[name])


def test_clips_of_several_lengths_sound_as_each_alone(data: AudioData) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 16, (2, length), generator=generator) for length in (5, 9, 5, 0)]
    waves = sounds(data.tokenizer, codes)

    assert [len(wave) for wave in waves] == [5 * 256, 9 * 256, 5 * 256, 0]
    for wave, part in zip(waves[:3], codes, strict=False):
        assert torch.allclose(wave, data.tokenizer.decode(part[None])[0], atol=1e-4)


# --- capacity ---------------------------------------------------------------------------------------------------------


def test_the_picture_of_capacity_names_amounts_and_keeps_a_share_above_nothing() -> None:
    report = CapacityReport()
    report.domains, report.seen = [f"voice_{k}" for k in range(12)], list(range(8))
    figure = report._figure(torch.tensor([8.0, 20.0, 4.0, 0.0]).expand(2, 12, 8, 4))
    left, right = figure.axes

    check_readable(figure)
    assert (left.get_ylabel(), right.get_ylabel()) == ("experts", "share of the steps")
    assert right.get_ylim()[0] == 0
    assert figure.legends[0].get_title().get_text() == "dashed: unseen"


def record_of(choices: list[list[int]], num_experts: int, mask: list[bool] | None = None) -> Record:
    """A routing in which row n chose the experts ``choices[n]``; the number of experts stands for a null choice."""
    pairs = [(row, expert) for row, chosen in enumerate(choices) for expert in chosen]
    expert = torch.tensor([expert for _, expert in pairs])
    routing = Routing(
        torch.tensor([row for row, _ in pairs]),
        expert,
        torch.ones(len(pairs)),
        num_rows=len(choices),
        num_experts=num_experts,
        null_M=expert == num_experts,
    )
    return Record("net.blocks.0.ffn", routing, SimpleNamespace(), None if mask is None else torch.tensor(mask))  # type: ignore[arg-type]


def counted(record: Record, labels: list[int], num: int) -> Tensor:
    return count_rows(record, torch.tensor(labels), num)


def test_real_and_null_experts_are_counted_row_by_row() -> None:
    record = record_of([[0, 1], [2], [1, 2], [0], [2]], num_experts=2)  # 2 is the null expert
    found = counted(record, [0, 0, 1, -1, 1], 2)

    # label 0: rows 0 (two real) and 1 (null alone); label 1: rows 2 (one real, null) and 4 (null alone).
    assert found.tolist() == [[2, 2, 1, 1], [2, 1, 2, 1]]
    assert shares(found.sum(0)) == {"real": 0.75, "null": 0.75, "none": 0.5}


def test_masked_rows_do_not_count() -> None:
    record = record_of([[0, 1], [2], [1, 2]], num_experts=2, mask=[False, True, True])
    assert counted(record, [0, 0, 0], 1).tolist() == [[2, 1, 2, 1]]


def test_the_report_is_by_layer_domain_and_time(data: AudioData, tmp_path: Path) -> None:
    report = CapacityReport()
    trainer(tmp_path / "run", report).test(small_task(data), datamodule=data, verbose=False)
    told = json.loads((tmp_path / "run" / "metrics" / "capacity.json").read_text())

    assert list(told["layers"]) == ["capacity.0", "capacity.1"]
    assert list(told["layers"]["capacity.0"]) == data.domain_names
    assert len(told["layers"]["capacity.0"]["bell"]["time"]) == 8
    for group in (told["capacity"], told["capacity.1"]):
        assert 0 <= group["none"] <= group["null"] <= 1
        assert 0 < group["real"] <= 3


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AudioSamples, {"every_n_epochs": 0}, "every_n_epochs=0"),
        (AudioSamples, {"per_domain": 0}, "per_domain=0"),
        (GenerationQuality, {"per_domain": 0}, "per_domain=0"),
    ],
)
def test_wrong_options_are_told_at_construction(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


# --- few-shot tuning --------------------------------------------------------------------------------------------------


def test_tuning_lowers_the_bits_of_a_domain_never_heard_and_leaves_no_trace(data: AudioData, tmp_path: Path) -> None:
    few = FewShot(steps=[40], batch_size=4, lr=3e-3)
    task = small_task(data)
    before = {name: value.clone() for name, value in task.state_dict().items() if name.startswith("net.")}
    run = trainer(tmp_path, few, logger=TensorBoardLogger(tmp_path, name="run", version=0))
    run.test(task, datamodule=data, verbose=False)
    found = json.loads((tmp_path / "run" / "version_0" / "metrics" / "test.json").read_text())

    tested = {row["domain"]: row["value"] for row in found["rows"] if row["metric"] == "bits_0"}
    for domain in data.roles["unseen"]:
        zero, after = (few.result[f"few_shot_{steps}.{domain}"] for steps in (0, 40))
        assert zero["bits_0"] == pytest.approx(tested[domain], rel=1e-6)  # zero-shot is what the test says
        assert zero["gain"] == 0
        assert after["gain"] > 0.3
        assert found["summary"][f"few_shot_40.{domain}"] == after
    assert all(torch.equal(before[name], task.state_dict()[name]) for name in before)
    assert not any(parameter.grad is not None for parameter in task.parameters())


@pytest.mark.parametrize("wrong", [{"steps": []}, {"steps": [-1]}, {"batch_size": 0}, {"tuned": []}])
def test_few_shot_refuses_what_tunes_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps are 0 or more"):
        FewShot(**wrong)
