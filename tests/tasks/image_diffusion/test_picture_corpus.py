# SPDX-License-Identifier: Apache-2.0
"""Public sample pictures are read as the libraries that ship them show them: scikit-learn's and Pillow's own."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from moeapps.data.archives import ArchiveError, Package, fetch_package
from moeapps.data.cache import cache_dir
from moeapps.data.images.arrays import ImageFileError
from moeapps.data.images.pictures import ENDINGS, open_picture, read_image

SAMPLES = Package(
    name="pillow",
    version="13.0.0",
    kind="sdist",
    sha256="cdcd1ba258178f7356d74170c9a81ba4eab6a5d55748bc402a5a2a6fe6be3510",
    size=47_058_631,
    licence="Pillow's test pictures, most of them under its licence MIT-CMU; some have terms of their own beside them",
    members=tuple(
        f"pillow-13.0.0/Tests/images/*.{ending}"
        for ending in ("png", "jpg", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")
    ),
)
"""700 pictures, many damaged on purpose, in a folder of their own."""


def test_photographs_of_scikit_learn_are_its_arrays() -> None:
    found = load_sample_images()
    assert len(found.images) == 2

    for name, pixels in zip(found.filenames, found.images, strict=True):
        assert np.array_equal(np.asarray(open_picture(Path(name), 3)), pixels)


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return fetch_package(SAMPLES, root=cache_dir("samples")) / "pillow-13.0.0" / "Tests" / "images"
    except ArchiveError as error:
        pytest.skip(f"Pillow's source archive cannot be fetched here: {error}")


def expected(path: Path) -> Any:
    """What Pillow itself gives, laid over white by hand: float [H, W, 3]; a word where it gives no single picture."""
    try:
        with Image.open(path) as image:
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                return "pictures"
            image.load()
            upright = ImageOps.exif_transpose(image)
            key = image.info.get("transparency")
            if upright.mode.startswith("I;16") or (upright.mode == "I" and path.suffix == ".pgm"):
                grey = np.asarray(upright).astype(float)
                grey *= 255 / (4095 if getattr(image, "tag_v2", {}).get(258) == (12,) else 65535)  # TIFF: BitsPerSample
                level = grey if key is None else np.where(np.asarray(upright) == key, 255, grey)
                return np.stack([level] * 3, -1)
            if upright.mode in ("I", "F"):
                return "black and white"
            clear = np.asarray(upright.convert("RGBA")).astype(float)
            share = clear[..., 3:] / 255 if upright.has_transparency_data else 1.0
            return share * clear[..., :3] + (1 - share) * 255
    except Exception:  # what Pillow answers damage with
        return "readable"


@pytest.mark.medium
def test_pillow_pictures_are_read_as_pillow_shows_them_or_told(folder: Path) -> None:
    outcomes: Counter[str] = Counter()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in ENDINGS:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            wanted = expected(path)
        told, found = "", None
        try:
            found = np.asarray(open_picture(path, 3)).astype(float)
        except ImageFileError as error:
            told, found = str(error), None
        if isinstance(wanted, str):
            assert found is None, (path.name, wanted)
            assert wanted in told, path.name
            outcomes[wanted] += 1
            continue
        assert found is not None, told
        assert found.shape == wanted.shape, path.name
        assert np.abs(found - wanted).max() <= 1.0, path.name
        outcomes["read"] += 1

    assert outcomes["read"] > 550
    assert min(outcomes["pictures"], outcomes["readable"]) > 30
    assert outcomes["black and white"] >= 2


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ("tiff_16bit_RGB.tiff", "tiff_16bit_RGB_target.png", 1.0),
        ("hopper_16bit_plain.pgm", "hopper_16bit.pgm", 0.0),
        ("hopper.png", "hopper.bmp", 0.0),
        *[(f"hopper_orientation_{k}.jpg", "hopper.jpg", 12.0) for k in range(2, 9)],
        *[(f"g4_orientation_{k}.tif", "g4_orientation_1.tif", 0.7) for k in range(2, 9)],
    ],
)
def test_pillow_files_of_one_scene_show_one_scene(folder: Path, one: str, other: str, apart: float) -> None:
    a, b = (np.asarray(open_picture(folder / name, 3)).astype(float) for name in (one, other))

    assert a.shape == b.shape
    assert np.abs(a - b).mean() <= apart
    assert b.std() > 10


def test_pillow_pictures_fill_a_square_of_any_size(folder: Path) -> None:
    for name in ("hopper.png", "pil_sample_cmyk.jpg", "transparent.png", "16bit.cropped.tif", "hopper.gif"):
        for size in (1, 7, 200):
            assert read_image(folder / name, size, 1).shape == (1, size, size)
