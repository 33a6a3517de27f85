# SPDX-License-Identifier: Apache-2.0
"""STOI, PESQ and mel distance of decoded clips."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizer_common import RATE, MuLaw, babble, clips, small

from tasks.audio.report import codec_quality as module
from tasks.audio.report.codec_quality import at_level, codec_quality, installed_measures, mel, pesq, stoi


def test_a_wave_is_as_good_as_itself() -> None:
    """1 and 0 by definition; 4.549 is the largest value of narrow-band PESQ (ITU-T P.862.1)."""
    wave = babble(2.0)

    assert stoi(wave, wave, RATE) == pytest.approx(1.0, abs=1e-6)
    assert pesq(wave, wave, RATE) == pytest.approx(4.549, abs=2e-3)
    assert mel(wave, wave, RATE) == 0


def test_more_noise_is_worse_by_every_measure() -> None:
    wave, noise = babble(2.0), torch.randn(2 * RATE, generator=torch.Generator().manual_seed(4))
    noisy = [wave + amount * noise for amount in (0.001, 0.01, 0.1)]

    for measure, sign in ((stoi, -1), (pesq, -1), (mel, 1)):
        scores = [sign * measure(wave, other, RATE) for other in noisy]
        assert scores == sorted(scores)
        assert scores[-1] - scores[0] > 0.05


def test_a_codec_of_almost_no_loss_is_almost_perfect() -> None:
    found = codec_quality(MuLaw(), [babble(1.5, seed) for seed in range(2)])

    assert found["clips"] == 2
    assert found["stoi"] > 0.98
    assert found["mel"] < 0.05
    assert "stoi_clips" not in found


def test_the_mean_is_over_clips_and_books_are_cut() -> None:
    tokenizer = small(num_codebooks=4).fit(clips())
    waves = [babble(1.0, 11), babble(0.8, 12)]

    def by_hand(books: int) -> float:
        found = []
        for wave in waves:
            heard = tokenizer.decode(tokenizer.encode(wave[None])[:, :books])[0, : len(wave)]
            found.append(mel(0.1 * wave / wave.square().mean().sqrt(), at_level(heard), RATE))
        return sum(found) / 2

    assert codec_quality(tokenizer, waves, measures=["mel"])["mel"] == pytest.approx(by_hand(4), rel=1e-4)
    assert codec_quality(tokenizer, waves, measures=["mel"], num_codebooks=1)["mel"] == pytest.approx(
        by_hand(1), rel=1e-4
    )


def test_loudness_counts_for_nothing() -> None:
    one = codec_quality(MuLaw(), [babble(1.5)], measures=["mel", "stoi"])
    tokenizer = small().fit(clips())

    assert at_level(3 * babble()).allclose(at_level(babble()))
    assert one["mel"] < 0.05
    loud, quiet = (codec_quality(tokenizer, [gain * babble()], measures=["mel"])["mel"] for gain in (1.0, 0.5))
    assert loud == pytest.approx(quiet, rel=1e-3)


def test_clips_without_a_value_are_counted_out() -> None:
    found = codec_quality(MuLaw(), [babble(1.5), torch.zeros(RATE), babble(0.1)])

    assert found["clips"] == 3
    assert found["stoi_clips"] == 1
    assert found["pesq_clips"] == 1
    assert found["mel_clips"] == 2
    assert found["stoi"] == pytest.approx(codec_quality(MuLaw(), [babble(1.5)])["stoi"])


def test_silence_alone_has_no_value() -> None:
    found = codec_quality(MuLaw(), [torch.zeros(RATE)])

    assert all(math.isnan(found[name]) for name in ("stoi", "pesq", "mel"))


def test_another_rate_is_brought_to_that_of_telephones() -> None:
    """The same sound at twice the rate: frequencies and time are those of the first, so the scores are near."""
    wave = babble(2.0)
    from torchaudio.functional import resample

    noisy = wave + 0.01 * torch.randn(2 * RATE, generator=torch.Generator().manual_seed(4))
    twice = pesq(resample(wave, RATE, 2 * RATE), resample(noisy, RATE, 2 * RATE), 2 * RATE)
    assert twice == pytest.approx(pesq(wave, noisy, RATE), abs=0.15)


def test_measures_that_are_not_there_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed_measures() == ["stoi", "pesq", "mel"]
    with pytest.raises(ValueError, match="no measure warmth; allowed: stoi, pesq, mel"):
        codec_quality(MuLaw(), [babble()], measures=["warmth"])
    with pytest.raises(ValueError, match="no clip to judge"):
        codec_quality(MuLaw(), [])

    monkeypatch.setattr(module, "find_spec", lambda name: None)

    assert installed_measures() == ["mel"]
    assert set(codec_quality(MuLaw(), [babble()])) == {"clips", "mel"}
    with pytest.raises(ValueError, match=r"needs pesq: pip install 'moeapps\[audio-metrics\]'"):
        codec_quality(MuLaw(), [babble()], measures=["pesq"])
