# SPDX-License-Identifier: Apache-2.0
"""Small audio data for tests: a few generated clips, a small tokenizer, written files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from tasks.audio.data.generated import GeneratedAudio
from tasks.audio.data.source import AudioSource
from tasks.audio.datamodule import AudioData
from tasks.audio.nets.tokenizers import MelRVQ

FEW = {"train_speech": 6, "train_music": 3, "val": 2, "test": 3}


def small_tokenizer(**options: Any) -> MelRVQ:
    settings = {"num_codebooks": 2, "num_codes": 8, "num_mels": 16, "kmeans_iterations": 2, "max_fit_frames": 256}
    return MelRVQ(**{**settings, **options})


def small_data(cache: Path, **options: Any) -> AudioData:
    """Six clips of each voice and three of each instrument; two books of eight codes."""
    given = {"source": GeneratedAudio(**FEW), "tokenizer": small_tokenizer(), "batch_size": 4, **options}
    return AudioData(cache_dir=cache, **given)


def prepare(source: AudioSource, domain: str, cache: Path) -> None:
    """Prepare one domain as a run does that trains on it."""
    source.bind({"seen": [domain]})
    source.prepare(cache)


def tone(hertz: float, seconds: float, rate: int = 8000, gain: float = 0.3) -> Tensor:
    return gain * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * rate)) / rate)


def loudest_hertz(wave: Tensor, rate: int = 8000) -> float:
    """Frequency of the largest bin of a plain Fourier transform."""
    return float(torch.fft.rfft(wave).abs().argmax()) * rate / len(wave)


def write_sound(path: Path, wave: Any, rate: int = 8000, subtype: str = "PCM_16") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.asarray(wave), rate, subtype=subtype)
    return path


def write_table(
    root: Path, rows: Sequence[str], header: str = "file,domain,kind,text", name: str = "clips.csv"
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    path = root / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def own_folder(root: Path, counts: dict[str, int], seconds: float = 0.5) -> dict[str, Tensor]:
    """Write tones, each of a pitch of its own, as domains ``a``, ``b``, ... of speech; return file -> wave."""
    waves, rows = {}, []
    for domain, count in counts.items():
        for k in range(count):
            file = f"{domain}/{k:02}.wav"
            waves[file] = tone(200 + 37 * len(waves), seconds)
            write_sound(root / file, waves[file])
            rows.append(f"{file},{domain},speech,word {k}")
    write_table(root, rows)
    return waves
