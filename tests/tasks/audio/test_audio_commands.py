# SPDX-License-Identifier: Apache-2.0
"""``moeapps sample`` for clips: what is written, whose prompts are taken, and what is said of wrong words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import yaml
from audio_task_common import small_data, small_task

from moeapps.cli import help_text, main
from moeapps.commands import trained
from moeapps.commands.tasks import task_commands
from tasks.audio.datamodule import AudioData
from tasks.audio.report import sample


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> AudioData:
    return small_data(tmp_path_factory.mktemp("cache"))


def test_prompts_are_drawn_as_often_as_asked(
    data: AudioData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "speech voice=low: la mo", "--prompt", "music timbre=kazoo: C F"]
    words += ["--count", "2", "--seconds", "0.4", "--top_k", "4", "--cfg", "0", "--out", str(tmp_path / "out")]

    assert sample.main(words, small_task(data), data) == 0
    names = ["prompt0-0", "prompt0-1", "prompt1-0", "prompt1-1"]
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.wav")) == names
    assert (tmp_path / "out" / "prompt1-1.txt").read_text() == "music timbre=kazoo: C F\n"
    first, second = (soundfile.read(tmp_path / "out" / f"{name}.wav")[0] for name in names[:2])
    assert len(first) != len(second) or (first != second).any()
    assert 0 < len(first) <= 0.4 * 8000 + 256
    printed = capsys.readouterr().out
    assert "does not know: timbre=kazoo" in printed
    assert "timbre=organ" in printed
    assert str(tmp_path / "out" / "index.html") in printed


def test_without_prompts_those_of_test_clips_of_the_seen_domains_are_taken(data: AudioData, tmp_path: Path) -> None:
    words = ["--count", "1", "--seconds", "0.3", "--seed", "3", "--out"]
    task = small_task(data)
    assert sample.main([*words, str(tmp_path / "a")], task, data) == 0
    assert sample.main([*words, str(tmp_path / "b")], task, data) == 0

    for name in data.present("seen"):
        text = (tmp_path / "a" / f"{name}-0.txt").read_text()
        assert text == f"{data.clips(name, 'test')[0].prompt}\n"
        files = [(tmp_path / side / f"{name}-0.wav").read_bytes() for side in ("a", "b")]
        assert files[0] == files[1]


def test_any_domain_may_be_named(data: AudioData, tmp_path: Path) -> None:
    words = ["--domains", "bell", "--count", "1", "--seconds", "0.3", "--out", str(tmp_path)]
    assert sample.main(words, small_task(data), data) == 0
    assert {path.name for path in tmp_path.glob("*.wav")} == {"bell-0.wav"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "--count 0"),
        (["--prompt", "sing a song"], "is not understood"),
        (["--domains", "tuba"], "tuba"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--seconds", "0"], "max_seconds=0.0"),
        (["--seconds", "-1"], "^--seconds -1 gives max_seconds=-1.0; use more than 0$"),
    ],
)
def test_wrong_words_are_told(data: AudioData, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample.main([*words, "--out", str(tmp_path)], small_task(data), data)


# --- one word for several tasks ---------------------------------------------------------------------------------------


def test_pictures_and_clips_share_the_word_and_help_tells_both() -> None:
    found = task_commands()["sample"]

    assert {command.data.partition(":")[2] for command in found} == {"ImageData", "AudioData"}
    assert {command.weights for command in found} == {True}
    (line,) = [line for line in help_text().splitlines() if line.strip().startswith("sample")]
    assert all(command.summary in line for command in found)


def config_of_a_run(folder: Path, cache: Path) -> Path:
    """A run folder with a config and a checkpoint of a small network."""
    moe = {"class_path": "moeapps.moe.presets.unimoe_audio", "init_args": {"num_experts": 3, "num_shared": 1}}
    net = {"dim": 16, "depth": 1, "num_heads": 2, "moe": moe}
    tokenizer = {"num_codebooks": 2, "num_codes": 16}
    source = {"train_speech": 6, "train_music": 4, "val": 3, "test": 3}
    config: dict[str, Any] = {
        "seed_everything": 0,
        "system": "clips",
        "model": {
            "class_path": "tasks.audio.module.AudioTask",
            "init_args": {"net": {"class_path": "tasks.audio.model.AudioLM", "init_args": net}},
        },
        "data": {
            "class_path": "tasks.audio.datamodule.AudioData",
            "init_args": {
                "cache_dir": str(cache),
                "source": {"class_path": "tasks.audio.data.generated.GeneratedAudio", "init_args": source},
                "tokenizer": {"class_path": "tasks.audio.nets.tokenizers.MelRVQ", "init_args": tokenizer},
            },
        },
    }
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    built = trained.build(folder)
    torch.save({"state_dict": built.model.state_dict()}, folder / "checkpoints" / "last.ckpt")
    return folder


def test_words_are_read_before_the_run_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trained, "build", lambda *_, **__: pytest.fail("built"))
    (tmp_path / "version_0").mkdir()
    config = {"data": {"class_path": "tasks.audio.datamodule.AudioData"}}
    (tmp_path / "version_0" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    assert main(["sample", "--run", str(tmp_path), "--cuont", "3"]) == 2
    assert "unrecognized arguments: --cuont 3" in capsys.readouterr().err
    assert main(["sample", "--run", str(tmp_path), "--count", "three"]) == 2
    assert "invalid int value: 'three'" in capsys.readouterr().err
    assert main(["sample", "--run", str(tmp_path), "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for text in ("(default: 45)", "longest clip (default: 3.0)", "(default: sample/ of the run)", "are removed"):
        assert text in told


def test_the_data_of_a_run_decides_whose_command_is_meant(
    data: AudioData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config_of_a_run(tmp_path / "run", Path(str(data.cache_dir)))

    assert main(["sample", "--run", str(run), "--count", "1", "--seconds", "0.3"]) == 0, capsys.readouterr().err
    assert len(list((run / "sample").glob("*.wav"))) == 4
    assert main(["fid-stats", "--run", str(run)]) == 2
    assert "AudioData has no command `fid-stats`" in capsys.readouterr().err
