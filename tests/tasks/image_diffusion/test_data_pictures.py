# SPDX-License-Identifier: Apache-2.0
"""One picture file: whatever a camera or a program wrote, the pixels are those that people see."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from moeapps.data.images.arrays import ImageFileError
from moeapps.data.images.pictures import BACKGROUNDS, open_picture, read_image

RNG = np.random.default_rng(0)
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
SIDES = st.integers(1, 9)
ENOUGH = settings(max_examples=60, deadline=None)


def pixels(*last: int, dtype: Any = np.uint8) -> st.SearchStrategy[Any]:
    shapes = st.tuples(SIDES, SIDES).map(lambda sides: (*sides, *last))
    return shapes.flatmap(lambda shape: hnp.arrays(dtype, shape))


def through_file(image: Image.Image, ending: str, channels: int, background: str = "white", **options: Any) -> Pixels:
    """Write a picture and read it again: [H, W] or [H, W, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{ending}"
        image.save(path, **options)
        return np.asarray(open_picture(path, channels, background))


def nearest(exact: Any, below: float) -> Any:
    """Numbers rounded to 8 bits differ from the exact ones by less than ``below``."""

    def check(found: Pixels) -> bool:
        return bool((np.abs(found.astype(float) - exact) <= below).all())

    return check


LOSSLESS = st.sampled_from(["png", "bmp", "tif", "tiff", "ppm", "webp"])


@ENOUGH
@given(pixels(3), LOSSLESS)
def test_colours_come_back_from_every_lossless_form(x: Pixels, ending: str) -> None:
    options = {"lossless": True} if ending == "webp" else {}
    assert np.array_equal(through_file(Image.fromarray(x), ending, 3, **options), x)


@ENOUGH
@given(pixels(), st.sampled_from(["png", "bmp", "tif", "pgm", "gif"]), st.sampled_from([1, 3]))
def test_grey_comes_back_in_one_channel_or_three_equal_ones(x: Pixels, ending: str, channels: int) -> None:
    found = through_file(Image.fromarray(x), ending, channels)
    assert np.array_equal(found, x if channels == 1 else np.stack([x] * 3, -1))


@ENOUGH
@given(pixels(dtype=np.uint16), st.sampled_from(["png", "tif", "pgm"]))
def test_sixteen_bits_are_rounded_to_the_nearest_of_eight(x: Any, ending: str) -> None:
    found = through_file(Image.fromarray(x), ending, 1)
    assert nearest(x / 65535 * 255, 0.5 + 1e-9)(found)


def tiff_of(x: Any, bits: int, negative: bool) -> bytes:
    """A TIFF file of one strip, written by hand: what microscopes and scanners write and Pillow does not."""
    height, width = x.shape
    digits = "".join("".join(f"{value:0{bits}b}" for value in row).ljust(-(-width * bits // 8) * 8, "0") for row in x)
    body = int(digits, 2).to_bytes(len(digits) // 8, "big")
    if bits == 16:
        body = x.astype("<u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if negative else 1, 273: 8, 277: 1, 278: height}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in {**tags, 279: len(body)}.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(tags) + 1) + entries + bytes(4)


@ENOUGH
@given(pixels(dtype=np.uint16), st.sampled_from([(12, False), (16, False), (16, True)]))
def test_a_tiff_is_as_bright_as_its_bits_and_its_white_say(x: Any, form: tuple[int, bool]) -> None:
    bits, negative = form
    top = 2**bits - 1
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "a.tif").write_bytes(tiff_of(x & top, bits, negative))
        found = np.asarray(open_picture(path, 1))

    share = (x & top) / top
    assert nearest(255 * (1 - share if negative else share), 0.5 + 1e-9)(found)


def test_a_ramp_of_sixteen_bits_keeps_its_levels(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")

    assert len(np.unique(read_image(tmp_path / "a.png", 32, 1))) == 32


def as_stored(x: Pixels, orientation: int) -> Pixels:
    """Rows and columns of a file whose row 0 and column 0 are the sides that EXIF's orientation (0x0112) names."""
    first_row, first_column = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    if first_row in ("left", "right"):  # rows of the file are columns of the scene
        columns = x if first_row == "left" else x[:, ::-1]
        return np.ascontiguousarray((columns if first_column == "top" else columns[::-1]).swapaxes(0, 1))
    rows = x if first_row == "top" else x[::-1]
    return np.ascontiguousarray(rows if first_column == "left" else rows[:, ::-1])


@ENOUGH
@given(pixels(3), st.integers(1, 8), st.sampled_from(["png", "tif", "webp"]))
def test_a_picture_stands_upright_whatever_way_the_camera_was_held(x: Pixels, orientation: int, ending: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if ending == "webp" else {}
    found = through_file(Image.fromarray(as_stored(x, orientation)), ending, 3, exif=exif, **options)

    assert np.array_equal(found, x)


@ENOUGH
@given(pixels(4), st.sampled_from(list(BACKGROUNDS)), st.sampled_from(["png", "tif"]))
def test_transparency_lets_the_background_through_in_its_share(x: Pixels, background: str, ending: str) -> None:
    found = through_file(Image.fromarray(x), ending, 3, background)
    share = x[..., 3:] / 255

    assert nearest(share * x[..., :3] + (1 - share) * BACKGROUNDS[background], 1.0)(found)


@ENOUGH
@given(pixels(2), st.sampled_from(list(BACKGROUNDS)))
def test_transparent_grey_does_the_same(x: Pixels, background: str) -> None:
    found = through_file(Image.fromarray(x), "png", 1, background)
    share = x[..., 1] / 255

    assert nearest(share * x[..., 0] + (1 - share) * BACKGROUNDS[background], 1.0)(found)


@ENOUGH
@given(pixels(), hnp.arrays(np.uint8, (256, 3)), st.integers(0, 255), st.sampled_from(["png", "gif"]))
def test_a_palette_becomes_its_colours_and_its_key_the_background(
    x: Pixels, colours: Pixels, key: int, ending: str
) -> None:
    image = Image.frombytes("P", (x.shape[1], x.shape[0]), x.tobytes())
    image.putpalette(colours.tobytes())
    plain = through_file(image, "png", 3)
    keyed = through_file(image, ending, 3, "black", transparency=key)

    assert np.array_equal(plain, colours[x])
    assert np.array_equal(keyed, np.where(x[..., None] == key, 0, colours[x]))


@ENOUGH
@given(pixels(), st.integers(0, 255))
def test_a_key_of_grey_becomes_the_background(x: Pixels, key: int) -> None:
    assert np.array_equal(through_file(Image.fromarray(x), "png", 1, transparency=key), np.where(x == key, 255, x))
    wide = Image.fromarray(x.astype(np.uint16) * 257)
    assert np.array_equal(through_file(wide, "png", 1, transparency=257 * key), np.where(x == key, 255, x))


@ENOUGH
@given(pixels(4))
def test_inks_take_away_their_share_of_the_light(x: Pixels) -> None:
    image = Image.frombytes("CMYK", (x.shape[1], x.shape[0]), x.tobytes())
    found = through_file(image, "tif", 3)
    light = 255 * (1 - x[..., :3] / 255) * (1 - x[..., 3:] / 255)

    assert nearest(light, 1.0)(found)


@ENOUGH
@given(pixels().map(lambda x: x > 127), st.sampled_from(["png", "bmp", "tif"]))
def test_one_bit_is_black_and_white(x: Any, ending: str) -> None:
    assert np.array_equal(through_file(Image.fromarray(x), ending, 1), 255 * x)


def several_pages(path: Path) -> None:
    pages = [Image.new("L", (4, 4), level) for level in (0, 255)]
    pages[0].save(path.with_suffix(".tif"), save_all=True, append_images=pages[1:])


def animation(path: Path) -> None:
    frames = [Image.new("L", (4, 4), level) for level in (0, 255)]
    frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:])


def floats(path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(path.with_suffix(".tif"))


def long_integers(path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.int32)).save(path.with_suffix(".tif"))


def strip(path: Path) -> None:
    Image.new("L", (2000, 2)).save(path.with_suffix(".png"))


def huge(path: Path) -> None:
    Image.new("1", (10_000, 9_000)).save(path.with_suffix(".png"))


def another_format(path: Path) -> None:
    Image.new("L", (4, 4)).save(path, "TGA")
    path.rename(path.with_suffix(".png"))


def empty(path: Path) -> None:
    path.with_suffix(".jpg").write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (several_pages, r"a.tif holds 2 pictures \(pages or frames\); save each as a file of its own"),
        (animation, "a.gif holds 2 pictures"),
        (floats, "a.tif holds floats, whose black and white it does not state"),
        (long_integers, "a.tif holds 32-bit integers"),
        (strip, "a.png is 2000 x 2 pixels, a strip"),
        (huge, "a.png is not a readable image .*exceeds limit"),
        (another_format, "a.png is not a readable image .*cannot identify"),
        (empty, "a.jpg is not a readable image"),
    ],
)
def test_what_cannot_be_shown_is_told(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "a")
    (path,) = tmp_path.iterdir()

    with pytest.raises(ImageFileError, match=message):
        read_image(path, 8, 3)
