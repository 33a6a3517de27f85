# SPDX-License-Identifier: Apache-2.0
"""Real digits as other people's files keep them: grey levels, paths of a pen, fonts; and pieces of photographs.

Shape legend: N digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from moeapps.data.archives import ArchiveError
from moeapps.data.images.pictures import open_picture

SIZE = 28
_INSIDE = 20  # digits fill a square of 20 pixels, as MNIST's do
_FINE = 4  # drawn so many times larger, then averaged


def read_rows(path: Path, columns: int, most: int) -> tuple[NDArray[np.int64], Tensor]:
    """Read lines of ``columns`` numbers from 0 to ``most`` and a digit, with commas between them.

    Returns:
        int64 [N, columns] and the digits, int64 [N].

    Raises:
        ArchiveError: damaged: other numbers, or lines of another length.
    """
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.int64, ndmin=2)
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{path.name} is not a readable table ({error}); it is damaged: fetch it again") from error
    if table.shape[1] != columns + 1:
        raise ArchiveError(
            f"{path.name} has {table.shape[1]} columns in place of {columns} and a digit; fetch it again"
        )
    values, digit = table[:, :-1], table[:, -1]
    if not len(table) or values.min() < 0 or values.max() > most or digit.min() < 0 or digit.max() > 9:
        raise ArchiveError(f"{path.name} holds numbers outside 0 to {most}, or digits outside 0 to 9; fetch it again")
    return values, torch.from_numpy(digit.copy())


def scanned(levels: NDArray[np.int64]) -> Tensor:
    """Enlarge digits of 8 x 8 levels from 0 to 16, int64 [N, 64], smoothly; uint8 [N, 1, 28, 28]."""
    small = torch.from_numpy(levels).float().view(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size=(_INSIDE, _INSIDE), mode="bilinear", align_corners=False)
    return (255 * F.pad(large, [(SIZE - _INSIDE) // 2] * 4)).round().to(torch.uint8)


def penned(paths: NDArray[np.int64], stroke: float) -> Tensor:
    """Draw paths of a pen: points (x, y) in turn, 0 to 100, y upwards.

    Args:
        paths: int64 [N, 2 P].
        stroke: width in pixels.

    Returns:
        uint8 [N, 1, 28, 28].
    """
    edge = (SIZE - _INSIDE) / 2
    points = paths.reshape(len(paths), -1, 2) / 100
    place = np.stack([points[..., 0], 1 - points[..., 1]], axis=-1) * _INSIDE + edge
    drawn = []
    for line in _FINE * place:
        image = Image.new("L", (SIZE * _FINE, SIZE * _FINE))
        pen, radius = ImageDraw.Draw(image), stroke * _FINE / 2
        pen.line([tuple(point) for point in line], fill=255, width=round(2 * radius))
        for x, y in line:  # round joints and ends
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
        drawn.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(drawn))[:, None]


def printed(fonts: Sequence[Path], digits: Tensor, generator: torch.Generator) -> Tensor:
    """Print digits in fonts, heights of 14 to 21 pixels, angles within 12 degrees and places all drawn at random.

    Args:
        fonts: files.
        digits: int64 [N].
        generator: of what is drawn.

    Returns:
        uint8 [N, 1, 28, 28].
    """
    large = [ImageFont.truetype(str(path), 96) for path in fonts]
    u = torch.rand(len(digits), 5, generator=generator).tolist()
    drawn = []
    for digit, (font, height, angle, right, down) in zip(digits.tolist(), u, strict=True):
        face = large[int(font * len(large))]
        x, y, far, low = face.getbbox(str(digit))
        glyph = Image.new("L", (int(far - x) + 2, int(low - y) + 2))
        ImageDraw.Draw(glyph).text((1 - x, 1 - y), str(digit), font=face, fill=255)
        scale = _FINE * (14 + 7 * height) / glyph.height
        size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
        glyph = glyph.resize(size, Image.Resampling.BILINEAR)
        glyph = glyph.rotate(24 * angle - 12, Image.Resampling.BILINEAR, expand=True)
        sheet = Image.new("L", (SIZE * _FINE, SIZE * _FINE))
        left, top = ((SIZE * _FINE - side) // 2 for side in glyph.size)
        sheet.paste(glyph, (left + round(_FINE * (4 * right - 2)), top + round(_FINE * (4 * down - 2))))
        drawn.append(np.asarray(sheet.resize((SIZE, SIZE), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(drawn))[:, None]


def pieces(photographs: Sequence[Path], count: int, generator: torch.Generator) -> Tensor:
    """Cut squares of random size and place out of photographs and scale them to 64 pixels.

    Args:
        photographs: files, each giving as many pieces.
        count: pieces of each.
        generator: of what is drawn.

    Returns:
        float32 [count * photographs, 3, 64, 64] in [0, 1]; 28 pixels of it show 28 to 84 of the photograph.

    Raises:
        ImageFileError: a damaged file.
    """
    cut = []
    for path in photographs:
        image = open_picture(path, 3)
        for size, x, y in torch.rand(count, 3, generator=generator).tolist():
            side = min(round(64 * (1 + 2 * size)), *image.size)
            left, top = round(x * (image.width - side)), round(y * (image.height - side))
            piece = image.resize((64, 64), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
            cut.append(np.asarray(piece))
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float() / 255
