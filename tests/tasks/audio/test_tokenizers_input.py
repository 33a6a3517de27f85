# SPDX-License-Identifier: Apache-2.0
"""What tokenizers say to waves, codes, settings and files that they cannot take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizer_common import MuLaw, babble, clips, small
from torch import Tensor

from tasks.audio.nets.tokenizers import MelRVQ


@pytest.fixture(scope="module")
def fitted() -> MelRVQ:
    return small().fit(clips())


def with_value(value: float) -> Tensor:
    wave = babble()[None].clone()
    wave[0, 77] = value
    return wave


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (with_value(float("nan")), "wave holds NaN or infinity"),
        (with_value(float("-inf")), "wave holds NaN or infinity"),
        (torch.zeros(1, 0), "wave has no sample"),
        (torch.zeros(800), r"wave of shape \[800\]; wanted \[clips, samples\], mono"),
        (torch.zeros(1, 2, 800), r"wave of shape \[1, 2, 800\]"),
        (torch.zeros(1, 800, dtype=torch.int16), "wave of type torch.int16; wanted floating point"),
    ],
)
def test_a_wave_that_is_none_is_refused(fitted: MelRVQ, wave: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted.encode(wave)


def test_no_clips_have_no_codes_and_no_codes_no_clips(fitted: MelRVQ) -> None:
    codes = fitted.encode(torch.zeros(0, 800))
    assert codes.shape == (0, *fitted.encode(torch.zeros(1, 800)).shape[1:])
    assert fitted.decode(codes).shape == (0, codes.shape[2] * fitted.hop)


def test_double_precision_is_taken(fitted: MelRVQ) -> None:
    assert torch.equal(fitted.encode(babble()[None].double()), fitted.encode(babble()[None]))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 3, 4), -1), "codes from -1 to -1; allowed are 0 to 15: take the frames after a clip's end"),
        (torch.full((1, 3, 4), 16), "codes from 16 to 16"),
        (torch.zeros(1, 4, 4, dtype=torch.int64), r"codes of shape \[1, 4, 4\]; wanted \[clips, 1 to 3 codebooks"),
        (torch.zeros(1, 3, 0, dtype=torch.int64), "frames >= 1"),
        (torch.zeros(3, 4, dtype=torch.int64), r"codes of shape \[3, 4\]"),
        (torch.zeros(1, 3, 4), "codes of type torch.float32"),
    ],
)
def test_codes_that_are_none_are_refused(fitted: MelRVQ, codes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted.decode(codes)


def test_nothing_works_before_the_fit(tmp_path: Path) -> None:
    tokenizer = small()

    for call in (
        lambda: tokenizer.encode(babble()[None]),
        lambda: tokenizer.decode(torch.zeros(1, 3, 4, dtype=torch.int64)),
        lambda: tokenizer.digest,
        lambda: tokenizer.save(tmp_path / "rvq.safetensors"),
    ):
        with pytest.raises(ValueError, match=r"this MelRVQ is not fitted; call fit\(waves\) or load\(path\) first"):
            call()


def test_a_fit_says_which_wave_is_bad() -> None:
    with pytest.raises(ValueError, match="wave 1 holds NaN"):
        small().fit([babble(), with_value(float("nan"))[0]])
    with pytest.raises(ValueError, match="no wave to fit to"):
        small().fit([])


def test_a_fit_to_too_little_says_how_much_it_wants() -> None:
    with pytest.raises(ValueError, match="4 frames for 16 codes; give 4096 samples"):
        small().fit([babble()[:1000]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_codebooks": 0}, "num_codebooks=0; it must be at least 1"),
        ({"sample_rate": -8000}, "sample_rate=-8000"),
        ({"hop": 257}, "n_fft=512 with hop=257; it must be even and at least 2"),
        ({"n_fft": 513}, "n_fft=513"),
        ({"num_mels": 257}, "num_mels=257; it must be between 1 and n_fft / 2 = 256"),
        ({"floor": 0.0}, "floor=0.0; it must be above 0"),
        ({"level": float("nan")}, "level=nan"),
        ({"max_gain": -1.0}, r"max_gain=-1.0"),
        ({"kmeans_iterations": 0}, "kmeans_iterations=0"),
        ({"phase_iterations": -1}, "phase_iterations=-1"),
        ({"phase_oversampling": 3}, "phase_oversampling=3; it must be a divisor of hop=256"),
        ({"max_fit_frames": 15}, "max_fit_frames=15; it must be at least num_codes=16"),
    ],
)
def test_settings_out_of_range_are_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(fitted: MelRVQ, tmp_path: Path) -> Path:
    fitted.save(tmp_path / "rvq.safetensors")
    return tmp_path / "rvq.safetensors"


def test_a_saved_tokenizer_comes_back(fitted: MelRVQ, file: Path) -> None:
    loaded = small().load(file)

    assert loaded.digest == fitted.digest
    assert torch.equal(loaded.encode(babble()[None]), fitted.encode(babble()[None]))
    assert torch.equal(loaded.decode(loaded.encode(babble()[None])), fitted.decode(fitted.encode(babble()[None])))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer file .*nowhere"):
        small().load(tmp_path / "nowhere")


def test_a_file_of_other_settings_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match=r"of a tokenizer with hop=256 \(here 128\), num_mels=20 \(here 24\)"):
        small(hop=128, num_mels=24).load(file)
    with pytest.raises(ValueError, match=r"tokenizer=MelRVQ \(here MuLaw\)"):
        MuLaw().load(file)


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_a_cut_file_is_refused(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])

    with pytest.raises(ValueError, match="is no tokenizer file, or a damaged one"):
        small().load(file)


def test_a_changed_number_is_found(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(bytes(data))

    with pytest.raises(ValueError, match="is damaged: its tensors are not those that were saved"):
        small().load(file)


def test_a_file_of_anything_else_is_refused(file: Path, tmp_path: Path) -> None:
    save_file(load_file(file), tmp_path / "plain.safetensors")
    torch.save({"mean_M": torch.zeros(20)}, tmp_path / "pickle.pt")

    with pytest.raises(ValueError, match="of a tokenizer with floor=nothing"):
        small().load(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="is no tokenizer file"):
        small().load(tmp_path / "pickle.pt")


def test_a_refused_file_changes_nothing(fitted: MelRVQ, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(bytes(data))
    tokenizer = small().fit(clips())

    with pytest.raises(ValueError, match="damaged"):
        tokenizer.load(file)

    assert tokenizer.digest == fitted.digest


def test_a_file_that_lacks_a_tensor_is_refused(fitted: MelRVQ, file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        told = opened.metadata()
    state = load_file(file)
    del state["mean_M"]
    save_file(state, file, told)

    with pytest.raises(ValueError, match="lacks tensors of a MelRVQ"):
        small().load(file)
