# SPDX-License-Identifier: Apache-2.0
"""Clips as files: what is written is what a player reads, and a browser finds everything on the page."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor

from tasks.audio.report.clips import FLOOR_DB, Heard, decibels, drawable, write_clips, write_spectrogram, write_wave

RATE = 8000


def sine(hertz: float, seconds: float = 0.5, gain: float = 0.5) -> Tensor:
    return gain * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * RATE)) / RATE)


def test_a_wave_is_read_back_as_it_was(tmp_path: Path) -> None:
    wave = sine(440)
    write_wave(tmp_path / "a" / "tone.wav", wave, RATE)
    found, rate = soundfile.read(tmp_path / "a" / "tone.wav", dtype="float32")

    assert rate == RATE
    assert soundfile.info(tmp_path / "a" / "tone.wav").subtype == "PCM_16"
    assert torch.allclose(torch.from_numpy(found), wave, atol=1 / 32768)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["tone.wav"]


def test_what_is_too_loud_is_turned_down_and_keeps_its_shape(tmp_path: Path) -> None:
    wave = sine(440, gain=3.0)
    write_wave(tmp_path / "loud.wav", wave, RATE)
    found = torch.from_numpy(soundfile.read(tmp_path / "loud.wav", dtype="float32")[0])

    assert torch.allclose(found, wave / wave.abs().max(), atol=1 / 16384)


@pytest.mark.parametrize("wave", [torch.zeros(0), torch.zeros(1, 10), torch.tensor([0.0, math.nan])])
def test_what_is_no_wave_is_told(tmp_path: Path, wave: Tensor) -> None:
    with pytest.raises(ValueError, match="finite samples"):
        write_wave(tmp_path / "x.wav", wave, RATE)
    assert not (tmp_path / "x.wav").exists()


def test_a_tone_is_loudest_in_its_band_and_silence_lies_on_the_floor() -> None:
    level = decibels(sine(1000), RATE)
    assert level.max() == 0.0
    assert level.mean(1).argmax().item() == round(1000 / (RATE / 512))
    assert level.min() >= FLOOR_DB
    assert decibels(torch.zeros(3), RATE).unique().tolist() == [0.0]  # nothing is louder than anything else


def test_a_spectrogram_is_a_picture(tmp_path: Path) -> None:
    path = write_spectrogram(tmp_path / "s.png", sine(300), RATE, title="costs $5", kept=0.2)
    with Image.open(path) as picture:
        assert picture.size == (500, 240)
        assert len(picture.convert("RGB").getcolors(10**6)) > 50


def test_the_page_plays_every_clip_and_leads_to_every_file(tmp_path: Path) -> None:
    clips = [
        Heard("a-0", sine(200), "speech voice=low: <b>la</b>"),
        Heard("b-0", torch.zeros(0), "music tempo=fast"),
        Heard("c-0", sine(300), "x" * 200, kept=0.1),
    ]
    write_clips(tmp_path / "samples", clips, RATE, title="clips & more")
    page = (tmp_path / "samples" / "index.html").read_text()

    named = re.findall(r'src="([^"]+)"', page)
    assert sorted(named) == ["a-0.png", "a-0.wav", "c-0.png", "c-0.wav"]
    assert all((tmp_path / "samples" / name).is_file() for name in named)
    assert "&lt;b&gt;la&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "clips &amp; more" in page
    assert (tmp_path / "samples" / "b-0.txt").read_text() == "music tempo=fast\n"
    assert not (tmp_path / "samples" / "b-0.wav").exists()


def test_clips_of_an_earlier_page_go_and_other_files_stay(tmp_path: Path) -> None:
    def names() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    write_clips(
        tmp_path, [Heard("a&b", sine(200), "x"), Heard("c", sine(300), "y"), Heard("d", sine(9), "z")], RATE, title="1"
    )
    (tmp_path / "mine.wav").write_bytes(b"RIFF")
    write_clips(tmp_path, [Heard("c", torch.zeros(0), "y"), Heard("e", sine(300), "z")], RATE, title="2")
    assert names() == {"index.html", "mine.wav", "c.txt", "e.wav", "e.png", "e.txt"}

    (tmp_path / "index.html").write_text("<h1>my page</h1>\n<h3>mine</h3><p>a clip</p>\n")
    write_clips(tmp_path, [Heard("f", sine(300), "z")], RATE, title="3")
    assert {"mine.wav", "e.wav", "f.wav"} <= names()
    (tmp_path / "index.html").write_text((tmp_path / "index.html").read_text() + "<h3>../outside</h3><p>x</p>\n")
    (tmp_path.parent / "outside.wav").write_bytes(b"RIFF")
    write_clips(tmp_path, [], RATE, title="4")
    assert (tmp_path.parent / "outside.wav").exists()


def test_a_title_in_any_script_is_drawn_without_a_warning(tmp_path: Path) -> None:
    """Warnings are errors here; matplotlib gives one for every character that its font lacks."""
    path = write_spectrogram(tmp_path / "s.png", sine(300), RATE, title="ни хао \u4f60\u597d $5 \U0001f3b5\tend\nline")

    assert path.is_file()
    assert drawable("ни хао \u4f60\u597d $5 \tend\nline") == r"ни хао \u25a1\u25a1 \$5 end line".replace(
        r"\u25a1", "\u25a1"
    )
