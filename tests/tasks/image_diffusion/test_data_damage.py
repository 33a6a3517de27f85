# SPDX-License-Identifier: Apache-2.0
"""Files of pictures, arrays and latents with bytes changed or cut off: read, or told in one sentence by name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_common import ALL, bound, write_latent, write_shard
from PIL import Image

from moeapps.data.images.arrays import ImageFileError, read_array
from moeapps.data.images.pictures import ENDINGS, read_image
from moeapps.files import write_arrays
from tasks.image_diffusion.data.latents import LatentImages
from tasks.image_diffusion.data.own_images import OwnImages
from tasks.image_diffusion.data.readers.latent_files import read_latent, read_shard, read_statistics
from tests.fuzzing import refused

RNG = np.random.default_rng(0)


def picture(path: Path) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (12, 9)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, **({"exif": exif} if path.suffix in (".png", ".jpg", ".webp", ".tif") else {}))


def arrays(path: Path) -> None:
    write_arrays(
        path, x=RNG.integers(0, 256, (3, 8, 8)).astype(np.uint8), y=np.arange(3), names=np.array(["a", "b", "c"])
    )


def read_own(path: Path) -> Any:
    return bound(OwnImages(root=path.parent, image_size=8, channels=1, **ALL), "a").dataset("a", "train", path.parent)


def latent_arrays(path: Path) -> None:
    write_arrays(path, x=RNG.normal(size=(3, 4, 2, 2)), y=np.arange(3), names=np.array(["a", "b", "c"]))


def read_own_latents(path: Path) -> Any:
    return bound(LatentImages(root=path.parent, image_size=2, **ALL), "a").dataset("a", "train", None)


def read_whole_shard(path: Path) -> Any:
    return [read_shard(path, key) for key in ("latents", "labels")]


FORMS: dict[str, tuple[str, Any, Any]] = {
    **{ending: (f"a{ending}", picture, lambda path: read_image(path, 8, 3)) for ending in ENDINGS},
    "arrays": ("a.npz", arrays, read_own),
    "pair": ("a_x.npy", lambda path: np.save(path, np.zeros((3, 8, 8), np.uint8)), read_array),
    "latent arrays": ("a.npz", latent_arrays, read_own_latents),
    "latent": ("a.npz", lambda path: write_latent(path, torch.randn(4, 2, 2)), read_latent),
    "shard": (
        "a.safetensors",
        lambda path: write_shard(path, torch.randn(3, 4, 2, 2), torch.arange(3)),
        read_whole_shard,
    ),
    "statistics": (
        "a.pt",
        lambda path: torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, path),
        lambda path: read_statistics(path, 4),
    ),
}


def original(form: str) -> bytes:
    name, write, _ = FORMS[form]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


ORIGINALS = {form: original(form) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=int(os.environ.get("MOEAPPS_FUZZ", "60")), deadline=5000)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 10000),
)
def test_a_damaged_image_file_is_read_or_told(form: str, changes: list[tuple[int, int]], cut: int) -> None:
    name, _, read = FORMS[form]
    data = bytearray(ORIGINALS[form])
    for place, value in changes:
        data[place % len(data)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data[: max(cut % (2 * len(data)), 1)])
        told = path.name
        try:
            read(path)
        except ImageFileError as error:
            refused()
            told = str(error)
    assert Path(name).stem in told
