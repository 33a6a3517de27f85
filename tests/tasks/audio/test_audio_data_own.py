# SPDX-License-Identifier: Apache-2.0
"""Audio files of a user: what is written is read, whatever its form; what cannot be used is told by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audio_data_common import FEW, loudest_hertz, own_folder, prepare, small_tokenizer, tone, write_sound, write_table

from moeapps.data.domain import SPLITS
from tasks.audio.data.generated import GeneratedAudio
from tasks.audio.data.own_audio import JoinedAudio, OwnAudio
from tasks.audio.data.readers.audio_files import (
    AudioFileError,
    cut_at_pauses,
    read_audio,
    remark,
    resample,
    write_audio,
)
from tasks.audio.data.readers.clip_table import _below
from tasks.audio.datamodule import AudioData

ALL: dict[str, Any] = {"val_share": 0.0, "test_share": 0.0}


@pytest.mark.parametrize("ending", ["wav", "flac", "aiff"])
def test_samples_that_are_written_are_read(ending: str, tmp_path: Path) -> None:
    wave = (torch.rand(4000) * 2 - 1).mul(32768).floor().clamp(-32768, 32767) / 32768
    path = write_sound(tmp_path / f"a.{ending}", wave)

    assert torch.equal(read_audio(path, 8000), wave)


@pytest.mark.parametrize("ending", ["ogg", "mp3"])
def test_lossy_files_keep_their_tone(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    import soundfile

    soundfile.write(path, tone(440, 1.0, rate=16000).numpy(), 16000)
    wave = read_audio(path, 8000)

    assert abs(loudest_hertz(wave[:8000]) - 440) <= 1
    assert abs(float(wave[2000:6000].square().mean().sqrt()) - 0.3 / 2**0.5) < 0.02


@pytest.mark.parametrize("rate", [4000, 11025, 16000, 44100, 44101, 48000])
def test_another_rate_keeps_pitch_loudness_and_length(rate: int, tmp_path: Path) -> None:
    wave = read_audio(write_sound(tmp_path / "a.wav", tone(440, 1.0, rate), rate), 8000)

    assert abs(len(wave) - 8000) <= 1
    assert loudest_hertz(wave[:8000]) == pytest.approx(440, abs=1)
    middle = wave[1000:7000]
    exact = tone(440, 1.0)[1000:7000]
    assert float((middle - exact).square().mean().sqrt()) < 0.01 * 0.3


def test_what_the_new_rate_cannot_hold_is_gone() -> None:
    for hertz in (4800, 6000, 7900):
        left = resample(tone(hertz, 0.5, rate=16000), 16000, 8000)[200:-200]
        assert float(left.abs().max()) < 0.003  # 40 dB below 0.3
    with pytest.raises(ValueError, match="sample rates 0 and 8000"):
        resample(tone(100, 0.1), 0, 8000)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(300, 0.2), tone(700, 0.2)
    path = write_sound(tmp_path / "a.wav", torch.stack([left, right, torch.zeros(1600)], 1), subtype="FLOAT")

    assert torch.allclose(read_audio(path, 8000), (left + right) / 3, atol=1e-6)


def test_samples_beyond_full_scale_are_cut(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", torch.tensor([0.5, 1.5, -2.0, 0.25]), subtype="FLOAT")

    assert read_audio(path, 8000).tolist() == [0.5, 1.0, -1.0, 0.25]


def no_file(path: Path) -> None:
    pass


def text_file(path: Path) -> None:
    path.write_text("this is no sound, whatever it is called")


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def no_sample(path: Path) -> None:
    write_sound(path, np.zeros(0))


def not_a_number(path: Path) -> None:
    write_sound(path, np.array([0.0, np.nan, 0.0]), subtype="FLOAT")


def infinite(path: Path) -> None:
    write_sound(path, np.array([0.0, np.inf, 0.0]), subtype="FLOAT")


def half_a_header(path: Path) -> None:
    write_sound(path, tone(200, 0.1))
    path.write_bytes(path.read_bytes()[:20])


def cut_flac(path: Path) -> None:
    other = write_sound(path.with_suffix(".flac"), torch.rand(20000))
    path.write_bytes(other.read_bytes()[:9000])
    other.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_file, "no audio file .*a.wav; correct its name"),
        (text_file, "a.wav is not a readable audio file .*readable are .wav, .flac"),
        (empty_file, "a.wav is not a readable audio file"),
        (no_sample, "a.wav holds no sample"),
        (not_a_number, "a.wav holds NaN or infinity"),
        (infinite, "a.wav holds NaN or infinity"),
        (half_a_header, "a.wav is not a readable audio file"),
        (cut_flac, "a.wav is not a readable audio file"),
    ],
)
def test_files_that_cannot_be_used_are_told(spoil: Any, message: str, tmp_path: Path) -> None:
    spoil(tmp_path / "a.wav")
    with pytest.raises(AudioFileError, match=message):
        read_audio(tmp_path / "a.wav", 8000)

    if spoil is not no_file:
        write_table(tmp_path, ["a.wav,x,speech,hello"])
        with pytest.raises(AudioFileError, match=message):
            prepare(OwnAudio(root=tmp_path, **ALL), "x", tmp_path / "cache")


def test_a_wave_that_is_written_is_read_and_a_bad_one_is_told(tmp_path: Path) -> None:
    wave = tone(220, 0.1, gain=1.0)
    write_audio(tmp_path / "new" / "a.wav", wave, 8000)

    assert torch.allclose(read_audio(tmp_path / "new" / "a.wav", 8000), wave, atol=1 / 32000)
    for bad in (torch.zeros(2, 3), torch.zeros(0), torch.tensor([float("nan")])):
        with pytest.raises(AudioFileError, match=r"cannot be written to a.wav; give finite \[n\]"):
            write_audio(tmp_path / "a.wav", bad, 8000)


def test_silence_and_clipping_are_noticed() -> None:
    square = tone(100, 0.5, gain=50.0).clamp(-1, 1)
    assert [remark(wave) for wave in (torch.zeros(100), tone(100, 0.5, gain=1e-3), square, tone(100, 0.5))] == [
        "silent",
        "silent",
        "clipped",
        None,
    ]


def test_pieces_of_a_long_wave_make_it_up_and_none_is_too_long() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (1, 799, 800, 801, 5000, 12345):
        wave = torch.rand(length, generator=generator)
        pieces = cut_at_pauses(wave, 1000, 0.8)
        assert torch.equal(torch.cat(pieces), wave)
        assert max(len(piece) for piece in pieces) <= 800
        assert min(len(piece) for piece in pieces) > 0
        assert all(len(piece) >= 400 for piece in pieces[:-1])
    with pytest.raises(ValueError, match=r"use 0\.1 or more"):
        cut_at_pauses(torch.zeros(9), 1000, 0.0)


def test_a_folder_is_read_with_its_words_and_labels(tmp_path: Path) -> None:
    waves = {"x/1.wav": tone(300, 0.3), "x/2.wav": tone(400, 0.4), "y.wav": tone(500, 0.5)}
    for file, wave in waves.items():
        write_sound(tmp_path / file, wave)
    rows = ['x/1.wav,anna,speech,"à, b",it,', "x/2.wav,anna,speech,привет 你好,,loud", "y.wav,piano,music,,,"]
    write_table(tmp_path, rows, header="file,domain,kind,text,language,style")
    source = OwnAudio(root=tmp_path, **ALL)

    assert source.domains == ["anna", "piano"]
    assert [source.kind(name) for name in source.domains] == ["speech", "music"]
    assert source.labels(["anna"]) == ["kind=speech", "language=it", "style=loud"]
    clips = source.clips("anna", "train", tmp_path / "cache")
    assert [str(c.prompt) for c in clips] == ["speech language=it: à, b", "speech style=loud: привет 你好"]
    for clip in clips:
        assert torch.allclose(clip.wave, waves[clip.name], atol=1e-4)
    assert [str(c.prompt) for c in source.clips("piano", "train", tmp_path / "cache")] == ["music"]


def test_splits_are_the_tables_else_drawn_and_no_file_is_in_two(tmp_path: Path) -> None:
    own_folder(tmp_path, {"a": 40, "b": 2})
    lines = (tmp_path / "clips.csv").read_text().splitlines()
    rows = [f"{line},{['test', 'val', 'train', ''][k] if k < 4 else ''}" for k, line in enumerate(lines[1:])]
    write_table(tmp_path, rows, header=lines[0] + ",split")
    source = OwnAudio(root=tmp_path)
    names = {split: [c.name for c in source.clips("a", split, tmp_path / "c")] for split in SPLITS}

    assert names["test"][0] == "a/00.wav"
    assert names["val"][0] == "a/01.wav"
    assert "a/02.wav" in names["train"]
    assert {split: len(found) for split, found in names.items()} == {"test": 1 + 4, "val": 1 + 4, "train": 30}
    assert len({name for found in names.values() for name in found}) == 40
    assert source.splits("a") == OwnAudio(root=tmp_path).splits("a") != OwnAudio(root=tmp_path, seed=1).splits("a")
    assert set(source.splits("b").values()) == {"train"}  # of two files none can be spared
    given = OwnAudio(root=tmp_path, split="test").splits("a")
    assert [given[f"a/{k:02}.wav"] for k in range(5)] == ["test", "val", "train", "test", "test"]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    own_folder(tmp_path, {"a": 2})
    OwnAudio(root=tmp_path, **ALL).clips("a", "train", tmp_path / "c")
    write_sound(tmp_path / "a" / "00.wav", tone(900, 0.7))

    again = OwnAudio(root=tmp_path, **ALL).clips("a", "train", tmp_path / "c")
    assert torch.allclose(again[0].wave, tone(900, 0.7), atol=1e-4)


def test_silent_clips_are_left_out_and_clipped_ones_are_named(tmp_path: Path, caplog: Any) -> None:
    for file, wave in {"a": tone(300, 0.3), "b": torch.zeros(2400), "c": tone(90, 0.3, gain=20).clamp(-1, 1)}.items():
        write_sound(tmp_path / f"{file}.wav", wave)
    write_table(tmp_path, [f"{file}.wav,x,music," for file in "abc"])
    with caplog.at_level(logging.WARNING, logger="moeapps"):
        clips = OwnAudio(root=tmp_path, **ALL).clips("x", "train", tmp_path / "cache")

    assert [clip.name for clip in clips] == ["a.wav", "c.wav"]
    assert "domain x: 1 silent clips are left out, the first of b.wav" in caplog.text
    assert "domain x: 1 clipped clips are used as they are, the first of c.wav" in caplog.text
    write_table(tmp_path, ["b.wav,x,music,"])
    with pytest.raises(AudioFileError, match=r"domain 'x' .* has no clip that is not silent"):
        prepare(OwnAudio(root=tmp_path, **ALL), "x", tmp_path / "cache")


GOOD = "a.wav,x,speech,hello"


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("file,kind,text", ["a.wav,speech,hello"], "has no column domain; it has file, kind, text"),
        ("", [], "has no column file, domain, kind; it has none"),
        ("file,domain,kind,kind", ["a.wav,x,speech,speech"], "has a column twice"),
        ("file,domain,kind,text", [], "has no row below its header"),
        ("file,domain,kind,text", [GOOD, "a.wav,x,speech"], "line 3: more or fewer cells"),
        ("file,domain,kind,text", ["a.wav,x,speech,hello, there"], "line 2: more or fewer cells"),
        ("file,domain,kind,text", ["a.wav,x,noise,hello"], "line 2: kind='noise' is not allowed"),
        ("file,domain,kind,text", ["../a.wav,x,speech,hello"], "line 2: file '../a.wav' is not a path below"),
        ("file,domain,kind,text", ["/a.wav,x,speech,hello"], "line 2: file '/a.wav' is not a path below"),
        ("file,domain,kind,text", [",x,speech,hello"], "line 2: file '' is not a path below"),
        ("file,domain,kind,text", [GOOD, GOOD], "names a.wav in rows 1 and 2"),
        ("file,domain,kind,text", [GOOD, "b.wav,x,speech,hi"], "no file .*b.wav .1 missing of domain 'x'."),
        ("file,domain,kind,text", [GOOD, "c.wav,x,music,"], "domain 'x' of clips.csv holds speech and music"),
        ("file,domain,kind,split", ["a.wav,x,speech,dev"], "line 2: split 'dev' is not allowed; use train, val, test"),
        ("file,domain,kind,mood", ["a.wav,x,speech,very good"], "line 2: label mood='very good' is not allowed"),
        ("file,domain,kind,text", ['a.wav,x,speech,"never closed'], "clips.csv is not a readable table"),
    ],
)
def test_faults_of_the_table_are_told_with_their_line(
    header: str, rows: list[str], message: str, tmp_path: Path
) -> None:
    for file in ("a.wav", "c.wav"):
        write_sound(tmp_path / file, tone(300, 0.2))
    write_table(tmp_path, rows, header=header)

    with pytest.raises(AudioFileError, match=message):
        OwnAudio(root=tmp_path)


def test_a_missing_table_and_one_in_another_encoding_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        AudioFileError, match=r"no file .*clips\.csv; write a table with the columns file, domain, kind"
    ):
        OwnAudio(root=tmp_path)
    (tmp_path / "clips.csv").write_bytes("file,domain,kind,text\na.wav,x,speech,s\xec\n".encode("latin-1"))
    with pytest.raises(AudioFileError, match="save it as CSV in UTF-8"):
        OwnAudio(root=tmp_path)


@pytest.mark.parametrize(
    "options", [{"sample_rate": 10}, {"seconds": 0.1}, {"val_share": 0.6, "test_share": 0.5}, {"split": "dev"}]
)
def test_wrong_options_are_told(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        OwnAudio(root=tmp_path, **options)


def test_own_clips_beside_the_trained_ones_leave_network_and_tokenizer_as_they_are(tmp_path: Path) -> None:
    write_sound(tmp_path / "mine.wav", tone(300, 1.0, rate=44100), rate=44100)
    write_table(tmp_path, ["mine.wav,mine,speech,hello there,test"], header="file,domain,kind,text,split")
    first = GeneratedAudio(**FEW)
    roles = {"seen": ["low_voice", "organ"], "validation": ["reed"]}
    plain = AudioData(source=first, tokenizer=small_tokenizer(), unseen=["bell"], cache_dir=tmp_path / "c", **roles)
    joined = AudioData(
        source=JoinedAudio(sources=[first, OwnAudio(root=tmp_path)]),
        tokenizer=small_tokenizer(),
        unseen=["bell", "mine"],
        predict=["mine"],
        cache_dir=tmp_path / "c",
        **roles,
    )
    joined.prepare_data()

    keys = ("num_symbols", "labels", "tokenizer", "num_codes", "num_codebooks")
    assert {key: plain.facts[key] for key in keys} == {key: joined.facts[key] for key in keys}
    assert plain.tokenizer.digest == joined.tokenizer.digest
    batch = joined.codes("mine", "test")
    assert torch.equal(batch.codes, joined.tokenizer.encode(joined.clips("mine", "test")[0].wave[None]))
    assert joined.vocabulary.decode([s for s in batch.prompt[0].tolist() if s]) == "speech: hello there"


def test_collections_that_do_not_go_together_are_told(tmp_path: Path) -> None:
    own_folder(tmp_path, {"organ": 1})
    with pytest.raises(ValueError, match="two collections have domains named organ"):
        JoinedAudio(sources=[GeneratedAudio(**FEW), OwnAudio(root=tmp_path)])
    with pytest.raises(ValueError, match=r"sample rates \[8000, 16000\]"):
        JoinedAudio(sources=[GeneratedAudio(**FEW), OwnAudio(root=tmp_path, sample_rate=16000)])
    with pytest.raises(ValueError, match=r"sample rates \[\]; give one or more"):
        JoinedAudio(sources=[])


PATHS = [
    "a/b.wav",
    "a//b",
    "./a",
    "a/./b",
    "../a",
    "/a",
    "a/..",
    "é/ü.wav",
    "a/.b",
    "a/b/",
    "a..b",
    "",
    "a b/c",
    "a/...",
    ".",
]


@pytest.mark.parametrize("file", PATHS)
def test_paths_in_a_table_mean_what_pathlib_says(file: str) -> None:
    path = Path(file)
    outside = not file or path.is_absolute() or ".." in path.parts

    assert _below(file) == (None if outside else path.as_posix())
