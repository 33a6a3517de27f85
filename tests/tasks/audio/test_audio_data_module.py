# SPDX-License-Identifier: Apache-2.0
"""The data module: codes are those of its tokenizer, caches are checked, roles and labels are kept apart."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audio_data_common import FEW, small_data, small_tokenizer

from moeapps.data.cache import build_once
from moeapps.files import write_arrays
from tasks.audio.data.batch import NO_CODE
from tasks.audio.data.generated import GeneratedAudio
from tasks.audio.data.prompt import UNKNOWN
from tasks.audio.datamodule import AudioData
from tasks.audio.nets.tokenizers import MelRVQ


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which everything is made."""
    cache = tmp_path_factory.mktemp("cache")
    small_data(cache).prepare_data()
    return cache


def test_codes_are_those_of_the_tokenizer_and_fitted_to_seen_training_clips(kept: Path) -> None:
    data = small_data(kept, max_frames=1000)
    alone = small_tokenizer()
    alone.fit([clip.wave for name in data.roles["seen"] for clip in data.clips(name, "train")])

    assert data.tokenizer.digest == alone.digest
    for domain in data.domain_names:
        for split in ("train", "val", "test"):
            batch = data.codes(domain, split)  # type: ignore[arg-type]
            clips = data.clips(domain, split)  # type: ignore[arg-type]
            assert len(batch) == len(clips)
            for codes, clip in zip(batch.codes, clips, strict=True):
                expected = alone.encode(clip.wave[None])[0]
                assert torch.equal(codes[:, : expected.shape[1]], expected)
                assert (codes[:, expected.shape[1] :] == NO_CODE).all()
            assert batch.ends.all()
            assert set(batch.domain.tolist()) == {data.domain_names.index(domain)}


