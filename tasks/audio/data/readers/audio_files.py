# SPDX-License-Identifier: Apache-2.0
"""Audio files of any rate and number of channels, read by libsndfile: WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from moeapps.data.numbers import real_numbers

ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au")
SILENT = 1e-3
"""RMS below which a clip counts as silent: -60 dB of full scale."""
_CLIPPED_SHARE = 0.01
_RATES = (1000, 400_000)
_ANY_SAMPLES, _SAMPLES_PER_BYTE = 20_000_000, 100
"""A file may give so many samples more for each of its bytes; speech at 6 kbit/s gives 64."""
_BLOCK = 1 << 20


class AudioFileError(ValueError):
    """A file of sounds, or the table that lists such files, is not usable; the text says why."""


def read_audio(path: Path, sample_rate: int) -> Tensor:
    """Read a file as one channel at a sample rate.

    Channels are averaged. Samples beyond full scale, which floating-point files may hold, are cut to -1 and 1.

    Args:
        path: the file.
        sample_rate: samples per second of the result.

    Returns:
        float32 [n], n >= 1.

    Raises:
        AudioFileError: no such file, one that libsndfile cannot read, no sample, NaN or infinity among them, or a
            header that promises more than the file can hold.
    """
    if not path.is_file():
        raise AudioFileError(f"no audio file {path}; correct its name or leave it out")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            _check_size(path, file.frames, rate, sample_rate)
            # In blocks: a header may promise a thousand channels that are not there.
            blocks = list(_averaged(file, path))
        samples = np.concatenate([np.empty(0, np.float32), *blocks])
    except (soundfile.LibsndfileError, OSError, RuntimeError, OverflowError) as error:
        raise AudioFileError(
            f"{path} is not a readable audio file ({error}); readable are {', '.join(ENDINGS)}"
        ) from error
    if not len(samples):
        raise AudioFileError(f"{path} holds no sample; leave it out")
    return resample(torch.from_numpy(samples), rate, sample_rate).clamp(-1, 1)


def wave_of(values: Any) -> Tensor:
    """Return an array or tensor of samples as a wave float32, of the shape that it has.

    Raises:
        AudioFileError: integers, whose full scale is not known, or samples beyond -1 and 1, which are of another scale.
    """
    try:
        found = real_numbers(values, "a clip")
    except ValueError as error:
        raise AudioFileError(str(error)) from error
    if found.dtype.kind != "f" or (np.abs(found) > 1).any():
        given = f"samples of {found.dtype} up to {np.abs(found.astype(np.float64)).max(initial=0):.4g}"
        raise AudioFileError(f"a clip of {given}; give floats from -1 to 1 (16-bit samples: divide by 32768)")
    return torch.from_numpy(found.astype(np.float32))


def _check_size(path: Path, frames: int, rate: int, wanted: int) -> None:
    """Refuse what would fill memory, before it is read."""
    if not _RATES[0] <= rate <= _RATES[1]:
        raise AudioFileError(f"{path} has {rate:,} samples per second; {_RATES[0]:,} to {_RATES[1]:,} are read")
    size = path.stat().st_size
    if max(frames, frames * wanted // rate) > _ANY_SAMPLES + _SAMPLES_PER_BYTE * size:
        raise AudioFileError(
            f"{path} says that its {size:,} bytes hold {frames / rate:,.0f} seconds; cut it, or export it again"
        )


def _averaged(file: soundfile.SoundFile, path: Path) -> Iterator[np.ndarray]:
    """Yield the blocks of a file, its channels averaged: float32 [n]."""
    while len(samples := file.read(max(1, _BLOCK // file.channels), dtype="float32", always_2d=True)):
        if not np.isfinite(samples).all():
            raise AudioFileError(f"{path} holds NaN or infinity; export it again or leave it out")
        yield samples.mean(1)


def resample(wave: Tensor, rate: int, wanted: int) -> Tensor:
    """Change the sample rate of a wave float32 [n] -> [ceil(n * wanted / rate)], without aliases.

    By polyphase filtering, whose filter stays small for ratios such as 44101 : 8000, too.

    Raises:
        ValueError: a rate below 1.
    """
    if rate < 1 or wanted < 1:
        raise ValueError(f"sample rates {rate} and {wanted}; both must be 1 or more")
    if rate == wanted:
        return wave
    common = gcd(rate, wanted)
    from scipy.signal import resample_poly  # a second, and files of the wanted rate need none of it

    changed = resample_poly(wave.double().numpy(), wanted // common, rate // common)
    return torch.from_numpy(changed.astype(np.float32))


def write_audio(path: Path, wave: Tensor, sample_rate: int) -> None:
    """Write a wave float [n] within -1 and 1 as 16 bits; the ending says the format.

    Raises:
        AudioFileError: another shape, no sample, or numbers that are not finite.
    """
    if wave.ndim != 1 or not len(wave) or not wave.isfinite().all():
        raise AudioFileError(f"a wave of shape {list(wave.shape)} cannot be written to {path.name}; give finite [n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave.detach().cpu().float().clamp(-1, 1).numpy(), sample_rate, subtype="PCM_16")


def remark(wave: Tensor) -> str | None:
    """Say what is odd about a wave [n]: ``silent`` (RMS below -60 dBFS) or ``clipped`` (over 1% at full scale)."""
    if float(wave.square().mean().sqrt()) < SILENT:
        return "silent"
    return "clipped" if float((wave.abs() >= 0.999).float().mean()) > _CLIPPED_SHARE else None


def cut_at_pauses(wave: Tensor, sample_rate: int, seconds: float) -> list[Tensor]:
    """Cut a long wave [n] into pieces of at most ``seconds``, each at the quietest place of its second half.

    Raises:
        ValueError: pieces shorter than a tenth of a second.
    """
    if seconds < 0.1:
        raise ValueError(f"pieces of {seconds} seconds; use 0.1 or more")
    most, window = round(seconds * sample_rate), max(1, sample_rate // 20)
    pieces = []
    while len(wave) > most:
        energy = wave[most // 2 : most].square().unfold(0, window, max(1, window // 2)).mean(1)
        place = most // 2 + int(energy.argmin()) * max(1, window // 2) + window // 2
        pieces.append(wave[:place])
        wave = wave[place:]
    return [*pieces, wave]
