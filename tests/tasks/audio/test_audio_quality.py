# SPDX-License-Identifier: Apache-2.0
"""Numbers of drawn clips against sounds and clouds whose numbers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tasks.audio.data.chords import TEMPI, TIMBRES, draw_prompt, play
from tasks.audio.data.prompt import Prompt
from tasks.audio.report.judge import PIECE, Judge, Judging, cut, log_mel, train_judge
from tasks.audio.report.music import adherence, chroma, chroma_cosine, has_score, tempo_of
from tasks.audio.report.quality import frechet, histograms, jensen_shannon, loudness, mel_windows

RATE = 8000


def sine(hertz: float, seconds: float = 1.0, gain: float = 0.5) -> Tensor:
    return gain * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * RATE)) / RATE)


def pieces(timbre: str, count: int, seed: int = 0) -> tuple[list[Tensor], list[Prompt]]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [draw_prompt(timbre, generator) for _ in range(count)]
    return play(prompts, TIMBRES[timbre], generator), prompts


# --- loudness, distance, histograms -----------------------------------------------------------------------------------


def test_loudness_of_a_sine_is_its_amplitude_less_three_decibels() -> None:
    for gain in (1.0, 0.1, 0.01):
        assert loudness(sine(440, gain=gain)) == pytest.approx(20 * math.log10(gain) - 10 * math.log10(2), abs=0.01)
    assert loudness(torch.zeros(10)) == loudness(torch.zeros(0)) == -120.0


def test_frechet_distance_of_diagonal_clouds_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(base.T))).T  # exactly N(0, 1)
    scale, shift = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([0.0, 3.0, -1.0]).double()

    wanted = float(shift.square().sum() + (1 - scale).square().sum())
    assert frechet(base, base * scale + shift) == pytest.approx(wanted, rel=1e-6)
    assert frechet(base, base) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(frechet(base, base[:1]))


def test_windows_do_not_hear_how_loud_a_clip_is_and_tell_sounds_apart() -> None:
    voice = sine(300, 2.0) + sine(700, 2.0)

    assert torch.allclose(mel_windows([voice], RATE), mel_windows([0.1 * voice], RATE), atol=1e-4)
    assert mel_windows([voice, sine(300, 2.5)], RATE).shape == (2 + 3, 80)
    assert mel_windows([torch.zeros(0)], RATE).shape == (0, 80)


def test_histograms_count_codes_and_their_divergence_lies_between_equal_and_disjoint() -> None:
    found = histograms([torch.tensor([[0, 0, 3, -1], [1, 1, 1, -1]]), torch.tensor([[2], [3]])], 4)
    assert found.tolist() == [[2, 0, 1, 1], [0, 3, 0, 1]]

    a, b = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    assert jensen_shannon(a, 3 * a) == pytest.approx(0.0, abs=1e-9)
    assert jensen_shannon(a, b) == pytest.approx(1.0)
    # Half shared: p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4).
    half = jensen_shannon(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    wanted = (math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5 * math.log2(2)) / 2
    assert half == pytest.approx(wanted)


# --- music ------------------------------------------------------------------------------------------------------------


def test_chroma_of_a_chord_lies_in_its_pitch_classes() -> None:
    c_major = sine(261.63) + sine(329.63) + sine(392.0)  # C, E, G
    energy = chroma(c_major, RATE)[:, 10:-10].mean(1)

    assert sorted(energy.topk(3).indices.tolist()) == [0, 4, 7]
    assert float(energy[[0, 4, 7]].sum() / energy.sum()) > 0.98


def test_a_piece_fits_its_own_chords_better_than_those_of_another_key() -> None:
    waves, prompts = pieces("organ", 8)
    for wave, prompt in zip(waves, prompts, strict=True):
        notes = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"]
        moved = " ".join(
            notes[(notes.index(name.rstrip("m")) + 6) % 12] + ("m" if name.endswith("m") else "")
            for name in prompt.text.split()
        )
        other = Prompt("music", prompt.labels, moved)  # a tritone away
        own = chroma_cosine(wave, RATE, prompt)
        assert own > 0.85
        assert own > chroma_cosine(wave, RATE, other) + 0.3
    assert math.isnan(chroma_cosine(waves[0][:100], RATE, prompts[0]))


@pytest.mark.parametrize("timbre", ["organ", "pluck"])
def test_tempo_of_real_pieces_is_heard(timbre: str) -> None:
    waves, prompts = pieces(timbre, 30)
    right = [tempo_of(wave, RATE) == prompt.labels["tempo"] for wave, prompt in zip(waves, prompts, strict=True)]

    assert {prompt.labels["tempo"] for prompt in prompts} == set(TEMPI)
    assert sum(right) / len(right) >= 0.9


def test_adherence_is_for_prompts_with_chords_and_a_tempo() -> None:
    waves, prompts = pieces("organ", 6)
    found = adherence(waves, prompts, RATE)

    assert found["chroma"] > found["chroma_shuffled"] + 0.1
    assert found["tempo"] >= 0.8
    assert adherence([sine(200)], [Prompt("speech", {}, "la")], RATE) == {}
    assert not has_score(Prompt("music", {"tempo": "fast"}, "not a chord"))
    assert not has_score(Prompt("music", {"tempo": "presto"}, "C"))
    assert not has_score(Prompt("music", {"tempo": "fast"}))


# --- the judge --------------------------------------------------------------------------------------------------------


def test_a_clip_is_cut_into_pieces_that_cover_it() -> None:
    wave = torch.arange(20_000).float()
    found = cut(wave, RATE)

    assert found.shape == (3, round(PIECE * RATE))
    assert set(found.flatten().tolist()) == set(wave.tolist())
    assert torch.equal(cut(wave[:3000], RATE)[0, :6000], wave[:3000].repeat(2))
    assert cut(torch.zeros(0), RATE).shape == (1, RATE)


def test_log_mel_of_silence_is_the_floor() -> None:
    assert torch.equal(log_mel(torch.zeros(1, RATE), RATE), torch.full((1, 40, 63), 1e-3).log())


def test_the_judge_tells_two_sounds_apart_and_leaves_random_numbers_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    low = [sine(200 + 20 * float(torch.rand((), generator=generator)), 1.5) for _ in range(10)]
    high = [sine(1500 + 20 * float(torch.rand((), generator=generator)), 0.7) for _ in range(10)]
    domain = torch.tensor([0] * 8 + [1] * 8)
    state, judges = torch.get_rng_state(), []
    for _ in range(2):
        judge = Judge(RATE, 2, width=4)
        torch.set_rng_state(state)  # making it draws weights
        judges.append(train_judge(judge, low[:8] + high[:8], domain, Judging(steps=30, batch_size=8, width=4)))
        assert torch.equal(torch.get_rng_state(), state)

    assert judges[0].domains(low[8:] + high[8:]).tolist() == [0, 0, 1, 1]
    for a, b in zip(judges[0].parameters(), judges[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch_size": 0}, {"width": 0}, {"lr": 0.0}])
def test_wrong_settings_of_the_judge_are_told(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="1 or more, lr is above 0"):
        Judging(**options)  # type: ignore[arg-type]
