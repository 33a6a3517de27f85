# SPDX-License-Identifier: Apache-2.0
"""The vocoder of MelRVQ's tokens and the adapter of a local DAC."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizer_common import babble, clips, small
from torch import Tensor

from tasks.audio.nets.tokenizers.dac import LocalDAC
from tasks.audio.nets.tokenizers.mel_rvq import MelRVQ
from tasks.audio.nets.tokenizers.spectrum import inverse_stft
from tasks.audio.nets.tokenizers.vocoder import VocodedRVQ


def tiny(rvq: MelRVQ | None = None, **settings: Any) -> VocodedRVQ:
    return VocodedRVQ(rvq or small(), **{"dim": 16, "depth": 1, "steps": 3, "batch_size": 2, "frames": 8, **settings})


def test_the_tokens_stay_those_of_the_rvq() -> None:
    rvq = small().fit(clips())
    books = rvq.books_KVM.clone()

    vocoder = tiny(rvq).fit([babble(1.0, 7)])

    assert torch.equal(rvq.books_KVM, books)
    assert torch.equal(vocoder.encode(babble()[None]), rvq.encode(babble()[None]))
    for name in ("sample_rate", "hop", "frame_rate", "num_codebooks", "num_codes"):
        assert getattr(vocoder, name) == getattr(rvq, name)


def test_a_fit_fits_the_rvq_where_nobody_did() -> None:
    vocoder = tiny().fit(clips())

    assert vocoder.rvq.digest == small().fit(clips()).digest


@pytest.mark.parametrize("frames", [1, 2, 13])
@pytest.mark.parametrize("books", [1, 3])
def test_a_frame_is_heard_as_a_hop(frames: int, books: int) -> None:
    vocoder = tiny(rvq := small().fit(clips())).fit(clips())
    codes = torch.randint(0, 16, (2, books, frames), generator=torch.Generator().manual_seed(0))

    heard = vocoder.decode(codes)

    assert heard.shape == (2, frames * rvq.hop)
    assert heard.isfinite().all()


def test_before_training_the_magnitudes_are_those_of_the_mel_inverse() -> None:
    """With the gain at zero and the phase head told to say 0, the wave is the inverse transform of the magnitudes."""
    vocoder = tiny(small().fit(clips()))
    vocoder.fitted.fill_(True)
    with torch.no_grad():
        vocoder.net.phase.weight.zero_()
        vocoder.net.phase.bias.copy_(torch.cat([torch.ones(257), torch.zeros(257)]))
    codes = vocoder.encode(babble()[None])

    expected = inverse_stft(vocoder.rvq.magnitude_of(vocoder.rvq.dequantised(codes)).to(torch.complex64), 512, 128)

    assert torch.allclose(vocoder.decode(codes), expected, atol=1e-5)


def test_training_comes_closer_and_reaches_every_weight() -> None:
    vocoder = tiny(small().fit(clips()), steps=40, dim=32, rate=3e-3)
    before = {name: value.clone() for name, value in vocoder.net.named_parameters()}

    losses = vocoder.training_losses(clips())

    assert len(losses) == 40
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert not [name for name, value in vocoder.net.named_parameters() if torch.equal(value, before[name])]


def test_the_same_clips_make_the_same_vocoder_whatever_the_random_state() -> None:
    torch.manual_seed(1)
    first = tiny().fit(clips())
    torch.manual_seed(2)
    second = tiny().fit(clips())

    assert first.digest == second.digest
    assert first.digest != tiny(seed=5).fit(clips()).digest


def test_making_one_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)

    tiny().fit(clips())

    assert torch.equal(torch.rand(1), expected)


def test_a_vocoder_is_saved_with_its_rvq(tmp_path: Path) -> None:
    vocoder = tiny().fit(clips())
    vocoder.save(tmp_path / "vocoder.safetensors")

    loaded = tiny().load(tmp_path / "vocoder.safetensors")

    codes = vocoder.encode(babble()[None])
    assert torch.equal(loaded.encode(babble()[None]), codes)
    assert torch.equal(loaded.decode(codes), vocoder.decode(codes))
    with pytest.raises(ValueError, match="of a tokenizer with rvq="):
        tiny(small(seed=3)).load(tmp_path / "vocoder.safetensors")
    with pytest.raises(ValueError, match="VocodedRVQ: dim=0; it must be above 0"):
        tiny(dim=0)


# A local DAC ---------------------------------------------------------------------------------------------------------

FAKE = '''
"""Stands for transformers: frames are means of four samples on 9 steps; the second book says what is left over."""
import json, pathlib, types
import torch


class DacModel(torch.nn.Module):
    @classmethod
    def from_pretrained(cls, path, local_files_only, use_safetensors):
        assert local_files_only and use_safetensors
        model = cls()
        model.config = types.SimpleNamespace(**json.loads((pathlib.Path(path) / "config.json").read_text()))
        model.weight = torch.nn.Parameter(torch.tensor(getattr(model.config, "step", 4.0)))
        return model

    def encode(self, wave):
        assert wave.shape[1] == 1 and wave.shape[2] % 4 == 0
        mean = wave[:, 0].unflatten(1, (-1, 4)).mean(2)
        first = (mean * self.weight).round()
        rest = ((mean - first / self.weight) * 32).round()
        return types.SimpleNamespace(audio_codes=(torch.stack([first, rest], 1) + 4).long())

    def decode(self, *, audio_codes):
        parts = (audio_codes - 4).unbind(1)
        mean = sum(part / step for part, step in zip(parts, (4.0, 32.0)))
        return types.SimpleNamespace(audio_values=mean.repeat_interleave(4, 1)[:, :-1])
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / "site" / "transformers"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    sizes = {"sampling_rate": 16000, "hop_length": 4, "n_codebooks": 2, "codebook_size": 9}
    folder = tmp_path / "dac_16khz"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sizes))
    yield folder
    sys.modules.pop("transformers", None)


def steps() -> Tensor:
    return torch.tensor([[0.5, 0.5, 0.5, 0.5, -0.28, -0.28, -0.28, -0.28, 0.0, 0.0]])


def test_a_local_dac_is_a_tokenizer(folder: Path) -> None:
    dac = LocalDAC(folder)

    assert (dac.sample_rate, dac.hop, dac.frame_rate, dac.num_codebooks, dac.num_codes) == (16000, 4, 4000, 2, 9)
    codes = dac.encode(steps())
    assert codes.tolist() == [[[6, 3, 4], [4, 3, 4]]]
    # 12 samples as three frames promise, although the codec gave one sample less.
    assert dac.decode(codes).tolist() == [[0.5] * 4 + [-0.28125] * 4 + [0.0] * 4]
    assert dac.decode(codes[:, :1])[0, 4] == -0.25


def test_a_local_dac_may_use_its_first_books(folder: Path) -> None:
    first = LocalDAC(folder, num_codebooks=1)

    assert torch.equal(first.encode(steps()), LocalDAC(folder).encode(steps())[:, :1])
    assert first.key != LocalDAC(folder).key
    with pytest.raises(ValueError, match=r"num_codebooks=3; the codec in .* has 1 to 2 books"):
        LocalDAC(folder, num_codebooks=3)


def test_another_dac_in_a_folder_of_the_same_name_is_another_tokenizer(folder: Path) -> None:
    before = LocalDAC(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "step": 2.0}))

    assert LocalDAC(folder).key != before.key


def test_a_local_dac_is_not_trained(folder: Path) -> None:
    dac = LocalDAC(folder)
    before = dac.digest

    assert dac.fit([babble()]).digest == before
    assert not [value for value in dac.parameters() if value.requires_grad]
    assert not dac.codec.training


def test_a_folder_that_holds_no_dac_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json; give the local folder of a DAC"):
        LocalDAC(tmp_path)


def test_a_dac_without_transformers_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.audio.nets.tokenizers.dac.find_spec", lambda name: None)

    with pytest.raises(ValueError, match=r"pip install 'moeapps\[dac\]'"):
        LocalDAC(folder)
