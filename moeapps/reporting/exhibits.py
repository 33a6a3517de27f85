# SPDX-License-Identifier: Apache-2.0
"""What a gallery of a report page can hold, as plain values; the page knows how each is shown.

A task's ``report/gallery.py`` makes them from the files of a run in a function ``gallery(folder) -> list[Room]``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeapps.bounds import require_file

MOST_BYTES = 8_000_000
"""Largest picture or sound that is read: what runs write of themselves is far smaller."""


@dataclass(frozen=True)
class Picture:
    """An image.

    Args:
        title: heading.
        png: the file's bytes, see `picture_of`.
        text: what is to be seen, for those who do not see it.
        caption: below it.
        pixelated: enlarge without smoothing: drawn digits and other small images.
    """

    title: str
    png: bytes
    text: str
    caption: str = ""
    pixelated: bool = False


@dataclass(frozen=True)
class Sound:
    """A clip to play.

    Args:
        title: heading.
        wav: the file's bytes, see `sound_of`.
        caption: what was asked for.
        spectrogram: its picture as PNG; None for none.
    """

    title: str
    wav: bytes
    caption: str = ""
    spectrogram: bytes | None = None


@dataclass(frozen=True)
class Colouring:
    """One way to colour points.

    Args:
        name: such as ``truth``.
        label: int [N], -1 for none.
        names: of the labels.
        colours: ``#rrggbb`` of each label; empty for the palette.
    """

    name: str
    label: npt.NDArray[np.integer]
    names: Sequence[str]
    colours: Sequence[str] = ()


@dataclass(frozen=True)
class Cloud:
    """Points to turn.

    Args:
        title: heading.
        position: float [N, 3].
        colourings: ways to colour them, the first one shown first.
        caption: below it.
    """

    title: str
    position: npt.NDArray[np.floating]
    colourings: Sequence[Colouring]
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    """A drawing by plotly.

    Args:
        title: heading.
        traces: plotly's ``data``; text in it must have gone through `moeapps.reporting.plots.words`.
        layout: plotly's ``layout``; colours and fonts are the page's.
        text: what is to be seen, for those who do not see it.
        caption: below it.
        height: in pixels.
    """

    title: str
    traces: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    text: str
    caption: str = ""
    height: int = 320


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers.

    Args:
        title: heading.
        head: of the columns.
        rows: cells; a number is shown as one.
        caption: below it.
        shaded: shade numbers from the lowest to the highest of the table.
        marked: rows to stand out.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    caption: str = ""
    shaded: bool = False
    marked: frozenset[int] = frozenset()


Exhibit = Picture | Sound | Cloud | Plot | Table


@dataclass(frozen=True)
class Room:
    """A part of a gallery.

    Args:
        title: heading.
        text: a sentence or two on what is shown.
        exhibits: in this order.
        small: many small ones side by side.
    """

    title: str
    text: str
    exhibits: Sequence[Exhibit] = field(default=())
    small: bool = False


def picture_of(source: Path | npt.NDArray[np.uint8], widest: int = 900, colours: int = 0) -> bytes:
    """Return an image as a PNG of its pixels and nothing else.

    Args:
        source: file of an image, or pixels uint8 [H, W, 3].
        widest: pixels across at most.
        colours: at most so many colours, 0 for all; a spectrogram of few is a third of its size.

    Raises:
        ValueError: not an image, or one too large.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(source, Path):
            if require_file(source) > MOST_BYTES:
                raise ValueError(f"{source} has more than {MOST_BYTES:,} bytes; a run writes smaller pictures")
            with Image.open(source, formats=("PNG",)) as opened:
                if opened.width * opened.height > 40_000_000:
                    raise ValueError(f"{source} has {opened.width} x {opened.height} pixels; a run writes smaller ones")
                image = opened.convert("RGB")
        else:
            image = Image.fromarray(source).convert("RGB")
    except (UnidentifiedImageError, SyntaxError, OSError) as error:
        raise ValueError(f"{source} is not a picture ({error})") from error
    if image.width > widest:
        image = image.resize((widest, max(1, round(image.height * widest / image.width))), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    (image.quantize(colours) if colours else image).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def sound_of(file: Path, most: int = 600_000) -> bytes:
    """Return the bytes of a WAV file.

    Args:
        file: to read.
        most: bytes at most.

    Raises:
        ValueError: not a WAV file, or a longer one.
    """
    if require_file(file) > most:
        raise ValueError(f"{file} has more than {most:,} bytes; a page plays short clips")
    content = file.read_bytes()
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError(f"{file} is not a WAV file")
    return content


def arrays_of(file: Path, *names: str) -> list[npt.NDArray[Any]]:
    """Return arrays of an npz file that a run has written for its page.

    Args:
        file: to read.
        names: of the arrays.

    Raises:
        ValueError: no such file of arrays, or one that lacks some.
    """
    from moeapps.bounds import check_npz

    check_npz(file)
    try:
        with np.load(file, allow_pickle=False) as held:
            return [held[name] for name in names]
    except (KeyError, EOFError) as error:
        raise ValueError(f"{file} has not the arrays {', '.join(names)} ({error})") from error
