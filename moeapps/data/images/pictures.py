# SPDX-License-Identifier: Apache-2.0
"""One picture file as pixels, by Pillow: upright, 8 bits deep, laid over a background, cropped and scaled."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from moeapps.bounds import require_file
from moeapps.data.images.arrays import ImageFileError

ENDINGS: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
"""Endings of the files that are read, in small letters."""
FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""What may be inside, whatever the ending says: Pillow's other formats start programs or have no reader to trust."""
BACKGROUNDS: Final = {"white": 255, "grey": 128, "black": 0}
"""What shows through a transparent picture, and its level."""

_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF
_MOST_SLENDER = 100
"""Longest side over the shortest: of a longer strip the centre crop would show next to nothing."""
_ANY_PIXELS, _PIXELS_PER_BYTE = 16_000_000, 4
"""A picture may have so many pixels more for each byte of its file: one colour all over fills memory from nothing."""


def read_image(path: Path, size: int, channels: int, background: str = "white") -> NDArray[np.uint8]:
    """Read one picture file, cropped and scaled.

    Args:
        path: one of `ENDINGS`.
        size: side of the result.
        channels: 1 (grey) or 3 (colour).
        background: what shows through a transparent picture, a key of `BACKGROUNDS`.

    Returns:
        uint8 [channels, size, size].

    Raises:
        ImageFileError: not a readable picture, several pictures in one file, or numbers without a stated range.
    """
    image = centre_crop(open_picture(path, channels, background), size)
    pixels: NDArray[np.uint8] = np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)
    return pixels


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Halve by box filter while the short side is at least twice ``size``, scale it to ``size``, crop the centre.

    The ImageNet preparation of guided diffusion (docs/papers/promoe.md, file formats).

    Args:
        image: a picture.
        size: side of the result.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.size[0] - size) // 2, (image.size[1] - size) // 2
    return image.crop((left, top, left + size, top + size))


def open_picture(path: Path, channels: int, background: str = "white") -> Image.Image:
    """Read a picture at its own size, as people see it.

    The orientation that a camera wrote (EXIF) is applied; 16 bits of grey become the nearest of 8; a palette becomes
    its colours; what is transparent shows the background. Colour profiles are not applied.

    Args:
        path: one of `ENDINGS`.
        channels: 1 (grey) or 3 (colour).
        background: a key of `BACKGROUNDS`.

    Raises:
        ImageFileError: see `read_image`.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged notes beside the pixels, which are not used. A picture that would fill the memory
            # is an error here.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            size = require_file(path)
            Image.init()  # with formats named, Pillow loads no further reader by itself
            with Image.open(path, formats=FORMATS) as image:
                _check(image, path, size)
                span = _black_and_white(image)
                upright = ImageOps.exif_transpose(image)
        return _flat(upright, BACKGROUNDS[background], span, path).convert("L" if channels == 1 else "RGB")
    except ImageFileError:
        raise
    # Pillow's readers answer a damaged file with nearly any error.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageFileError(f"{path} is not a readable image ({reason}); repair or remove it") from error


def _check(image: Image.Image, path: Path, size: int) -> None:
    """Raise ImageFileError for what cannot be shown as one picture, before its pixels are read."""
    if image.size[0] * image.size[1] > _ANY_PIXELS + _PIXELS_PER_BYTE * size:
        raise ImageFileError(
            f"{path} says that its {size:,} bytes hold {image.size[0]} x {image.size[1]} pixels, which would fill "
            "memory; save it at a smaller size"
        )
    # The further pictures of a camera's MPO file are the same scene for another eye.
    count = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    if count > 1:
        raise ImageFileError(f"{path} holds {count} pictures (pages or frames); save each as a file of its own")
    short, long = sorted(image.size)
    if long > _MOST_SLENDER * short:
        raise ImageFileError(f"{path} is {image.size[0]} x {image.size[1]} pixels, a strip; crop it or remove it")


def _black_and_white(image: Image.Image) -> tuple[int, int] | None:
    """Return which numbers of more than 8 bits are black and white; None where the file does not say so."""
    if image.format == "TIFF" and image.mode in _SIXTEEN:
        tags = image.getexif()
        white = 2 ** int(np.ravel(tags.get(_BITS, 16))[0]) - 1  # 12 bits, which Pillow leaves as they are
        return (white, 0) if tags.get(_PHOTOMETRIC) == 0 else (0, white)
    # A Portable Graymap is scaled to 16 bits by Pillow.
    return (0, 65535) if image.format in ("PNG", "PPM") else None


def _flat(image: Image.Image, level: int, span: tuple[int, int] | None, path: Path) -> Image.Image:
    """Return 8 bits without transparency, L or RGB, over a background of one grey level.

    Args:
        image: as Pillow gives it.
        level: of the background, 0 to 255.
        span: black and white of more than 8 bits.
        path: for messages.
    """
    key = image.info.get("transparency")
    if span and image.mode in (*_SIXTEEN, "I"):
        values, (black, white) = np.asarray(image).astype(np.int64), span
        top = abs(white - black)
        grey = Image.fromarray(((np.abs(values - black) * 255 + top // 2) // top).astype(np.uint8))
        alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise ImageFileError(f"{path} holds {kind}, whose black and white it does not state; save it with 8 or 16 bits")
    elif image.has_transparency_data:
        seen = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        grey, alpha = seen.convert(seen.mode[:-1]), seen.getchannel("A")
    else:
        grey, alpha = image.convert("L" if image.mode in ("1", "L") else "RGB"), None
    if alpha is None:
        return grey
    behind = Image.new(grey.mode, grey.size, level if grey.mode == "L" else (level,) * 3)
    return Image.composite(grey, behind, alpha)
