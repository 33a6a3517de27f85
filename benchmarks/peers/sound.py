# SPDX-License-Identifier: Apache-2.0
"""Sound files as waves, and waves as log mel spectra, beside what soundfile and torchaudio alone give."""

from __future__ import annotations

import tempfile
from pathlib import Path

import soundfile
import torch
import torchaudio

from benchmarks.peers.rows import Race
from tasks.audio.data.readers.audio_files import read_audio
from tasks.audio.nets.tokenizers import MelRVQ

FILES, SECONDS, RATE, WANTED = 8, 5, 44_100, 8_000
CLIPS = 16


def files() -> Race:
    """Stereo files of 44.1 kHz as one channel of 8 kHz."""
    folder = tempfile.TemporaryDirectory()
    paths = [Path(folder.name) / f"{k}.wav" for k in range(FILES)]
    for path in paths:
        soundfile.write(path, 0.1 * torch.randn(SECONDS * RATE, 2).clamp(-3, 3).numpy(), RATE, subtype="PCM_16")

    def theirs() -> None:
        for path in paths:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            torchaudio.functional.resample(torch.from_numpy(samples).mean(1), rate, WANTED)

    def ours(folder: object = folder) -> None:  # which keeps the files
        for path in paths:
            read_audio(path, WANTED)

    def decode() -> None:
        for path in paths:
            soundfile.read(path, dtype="float32")

    return Race(ours, theirs, f"{FILES} files of {SECONDS} s; ours looks for NaN and lies of headers too", decode)


def spectra() -> Race:
    """The features of the default tokenizer."""
    tokenizer = MelRVQ()
    rate, bands = tokenizer.sample_rate, tokenizer.bands_FM.shape[1]
    wave = 0.1 * torch.randn(CLIPS, SECONDS * rate)
    mel = torchaudio.transforms.MelSpectrogram(rate, tokenizer.n_fft, hop_length=tokenizer.hop, n_mels=bands, power=1)

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        found: torch.Tensor = mel(wave).clamp_min(tokenizer.floor).log()
        return found

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return tokenizer.log_mel(wave)

    equal = f"{CLIPS} clips of {SECONDS} s, windows of {tokenizer.n_fft}, hop {tokenizer.hop}, {bands} bands"
    window = torch.hann_window(tokenizer.n_fft)

    def transform() -> torch.Tensor:
        return torch.stft(wave, tokenizer.n_fft, tokenizer.hop, window=window, center=False, return_complex=True)

    return Race(ours, theirs, f"{equal}; ours scales the loudness too", transform)
