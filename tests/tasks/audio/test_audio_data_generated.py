# SPDX-License-Identifier: Apache-2.0
"""Generated clips: labels against measures made here, splits without a common clip, the same clips for a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from audio_data_common import FEW, tone
from torch import Tensor

from moeapps.data.domain import SPLITS
from tasks.audio.data.chords import beat_seconds, chord_notes, strokes_of
from tasks.audio.data.generated import GeneratedAudio
from tasks.audio.data.prompt import Prompt
from tasks.audio.data.source import Clip
from tasks.audio.data.voices import VOICES, speak, syllables

SOURCE = GeneratedAudio(train_speech=8, train_music=24, val=2, test=16)
INSTRUMENTS = ("organ", "pluck", "reed", "bell")
NAMES = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"]


def loudest_notes(wave: Tensor) -> set[int]:
    """The three pitch classes with the most energy at the notes from C3 to B4, by projection on sines."""
    window = torch.hann_window(len(wave))
    time = torch.arange(len(wave)) / 8000
    energy = torch.zeros(12)
    for midi in range(60, 72):
        hertz = 440 * 2 ** ((midi - 69) / 12)
        turning = torch.exp(-2j * torch.pi * hertz * time)
        energy[midi % 12] += (wave * window * turning).sum().abs() ** 2
    return set(energy.topk(3).indices.tolist())


def rise_at_beats(wave: Tensor, beat: float) -> float:
    """Mean rise of the logarithm of loudness from the 10 ms before each multiple of a beat to 20 to 60 ms after it."""
    rises = []
    for start in range(round(8000 * beat), len(wave) - 480, round(8000 * beat)):
        before, after = wave[start - 80 : start], wave[start + 160 : start + 480]
        rises.append(float((after.square().mean() / before.square().mean()).log()) / 2)
    return sum(rises) / len(rises)


@pytest.mark.parametrize("domain", INSTRUMENTS)
def test_chords_that_sound_are_those_of_the_prompt(domain: str) -> None:
    right, total = 0, 0
    for clip in SOURCE.render(domain, "test"):
        beat = round(8000 * beat_seconds(clip.prompt))
        chords = clip.prompt.text.split()
        strokes = len(clip.wave) // beat // len(chords)
        for k in range(len(clip.wave) // beat):
            name = chords[k // strokes]
            root = NAMES.index(name.rstrip("m"))
            third = root + (3 if name.endswith("m") else 4)
            right += loudest_notes(clip.wave[k * beat : (k + 1) * beat]) == {root, third % 12, (root + 7) % 12}
            total += 1
        assert len(clip.wave) == beat * len(strokes_of(clip.prompt))
    assert right >= 0.97 * total, (right, total)


@pytest.mark.parametrize("domain", INSTRUMENTS)
def test_tempo_that_sounds_is_that_of_the_prompt(domain: str) -> None:
    seconds = {"slow": 0.6, "medium": 0.42, "fast": 0.26}
    clips = SOURCE.render(domain, "train")

    assert {clip.prompt.labels["tempo"] for clip in clips} == set(seconds)
    for clip in clips:
        found = {name: rise_at_beats(clip.wave, beat) for name, beat in seconds.items()}
        assert max(found, key=lambda name: found[name]) == clip.prompt.labels["tempo"], (str(clip.prompt), found)
        assert found[clip.prompt.labels["tempo"]] > 0.5


def test_mode_is_that_of_the_key_all_chords_lie_in() -> None:
    major, minor = {0, 2, 4, 5, 7, 9, 11}, {0, 2, 3, 5, 7, 8, 10}
    for clip in SOURCE.render("organ", "train"):
        notes = {note for name in clip.prompt.text.split() for note in chord_notes(name)}
        scale = {"major": major, "minor": minor}[clip.prompt.labels["mode"]]
        assert any(notes <= {(key + step) % 12 for step in scale} for key in range(12)), str(clip.prompt)


def heard_pitch(wave: Tensor) -> float:
    """Fundamental frequency by the autocorrelation of the loudest 40 ms, 80 to 400 Hz."""
    loud = wave.unfold(0, 320, 80).square().mean(1)
    start = 80 * int(loud.argmax())
    piece = wave[start : start + 640]
    same = torch.tensor([float((piece[lag:] * piece[: len(piece) - lag]).sum()) for lag in range(20, 100)])
    return 8000 / (20 + int(same.argmax()))


def test_voices_have_the_pitch_that_is_theirs() -> None:
    for name, voice in VOICES.items():
        heard = torch.tensor([heard_pitch(clip.wave) for clip in SOURCE.render(f"{name}_voice", "test")])
        assert abs(float(heard.median()) / voice.pitch - 1) < 0.12, (name, heard)


def share_above(wave: Tensor, hertz: float) -> float:
    power = torch.fft.rfft(wave).abs().square()
    return float(power[torch.fft.rfftfreq(len(wave), 1 / 8000) > hertz].sum() / power.sum())


def test_syllables_sound_as_their_letters_say() -> None:
    def said(text: str) -> Tensor:
        return speak([text], VOICES["low"], torch.Generator().manual_seed(0))[0]

    assert share_above(said("sisi si"), 3000) > 5 * share_above(said("mimi mi"), 3000)  # a hiss is high
    assert share_above(said("lili li"), 2000) > 3 * share_above(said("lulu lu"), 2000)  # so is the second formant of i
    middle = [share_above(said(text), 600) for text in ("lala la", "lulu lu")]
    assert middle[0] > 3 * middle[1]  # the first formant of a is high
    silence = said("kaka ka").unfold(0, 200, 100).square().mean(1).sqrt()
    assert (silence < 0.02).sum() > (said("mama ma").unfold(0, 200, 100).square().mean(1).sqrt() < 0.02).sum()


def test_longer_transcripts_take_longer() -> None:
    counts, seconds = [], []
    for clip in SOURCE.render("high_voice", "test"):
        counts.append(float(len(syllables(clip.prompt.text))))
        seconds.append(len(clip.wave) / 8000)
    found = torch.corrcoef(torch.tensor([counts, seconds]))[0, 1]
    assert found > 0.8
    assert [len(syllables(text)) for text in ("mata so", "ki")] == [3, 1]


def test_every_clip_is_a_usable_wave() -> None:
    for domain in SOURCE.domains:
        for clip in SOURCE.render(domain, "test"):
            assert clip.wave.dtype == torch.float32
            assert clip.wave.isfinite().all()
            assert 0.5 * 8000 < len(clip.wave) < 3 * 8000
            assert 0.05 < float(clip.wave.square().mean().sqrt()) < 0.11
            assert float(clip.wave.abs().max()) <= 1
            assert clip.ends
            assert clip.prompt.kind == SOURCE.kind(domain)


def test_no_clip_is_in_two_splits_or_domains(tmp_path: Path) -> None:
    names, waves = [], []
    for domain in SOURCE.domains:
        for split in SPLITS:
            for clip in SOURCE.clips(domain, split, tmp_path):
                names.append(clip.name)
                waves.append(clip.wave.numpy().tobytes())
    assert len({*names}) == len(names) == 4 * (8 + 18) + 4 * (24 + 18)
    assert len({*waves}) == len(waves)


def test_speech_is_four_times_as_much_as_music() -> None:
    source = GeneratedAudio()
    seen = source.default_roles["seen"]
    counts = [source.train[source.kind(domain)] for domain in seen]
    assert [source.kind(domain) for domain in seen] == ["speech", "speech", "music", "music"]
    assert counts[0] + counts[1] == 4 * (counts[2] + counts[3])


def same(left: list[Clip], right: list[Clip]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a.wave, b.wave) and a.prompt == b.prompt and a.name == b.name for a, b in pairs)


def test_clips_follow_the_seed_alone(tmp_path: Path) -> None:
    for domain in ("low_voice", "pluck"):
        first = GeneratedAudio(**FEW).clips(domain, "test", tmp_path / "a")
        torch.rand(5)
        again = GeneratedAudio(**FEW).clips(domain, "test", tmp_path / "b")
        cached = GeneratedAudio(**FEW).clips(domain, "test", tmp_path / "a")
        other = GeneratedAudio(**FEW, seed=1).clips(domain, "test", tmp_path / "a")
        assert same(first, again)
        assert same(first, cached)
        assert not any(torch.equal(a.wave, b.wave) for a, b in zip(first, other, strict=True))


def test_labels_are_known_before_any_clip_is_made() -> None:
    for domains in (["low_voice", "organ"], ["bell"], list(SOURCE.domains)):
        known = SOURCE.labels(domains)
        used = {label for d in domains for clip in SOURCE.render(d, "train") for label in clip.prompt.label_names}
        assert len({*known}) == len(known)
        assert used == {*known}


def test_a_damaged_file_of_clips_is_made_again(tmp_path: Path) -> None:
    source = GeneratedAudio(**FEW)
    first = source.clips("organ", "test", tmp_path)
    path = next((tmp_path / "audio").glob("organ-*.npz"))
    whole = path.read_bytes()
    path.write_bytes(whole[:500])

    assert same(first, source.clips("organ", "test", tmp_path))
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GeneratedAudio(val=0), "val=0 is not allowed"),
        (lambda: GeneratedAudio().check(["organ", "drum"]), "has no domain 'drum'; allowed: low_voice"),
        (lambda: chord_notes("H"), "'H' is no chord"),
        (lambda: syllables("mato x"), "'x' in 'mato x' is no syllable"),
        (lambda: strokes_of(Prompt("music", {"tempo": "fast"}, "C Hm")), "'Hm' is no chord"),
    ],
)
def test_what_is_not_allowed_is_told(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_measures_of_this_file_know_a_plain_tone() -> None:
    assert heard_pitch(tone(200, 0.5)) == 200
    assert loudest_notes(tone(261.63, 0.4) + tone(329.63, 0.4) + tone(392.0, 0.4)) == {0, 4, 7}