def test_facts_are_known_before_anything_is_made(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    facts = data.facts

    assert not list(tmp_path.rglob("*.npz"))
    assert (facts["num_codebooks"], facts["num_codes"]) == (2, 8)
    assert (facts["sample_rate"], facts["frame_rate"]) == (8000, 31.25)
    assert facts["num_symbols"] == 3 + len(facts["labels"]) + 256
    assert facts["kinds"] == {
        name: "speech" if name.endswith("_voice") else "music"
        for name in ("low_voice", "high_voice", "organ", "pluck", "soft_voice", "reed", "child_voice", "bell")
    }
    assert facts["domains"]["validation"] == ["soft_voice", "reed"]


def test_the_tokenizers_hash_changes_with_settings_and_clips(tmp_path: Path) -> None:
    def key(**options: Any) -> str:
        return str(small_data(tmp_path, **options).facts["tokenizer"])

    keys = [
        key(),
        key(tokenizer=small_tokenizer(num_codes=9)),
        key(source=GeneratedAudio(**FEW, seed=1)),
        key(seen=["low_voice", "organ"]),
    ]
    assert len({*keys}) == 4
    assert key(batch_size=9, unseen=["bell"]) == keys[0]
    assert key(seen=["organ"], tokenizer_domains=["low_voice", "organ"]) == keys[3]


def test_labels_no_seen_domain_has_are_the_unknown_one(kept: Path) -> None:
    data = small_data(kept, prompt_symbols=80)
    prompt = data.codes("bell", "test").prompt[0]
    symbols = [int(symbol) for symbol in prompt if symbol]
    clip = data.clips("bell", "test")[0]

    known = [data.vocabulary.encode(clip.prompt)[k] for k in (0, 2, 3)]
    assert symbols[:4] == [known[0], UNKNOWN, known[1], known[2]]
    assert data.vocabulary.decode(symbols) == str(clip.prompt).replace("timbre=bell", "?=?")
    for name in data.roles["seen"]:
        assert not (data.codes(name, "test").prompt == UNKNOWN).any()


def test_a_second_run_reads_the_codes_and_fits_nothing(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("made anew")

    monkeypatch.setattr(MelRVQ, "_fit", refuse)
    monkeypatch.setattr(MelRVQ, "_encode", refuse)
    monkeypatch.setattr(GeneratedAudio, "render", refuse)
    data = small_data(kept)
    data.prepare_data()

    assert len(data.codes("organ", "train")) == 3
    assert len(data.clips("organ", "train")) == 3


def test_an_epoch_is_the_same_for_a_seed_and_another_for_the_next(kept: Path) -> None:
    def codes(seed: int, epoch: int) -> list[Any]:
        data = small_data(kept, seed=seed, max_frames=20, mixing="balanced")
        loader: Any = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        torch.rand(7)
        return [batch.codes.tolist() for batch in loader]

    assert codes(0, 1) == codes(0, 1)
    assert codes(0, 1) != codes(0, 2)
    assert codes(0, 1) != codes(1, 1)


def test_the_loaders_give_whole_batches_of_all_seen_domains(kept: Path) -> None:
    data = small_data(kept, batch_size=8, mixing="balanced", max_frames=16)
    batches = list(data.train_dataloader())

    assert len(batches) == 18 // 8
    for batch in batches:
        assert batch.domain.bincount(minlength=4).tolist() == [2, 2, 2, 2]
        assert batch.codes.shape == (8, 2, 16)
        assert batch.prompt.shape == (8, 48)
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [3] * 8  # type: ignore[arg-type]
    single = data.example_batch(2)
    assert len(single) == 2


def test_a_share_of_the_music_leaves_speech_and_evaluation_as_they_are(kept: Path) -> None:
    whole, some = small_data(kept), small_data(kept, music_share=0.34)

    for domain, split in (("low_voice", "train"), ("organ", "test"), ("bell", "train")):
        assert torch.equal(whole.codes(domain, split).codes, some.codes(domain, split).codes)  # type: ignore[arg-type]
    assert (len(whole.codes("organ", "train")), len(some.codes("organ", "train"))) == (3, 1)
    assert whole.facts == some.facts


def copied(kept: Path, tmp_path: Path) -> Path:
    shutil.copytree(kept, tmp_path / "cache")
    return tmp_path / "cache"


def test_codes_of_another_tokenizer_are_refused(kept: Path, tmp_path: Path) -> None:
    cache = copied(kept, tmp_path)
    path = next((cache / "audio").glob("organ-codes-*.npz"))
    with np.load(path) as file:
        arrays = {**dict(file), "digest": "0123456789ab"}
    path.unlink()
    build_once(path, lambda path: write_arrays(path, **arrays) and None)

    with pytest.raises(ValueError, match=r"organ-codes-.* holds codes of another tokenizer \(0123456789ab, here"):
        small_data(cache).prepare_data()


@pytest.mark.parametrize("pattern", ["organ-codes-*.npz", "tokenizer-*.safetensors", "organ-????????????.npz"])
def test_damaged_files_of_the_cache_are_made_again(
    kept: Path, tmp_path: Path, pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = copied(kept, tmp_path)
    path = next((cache / "audio").glob(pattern))
    before = small_data(cache).codes("organ", "train").codes
    content = bytearray(path.read_bytes())
    for damage in (content[:100], content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]):
        path.write_bytes(damage)
        data = small_data(cache)
        data.prepare_data()
        assert torch.equal(data.codes("organ", "train").codes, before)
        assert data.tokenizer.digest == small_data(kept).tokenizer.digest
        if "codes" in pattern or "tokenizer" in pattern:  # clips are read where codes are missing
            assert f"{path} is damaged, or was not finished: it is made again" in caplog.messages
        assert len(data.clips("organ", "train")) == 3


def test_a_checkpoint_of_other_codes_or_labels_is_refused(kept: Path, tmp_path: Path) -> None:
    state = small_data(kept).state_dict()
    small_data(kept, unseen=["bell"], batch_size=3).load_state_dict(state)

    with pytest.raises(ValueError, match=r"trained on codes of tokenizer \w+, this data has codes of \w+; give"):
        small_data(tmp_path, tokenizer=small_tokenizer(num_codes=9)).load_state_dict(state)
    fewer = {"seen": ["low_voice", "organ"], "tokenizer_domains": ["low_voice", "high_voice", "organ", "pluck"]}
    with pytest.raises(ValueError, match="knows the labels kind=speech, kind=music, voice=low, voice=high"):
        small_data(kept, **fewer).load_state_dict(state)
    moved = {**state, "codes": {**state["codes"], "tokenizer": "of a folder since moved"}}
    small_data(kept).load_state_dict(moved)  # equal tensors are enough
    small_data(kept).load_state_dict({key: value for key, value in state.items() if key != "codes"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": MelRVQ(sample_rate=16000)}, "takes 16000 samples per second, the clips have 8000"),
        ({"seen": ["drum"]}, "GeneratedAudio has no domain 'drum'"),
        ({"tokenizer_domains": ["drum"]}, "GeneratedAudio has no domain 'drum'"),
        ({"tokenizer_domains": ["reed"]}, r"tokenizer_domains=\['reed'\]; name at least one, and none that is held"),
        ({"tokenizer_domains": []}, r"tokenizer_domains=\[\]; name at least one"),
        ({"max_frames": 0}, "max_frames=0 is not allowed"),
        ({"prompt_symbols": 0}, "prompt_symbols=0 is not allowed"),
        ({"label_dropout": 1.0}, "label_dropout=1.0, music_share=1.0; allowed are"),
        ({"music_share": 0.0}, "music_share=0.0; allowed are"),
        ({"unseen": ["organ"]}, "domain 'organ' is given as seen and as unseen"),
    ],
)
def test_what_is_not_allowed_is_told(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AudioData(cache_dir=tmp_path, **options)


def test_the_text_that_does_not_fit_is_cut_and_labels_stay(kept: Path) -> None:
    data = small_data(kept, prompt_symbols=4)
    first = data.codes("low_voice", "test").prompt
    prompts = [data.vocabulary.encode(clip.prompt)[:4] for clip in data.clips("low_voice", "test")]
    assert first.tolist() == prompts
