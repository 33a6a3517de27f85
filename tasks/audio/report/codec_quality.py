# SPDX-License-Identifier: Apache-2.0
"""How much of a clip its tokens keep: intelligibility, perceived quality and mel distance of clip and decoded clip.

All three need the two waves aligned in time, so they judge codecs and vocoders, not free generation. STOI and PESQ are
made for speech, and come with the extra ``audio-metrics``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torchaudio.functional import resample

from tasks.audio.nets.tokenizers import Tokenizer
from tasks.audio.nets.tokenizers.spectrum import mel_distance

_LEVEL = 0.1  # root mean square at which waves are compared
_TELEPHONE = 8000  # Hz, the rate of narrow-band PESQ


def stoi(reference_n: Tensor, heard_n: Tensor, sample_rate: int) -> float:
    """Short-time objective intelligibility, 0 to 1 (Taal et al. 2011), by pystoi.

    Returns:
        NaN where less than about 0.4 s of the reference is not silent.

    Raises:
        ValueError: pystoi is not installed.
    """
    _need("pystoi")
    import pystoi

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Not enough STFT frames")
        try:
            return float(pystoi.stoi(reference_n.numpy(), heard_n.numpy(), sample_rate))
        except RuntimeWarning:
            return math.nan


def pesq(reference_n: Tensor, heard_n: Tensor, sample_rate: int) -> float:
    """Perceived quality of telephone speech, about 1 to 4.5 (ITU-T P.862.1, narrow band), by pesq.

    Returns:
        NaN where no utterance is found, or the wave is shorter than a quarter of a second.

    Raises:
        ValueError: pesq is not installed.
    """
    _need("pesq")
    import pesq as library

    waves = [resample(wave, sample_rate, _TELEPHONE).numpy() for wave in (reference_n, heard_n)]
    try:
        return float(library.pesq(_TELEPHONE, *waves, "nb"))
    except (library.NoUtterancesError, library.BufferTooShortError):
        return math.nan


def mel(reference_n: Tensor, heard_n: Tensor, sample_rate: int) -> float:
    """Difference of log10 mel amplitudes over five windows, see `mel_distance`; 0 for equal waves."""
    return float(mel_distance(heard_n[None], reference_n[None], sample_rate))


Measure = Callable[[Tensor, Tensor, int], float]
MEASURES: dict[str, Measure] = {"stoi": stoi, "pesq": pesq, "mel": mel}
_PACKAGES = {"stoi": "pystoi", "pesq": "pesq"}


def installed_measures() -> list[str]:
    """Names of the measures whose packages are there."""
    return [name for name in MEASURES if name not in _PACKAGES or find_spec(_PACKAGES[name]) is not None]


def at_level(wave_n: Tensor) -> Tensor:
    """A wave at the root mean square 0.1; silence stays silent."""
    return wave_n * (_LEVEL / wave_n.square().mean().sqrt().clamp_min(1e-9))


def codec_quality(
    tokenizer: Tokenizer,
    waves: Sequence[Tensor],
    *,
    num_codebooks: int | None = None,
    measures: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Encode and decode clips and compare each with itself, both at one loudness.

    Args:
        tokenizer: fitted tokenizer.
        waves: clips float32 [n] that it was not fitted to.
        num_codebooks: books to decode from, in residual order; default all.
        measures: some of `MEASURES`; default those whose packages are installed.

    Returns:
        Mean of each measure over the clips that have it; ``clips`` with the number of clips; ``<measure>_clips`` where
        some clips have no value (silence, or too short).

    Raises:
        ValueError: an unknown measure, one whose package is not installed, or no clip at all.
    """
    names = list(measures) if measures is not None else installed_measures()
    if unknown := sorted(set(names) - set(MEASURES)):
        raise ValueError(f"no measure {', '.join(unknown)}; allowed: {', '.join(MEASURES)}")
    if not waves:
        raise ValueError("no clip to judge a tokenizer by; give at least one")
    found: dict[str, list[float]] = {name: [] for name in names}
    for wave_n in waves:
        heard_n = tokenizer.decode(tokenizer.encode(wave_n[None])[:, :num_codebooks])[0, : len(wave_n)]
        pair = at_level(wave_n).cpu(), at_level(heard_n).cpu()
        for name in names:
            found[name].append(MEASURES[name](*pair, tokenizer.sample_rate) if pair[0].any() else math.nan)
    report: dict[str, Any] = {"clips": len(waves)}
    for name, values in found.items():
        known = torch.tensor(values, dtype=torch.float64)
        known = known[known.isfinite()]
        report[name] = float(known.mean()) if len(known) else math.nan
        if len(known) < len(waves):
            report[f"{name}_clips"] = len(known)
    return report


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"this measure needs {package}: pip install 'moeapps[audio-metrics]'")
