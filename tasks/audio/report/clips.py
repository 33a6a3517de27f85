# SPDX-License-Identifier: Apache-2.0
"""Clips as files: WAV to hear, spectrogram to see, and a page that shows both beside the prompt.

Shape legend: n samples.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeapps.files import WholeFile, write_text
from moeapps.reporting.figures import save_figure

FLOOR_DB = -80.0
"""What silence is shown as, below the loudest cell of a spectrogram."""


MARK = '<meta name="generator" content="moeapps">'
"""In pages of ours: what they play may be removed."""


@dataclass(frozen=True)
class Heard:
    """A clip to be written.

    Attributes:
        name: of its files, without ending.
        wave: float32 [n], one channel.
        prompt: what was asked for, for people.
        kept: seconds at its start that were given, not drawn.
    """

    name: str
    wave: Tensor
    prompt: str
    kept: float = 0.0


def write_wave(path: Path, wave: Tensor, sample_rate: int) -> Path:
    """Write float32 [n] as a WAV file of 16 bits, whole or not at all; louder than 1 is turned down, never clipped.

    Raises:
        ValueError: not one channel, no sample, or samples that are not finite.
    """
    if wave.dim() != 1 or not len(wave) or not wave.isfinite().all():
        raise ValueError(f"a wave of shape {list(wave.shape)} cannot be written; give finite samples [n], at least one")
    import soundfile

    loudest = float(wave.abs().max())
    with WholeFile(path) as temporary:
        soundfile.write(temporary, (wave / max(1.0, loudest)).numpy(), sample_rate, format="WAV", subtype="PCM_16")
    return path


def decibels(wave: Tensor, sample_rate: int) -> Tensor:
    """Power spectrogram in dB below its loudest cell, float32 [257, frames]: windows of 64 ms, hops of 16 ms."""
    size = 2 * max(1, sample_rate * 32 // 1000)
    padded = torch.nn.functional.pad(wave, (0, max(0, size - len(wave))))
    window = torch.hann_window(size)
    power = torch.stft(padded, size, size // 4, window=window, return_complex=True).abs().square()
    level = 10 * power.clamp(min=1e-12).log10()
    return (level - level.max()).clamp(min=FLOOR_DB)


def spectrogram_figure(wave: Tensor, sample_rate: int, *, title: str = "", kept: float = 0.0) -> Any:
    """Draw time (s) against frequency (kHz) in dB; a line ends what was given.

    Args:
        wave: float32 [n].
        sample_rate: samples per second.
        title: above the picture.
        kept: seconds that were given.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 2.4), layout="constrained")
    axes = figure.subplots()
    seconds = max(len(wave), 1) / sample_rate
    image = axes.imshow(
        decibels(wave, sample_rate).numpy(),
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=FLOOR_DB,
        vmax=0.0,
        extent=(0.0, seconds, 0.0, sample_rate / 2000),
    )
    if kept > 0:
        axes.axvline(kept, color="white", linewidth=1.0)
    axes.set(xlabel="s", ylabel="kHz")
    axes.set_title(drawable(title), fontsize=8)
    figure.colorbar(image, ax=axes, label="dB")
    return figure


def write_spectrogram(path: Path, wave: Tensor, sample_rate: int, *, title: str = "", kept: float = 0.0) -> Path:
    """Write the spectrogram of a wave as PNG, see `spectrogram_figure`."""
    save_figure(spectrogram_figure(wave, sample_rate, title=title, kept=kept), path, dpi=100)
    return path


def drawable(text: str) -> str:
    """Text as one line of a figure: characters that its font lacks are squares, a dollar sign begins no formula."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    line = "".join(sign if ord(sign) in known else "\N{WHITE SQUARE}" for sign in " ".join(text.split()))
    return line.replace("$", r"\$")


def write_clips(folder: Path, clips: Sequence[Heard], sample_rate: int, *, title: str) -> None:
    """Write WAV, PNG and TXT of every clip, and index.html, where a browser shows and plays them all.

    Files of clips that are on an earlier page of the folder, and not written now, are removed; other files stay.

    Args:
        folder: where to.
        clips: what to write; an empty one has no WAV.
        sample_rate: samples per second.
        title: of the page.
    """
    page = folder / "index.html"
    rows: list[str] = []
    earlier, written = _clips_of(page), set[str]()
    for clip in clips:
        write_text(folder / f"{clip.name}.txt", clip.prompt + "\n")
        written.add(f"{clip.name}.txt")
        if not len(clip.wave):
            rows.append(f"<h3>{html.escape(clip.name)}</h3><p>{html.escape(clip.prompt)}</p><p>nothing was drawn</p>")
            continue
        write_wave(folder / f"{clip.name}.wav", clip.wave, sample_rate)
        shown = clip.prompt if len(clip.prompt) <= 70 else clip.prompt[:67] + "..."
        write_spectrogram(folder / f"{clip.name}.png", clip.wave, sample_rate, title=shown, kept=clip.kept)
        written |= {f"{clip.name}.wav", f"{clip.name}.png"}
        name = html.escape(clip.name, quote=True)
        rows.append(
            f'<h3>{name}</h3><p>{html.escape(clip.prompt)}</p><audio controls src="{name}.wav"></audio><br>'
            f'<img src="{name}.png" alt="spectrogram of {name}">'
        )
    head = f'<!doctype html><html lang="en"><meta charset="utf-8">{MARK}<title>{html.escape(title)}</title>'
    write_text(page, f"{head}\n<h1>{html.escape(title)}</h1>\n" + "\n".join(rows) + "\n</html>\n")
    for file in {f"{name}{ending}" for name in earlier for ending in (".wav", ".png", ".txt")} - written:
        (folder / file).unlink(missing_ok=True)


def _clips_of(page: Path) -> list[str]:
    """Names of the clips on a page that `write_clips` wrote; none on any other page."""
    text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    names = re.findall(r"^<h3>(.*?)</h3><p>", text, flags=re.MULTILINE) if MARK in text else []
    return [name for name in map(html.unescape, names) if Path(name).name == name]
