# SPDX-License-Identifier: Apache-2.0
"""MelRVQ: what its codes, its decoded waves and its frames obey."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_common import RATE, babble, clips, sine, small
from torch import Tensor

from tasks.audio.nets.tokenizers import MelRVQ
from tasks.audio.nets.tokenizers.mel_rvq import kmeans, nearest
from tasks.audio.nets.tokenizers.spectrum import mel_distance


@pytest.fixture(scope="module")
def fitted() -> MelRVQ:
    return small().fit(clips())


# Frames --------------------------------------------------------------------------------------------------------------


@given(samples=st.integers(1, 2000), hop=st.sampled_from([40, 160, 250, 256]))
@settings(max_examples=25, deadline=None)
def test_a_frame_begins_with_every_hop(samples: int, hop: int) -> None:
    tokenizer = small(hop=hop, phase_iterations=0)
    tokenizer.fitted.fill_(True)

    codes = tokenizer.encode(torch.ones(2, samples))

    frames = math.ceil(samples / hop)
    assert codes.shape == (2, 3, frames)
    assert tokenizer.num_frames(samples) == frames
    assert tokenizer.decode(codes).shape == (2, frames * hop)


def test_frames_per_second() -> None:
    assert MelRVQ().frame_rate == 31.25
    assert MelRVQ(hop=160).frame_rate == 50


def test_a_click_sounds_in_the_frame_it_lies_in(fitted: MelRVQ) -> None:
    wave = torch.zeros(1, 20 * 256)
    wave[0, 7 * 256 + 128] = 1.0

    loudest = fitted.log_mel(wave)[0].sum(1).argmax()

    assert loudest == 7


def test_a_burst_is_heard_when_it_was_said() -> None:
    wave = torch.zeros(RATE)
    wave[4096:4608] = sine(1000.0)[:512]
    tokenizer = small(num_codes=24).fit([wave, wave.roll(100)])

    heard = tokenizer.decode(tokenizer.encode(wave[None]))[0]

    energy = heard.square()
    centre = float((energy * torch.arange(len(heard))).sum() / energy.sum())
    assert centre == pytest.approx(4352, abs=40)


@pytest.mark.parametrize("frequency", [300.0, 1000.0, 2500.0])
def test_a_tone_keeps_its_pitch(frequency: float) -> None:
    """The loudest frequency of the decoded tone, in cells of 1 Hz, is within a mel band of the tone."""
    tokenizer = MelRVQ(num_codes=8, num_codebooks=2).fit([sine(frequency), babble()])

    heard = tokenizer.decode(tokenizer.encode(sine(frequency)[None]))[0, :RATE]

    band = 700 * (1 + frequency / 700) * (10 ** (2146 / 65 / 2595) - 1)  # hertz of one of 64 bands up to 2146 mel
    assert float(torch.fft.rfft(heard).abs().argmax()) == pytest.approx(frequency, abs=band + 16)


# Books ---------------------------------------------------------------------------------------------------------------


def left_over(tokenizer: MelRVQ, waves: list[Tensor], books: int) -> float:
    """Energy of what the first books do not say of all frames."""
    total = 0.0
    for wave in waves:
        said = tokenizer.dequantised(tokenizer.encode(wave[None])[:, :books])
        total += float((tokenizer.log_mel(wave[None]) - said).double().square().sum())
    return total


@pytest.mark.parametrize("seed", range(4))
def test_every_book_leaves_less_over(seed: int) -> None:
    waves = [babble(1.0, 10 * seed + place) for place in range(3)]
    tokenizer = small(num_codebooks=6, seed=seed).fit(waves)

    energies = [left_over(tokenizer, waves, books) for books in range(1, 7)]
    mean = sum(float((tokenizer.log_mel(wave[None]) - tokenizer.mean_M).double().square().sum()) for wave in waves)

    assert [mean, *energies] == sorted([mean, *energies], reverse=True)
    assert energies[-1] < 0.5 * mean


def test_as_many_codes_as_frames_say_all() -> None:
    wave = babble(0.5)
    frames = math.ceil(len(wave) / 256)
    tokenizer = small(num_codes=frames, num_codebooks=1).fit([wave])

    assert left_over(tokenizer, [wave], 1) == pytest.approx(0, abs=1e-6)


def test_a_centre_encodes_to_itself(fitted: MelRVQ) -> None:
    for book in fitted.books_KVM:
        distinct = torch.unique(book, dim=0)

        assert torch.equal(nearest(distinct, distinct), torch.arange(len(distinct)))


def test_decoding_the_codes_of_a_frame_sums_one_centre_of_each_book(fitted: MelRVQ) -> None:
    codes = torch.tensor([[[3, 0], [5, 1], [15, 2]]])

    said = fitted.dequantised(codes)

    book = fitted.books_KVM
    assert torch.allclose(said[0, 0], fitted.mean_M + book[0, 3] + book[1, 5] + book[2, 15])
    assert torch.allclose(said[0, 1], fitted.mean_M + book[0, 0] + book[1, 1] + book[2, 2])


def test_codes_are_those_of_a_search_by_hand(fitted: MelRVQ) -> None:
    """Greedy residual search over float64 distances, code by code."""
    wave = babble(0.3, 9)
    codes = fitted.encode(wave[None])[0]

    for frame, found in zip(fitted.log_mel(wave[None])[0].double().numpy(), codes.T, strict=True):
        rest = frame - fitted.mean_M.double().numpy()
        for book, code in zip(fitted.books_KVM.double().numpy(), found, strict=True):
            distances = [float(np.square(rest - centre).sum()) for centre in book]
            assert distances[int(code)] == pytest.approx(min(distances), rel=1e-5)
            rest = rest - book[int(code)]


def test_fewer_books_are_the_first_of_more() -> None:
    few, more = small(num_codebooks=2).fit(clips()), small(num_codebooks=4).fit(clips())

    assert torch.equal(few.books_KVM, more.books_KVM[:2])
    assert torch.equal(few.encode(babble()[None]), more.encode(babble()[None])[:, :2])


def test_a_clip_has_the_same_codes_alone_and_among_others(fitted: MelRVQ) -> None:
    batch = torch.stack([babble(1.0, seed) for seed in range(5)])

    together = fitted.encode(batch)

    assert torch.equal(together, torch.cat([fitted.encode(wave[None]) for wave in batch]))


def test_a_clip_sounds_the_same_alone_and_among_others() -> None:
    """Phases of quiet frequencies hang on rounding, so after iterations the spectra are compared."""
    plain, full = small(phase_iterations=0).fit(clips()), small().fit(clips())
    codes = plain.encode(torch.stack([babble(1.0, seed) for seed in range(5)]))

    alone = torch.cat([plain.decode(one[None]) for one in codes])
    assert torch.allclose(plain.decode(codes), alone, atol=1e-6)
    alone = torch.cat([full.decode(one[None]) for one in codes])
    assert mel_distance(full.decode(codes), alone, RATE) < 0.02


def test_codes_and_waves_are_those_of_full_precision(fitted: MelRVQ) -> None:
    wave = babble()[None]
    codes, heard = fitted.encode(wave), fitted.decode(fitted.encode(wave))

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fitted.encode(wave), codes)
        assert torch.equal(fitted.decode(codes), heard)
        assert small().fit(clips()).digest == fitted.digest


# k-means -------------------------------------------------------------------------------------------------------------


def test_nearest_is_the_smallest_distance() -> None:
    rows, centres = torch.randn(300, 5), torch.randn(20, 5)

    assert torch.equal(nearest(rows, centres), torch.cdist(rows.double(), centres.double()).argmin(1))


def test_of_equal_centres_the_first_is_nearest() -> None:
    centres = torch.tensor([[5.0], [1.0], [1.0]])

    assert nearest(torch.tensor([[0.0]]), centres).tolist() == [1]


def test_kmeans_is_lloyds_method() -> None:
    """The same iterations in plain numpy from the same first centres; no cell is empty in this example."""
    rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(5))
    first = torch.randperm(200, generator=torch.Generator().manual_seed(7))[:6]
    centres = rows[first].double().numpy()
    for _ in range(5):
        place = [int(np.square(row - centres).sum(1).argmin()) for row in rows.double().numpy()]
        assert len(set(place)) == 6
        centres = np.stack([rows.double().numpy()[np.array(place) == cell].mean(0) for cell in range(6)])

    found = kmeans(rows, 6, 5, torch.Generator().manual_seed(7))

    assert np.allclose(found.double().numpy(), centres, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_a_centre_without_rows_finds_some(seed: int) -> None:
    """Ninety rows in one place and three elsewhere: the first centres mostly coincide, yet each place gets one."""
    rows = torch.cat([torch.zeros(90, 2), torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])])

    centres = kmeans(rows, 4, 6, torch.Generator().manual_seed(seed))

    places = {(round(x), round(y)) for x, y in centres.tolist()}
    assert places == {(0, 0), (9, 0), (0, 9), (9, 9)}


# Loudness ------------------------------------------------------------------------------------------------------------


def test_codes_tell_nothing_of_loudness(fitted: MelRVQ) -> None:
    wave = babble()[None]

    assert torch.equal(fitted.encode(wave), fitted.encode(0.5 * wave))
    assert float(fitted.scaled(0.5 * wave).square().mean().sqrt()) == pytest.approx(0.1, rel=1e-5)


def test_a_quiet_clip_is_raised_eightfold_and_no_more(fitted: MelRVQ) -> None:
    quiet = 1e-3 * sine(440.0)[None]

    assert torch.allclose(fitted.scaled(quiet), 8 * quiet)


def test_silence_stays_silent() -> None:
    tokenizer = small().fit([*clips(), torch.zeros(RATE)])

    heard = tokenizer.decode(tokenizer.encode(torch.zeros(1, RATE)))

    assert float(heard.square().mean().sqrt()) < 2e-3  # -54 dB of full scale


def test_a_clipped_wave_has_codes(fitted: MelRVQ) -> None:
    codes = fitted.encode((50 * babble()[None]).clamp(-1, 1))

    assert codes.min() >= 0
    assert codes.max() < 16


# Identity ------------------------------------------------------------------------------------------------------------


def test_the_same_waves_make_the_same_tokenizer() -> None:
    first, second = small().fit(clips()), small().fit(clips())

    assert torch.equal(first.books_KVM, second.books_KVM)
    assert first.digest == second.digest
    assert first.digest != small().fit(clips()[:2]).digest
    assert first.digest != small(seed=1).fit(clips()).digest


OTHERS: dict[str, Any] = {
    **{"sample_rate": 16000, "hop": 128, "num_codebooks": 2, "num_codes": 8, "num_mels": 24, "n_fft": 1024},
    **{"level": 0.2, "max_gain": 4.0, "floor": 1e-4, "kmeans_iterations": 3, "max_fit_frames": 99},
    **{"phase_iterations": 8, "phase_oversampling": 1, "seed": 3},
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_setting_is_part_of_the_key(name: str) -> None:
    assert small(**{name: OTHERS[name]}).key != small().key


def test_the_key_says_every_setting_and_is_there_before_the_fit() -> None:
    assert {"tokenizer", *OTHERS} == set(small().settings())
    assert small().key == small().fit(clips()).key


def test_the_default_with_eight_books_is_a_file_below_a_megabyte(tmp_path: Any) -> None:
    tokenizer = MelRVQ(num_codebooks=8)
    tokenizer.fitted.fill_(True)

    tokenizer.save(tmp_path / "rvq.safetensors")

    assert (tmp_path / "rvq.safetensors").stat().st_size < 1_000_000
