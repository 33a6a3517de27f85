# SPDX-License-Identifier: Apache-2.0
"""Pictures of a user: what is written is read, and a damaged file is told by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_common import ALL, bound
from PIL import Image

from moeapps.data.images.arrays import ImageFileError
from moeapps.data.images.pictures import centre_crop
from moeapps.files import write_arrays
from tasks.image_diffusion.data.own_images import OwnImages
from tasks.image_diffusion.datamodule import ImageData

RNG = np.random.default_rng(0)


def picture_folder(root: Path, domain: str, classes: dict[str, int], size: int = 8) -> dict[str, Any]:
    """Write PNG files and return their pixels, class by class."""
    written = {}
    for name, count in classes.items():
        written[name] = RNG.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
        (root / domain / name).mkdir(parents=True)
        for k, pixels in enumerate(written[name]):
            Image.fromarray(pixels).save(root / domain / name / f"{k:02}.png")
    return written


def test_pictures_that_are_written_are_read(tmp_path: Path) -> None:
    written = picture_folder(tmp_path, "a", {"cat": 3, "dog": 2})
    data = bound(OwnImages(root=tmp_path, image_size=8, mirror=0, **ALL), "a").dataset("a", "train", tmp_path / "c")

    assert data.label.tolist() == [0, 0, 0, 1, 1]
    expected = np.concatenate([written["cat"], written["dog"]]).transpose(0, 3, 1, 2)
    assert np.array_equal(data.pixels.numpy(), expected)


def test_a_changed_picture_is_read_anew(tmp_path: Path) -> None:
    picture_folder(tmp_path, "a", {"cat": 2})
    source = OwnImages(root=tmp_path, image_size=8, **ALL)
    bound(source, "a").dataset("a", "train", tmp_path / "c")
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(tmp_path / "a" / "cat" / "00.png")

    again = bound(OwnImages(root=tmp_path, image_size=8, **ALL), "a").dataset("a", "train", tmp_path / "c")
    assert (again.pixels[0] == 9).all()


def test_arrays_in_one_npz_or_two_npy_files_are_read_alike(tmp_path: Path) -> None:
    x, y = RNG.integers(0, 256, (6, 8, 8)).astype(np.uint8), np.array([0, 1, 2, 0, 1, 2])
    write_arrays(tmp_path / "a.npz", x=x, y=y, names=np.array(["p", "q", "r"]))
    np.save(tmp_path / "b_x.npy", x)
    np.save(tmp_path / "b_y.npy", y)
    source = bound(OwnImages(root=tmp_path, image_size=8, channels=1, **ALL), "a", "b")

    assert source.class_names == ["p", "q", "r", "b/0", "b/1", "b/2"]
    assert source.superclass == [0, 0, 0, 1, 1, 1]
    a, b = (source.dataset(name, "train", None) for name in "ab")
    assert torch.equal(a.pixels, torch.from_numpy(x)[:, None])
    assert torch.equal(a.pixels, b.pixels)
    assert b.label.tolist() == [label + 3 for label in a.label.tolist()]


def test_classes_of_one_name_are_one_class(tmp_path: Path) -> None:
    picture_folder(tmp_path, "photo", {"cat": 2, "dog": 2})
    picture_folder(tmp_path, "sketch", {"cat": 2, "emu": 2})
    data = ImageData(
        source=OwnImages(root=tmp_path, image_size=8, **ALL),
        seen=["photo"],
        validation=[],
        unseen=["sketch"],
        cache_dir=tmp_path / "c",
    )

    assert data.facts["class_names"] == ["cat", "dog", "emu"]
    assert data.facts["superclass"] == [0, 0, 1]
    assert data.images("sketch", "train").label.tolist() == [0, 0, 2, 2]
    assert data.images("sketch", "train").domain.tolist() == [1] * 4


def test_grey_and_colour_follow_channels(tmp_path: Path) -> None:
    picture_folder(tmp_path, "a", {"cat": 2})
    grey = bound(OwnImages(root=tmp_path, image_size=8, channels=1, **ALL), "a").dataset("a", "train", tmp_path / "c")

    assert grey.pixels.shape == (2, 1, 8, 8)


def test_centre_crop_halves_by_means_and_cuts_the_middle() -> None:
    tiles = np.kron(RNG.integers(0, 256, (4, 4)), np.ones((2, 2))).astype(np.uint8)  # 8 x 8 of 2 x 2 blocks
    wide = np.concatenate([np.zeros((8, 4)), tiles, np.zeros((8, 4))], axis=1).astype(np.uint8)

    small = np.asarray(centre_crop(Image.fromarray(wide), 4))
    assert np.array_equal(small, tiles[::2, ::2])
    assert np.array_equal(np.asarray(centre_crop(Image.fromarray(tiles), 8)), tiles)


@pytest.mark.parametrize(("background", "level"), [("white", 255), ("grey", 128), ("black", 0)])
def test_alpha_in_arrays_lets_the_background_through_as_in_pictures(
    background: str, level: int, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 4)).astype(np.uint8)
    write_arrays(tmp_path / "a.npz", x=x, y=np.zeros(6, int))
    source = OwnImages(root=tmp_path, image_size=8, background=background, mirror=0.0, **ALL)
    found = bound(source, "a").dataset("a", "test", None).pixels
    found = bound(source, "a").dataset("a", "train", None).pixels if not len(found) else found

    share = x[..., 3:].astype(float) / 255
    exact = (x[..., :3] * share + level * (1 - share)).transpose(0, 3, 1, 2)
    assert np.abs(found.numpy() - exact).max() <= 0.5 + 1e-9


def broken_png(root: Path) -> None:
    picture_folder(root, "a", {"cat": 1})
    path = root / "a" / "cat" / "00.png"
    path.write_bytes(path.read_bytes()[:60])


def no_class(root: Path) -> None:
    (root / "a").mkdir()


def no_picture(root: Path) -> None:
    (root / "a" / "cat").mkdir(parents=True)
    (root / "a" / "cat" / "notes.txt").write_text("no picture")


def nothing(root: Path) -> None:
    (root / "other.npz").write_bytes(b"")


def cut_npz(root: Path) -> None:
    path = write_arrays(root / "a.npz", x=np.zeros((3, 8, 8), np.uint8), y=np.arange(3))
    path.write_bytes(path.read_bytes()[:200])


def float_pixels(root: Path) -> None:
    write_arrays(root / "a.npz", x=np.zeros((3, 8, 8)), y=np.arange(3))


def wrong_size(root: Path) -> None:
    write_arrays(root / "a.npz", x=np.zeros((3, 9, 9), np.uint8), y=np.arange(3))


def class_out_of_range(root: Path) -> None:
    write_arrays(root / "a.npz", x=np.zeros((3, 8, 8), np.uint8), y=np.arange(3), names=np.array(["p", "q"]))


def negative_class(root: Path) -> None:
    write_arrays(root / "a.npz", x=np.zeros((2, 8, 8), np.uint8), y=np.array([-1, 0]))


def too_few_labels(root: Path) -> None:
    write_arrays(root / "a.npz", x=np.zeros((3, 8, 8), np.uint8), y=np.arange(2))


def pickled(root: Path) -> None:
    np.savez(root / "a.npz", x=np.array([{"an": "object"}], dtype=object), y=np.arange(1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_png, "00.png is not a readable image"),
        (no_class, "holds no class folder"),
        (no_picture, "class 'cat' in .*a holds no picture; allowed endings"),
        (nothing, "neither a folder a, nor a.npz.*it holds other.npz"),
        (cut_npz, "a.npz cannot be read"),
        (float_pixels, "x is float64"),
        (wrong_size, r"\(1, 9, 9\), the model takes \(1, 8, 8\)"),
        (class_out_of_range, "label 2 is out of range, names hold 2 classes"),
        (negative_class, "give 2 integers, 0 or more"),
        (too_few_labels, "for 3 images; give 3 integers"),
        (pickled, "a.npz cannot be read"),
    ],
)
def test_damage_is_told(damage: Any, message: str, tmp_path: Path) -> None:
    damage(tmp_path)

    with pytest.raises(ImageFileError, match=message):
        bound(OwnImages(root=tmp_path, image_size=8, channels=1), "a").dataset("a", "train", tmp_path / "c")


@pytest.mark.parametrize("options", [{"channels": 2}, {"image_size": 0}, {"test_share": 1.0}, {"mirror": 1.5}])
def test_wrong_options_are_told(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        OwnImages(root=tmp_path, **options)
