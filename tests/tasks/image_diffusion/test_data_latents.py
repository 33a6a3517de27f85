# SPDX-License-Identifier: Apache-2.0
"""Latents of a user, and the autoencoder behind them: what is written is read, and a damaged file is told by name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from image_common import ALL, bound, write_latent, write_shard

from moeapps.data.images.arrays import ImageFileError, read_arrays
from moeapps.files import write_arrays
from tasks.image_diffusion.data.latents import LatentImages
from tasks.image_diffusion.data.readers.latent_files import (
    SCALE,
    LatentArrays,
    posterior,
    read_latent,
)
from tasks.image_diffusion.datamodule import ImageData
from tasks.image_diffusion.nets.autoencoder import LatentDecoder

# --- latents ----------------------------------------------------------------------------------------------------------


def moments(count: int, channels: int = 4, size: int = 4) -> torch.Tensor:
    return torch.randn(count, 2 * channels, size, size, generator=torch.Generator().manual_seed(5))


def test_posterior_without_noise_is_the_scaled_mean_and_with_noise_adds_the_spread() -> None:
    stored, eps = moments(3), torch.randn(3, 4, 4, 4)
    mean, logvar = stored[:, :4], stored[:, 4:]

    assert torch.equal(posterior(stored, 4, SCALE, None), mean * 0.18215)
    torch.testing.assert_close(posterior(stored, 4, SCALE, eps), 0.18215 * (mean + logvar.exp().sqrt() * eps))
    assert torch.equal(posterior(mean, 4, 0.5, eps), 0.5 * mean)  # latents as they are
    wild = torch.cat([mean, torch.full_like(mean, 99.0)], dim=1)
    torch.testing.assert_close(posterior(wild, 4, 1.0, eps), mean + np.exp(10.0) * eps, rtol=1e-5, atol=1e-2)
    with pytest.raises(ImageFileError, match="6 channels; the model takes 4"):
        posterior(torch.zeros(1, 6, 4, 4), 4, 1.0, None)


@pytest.mark.parametrize("key", ["latent", "moments"])
def test_latents_in_one_file_per_image_are_read(key: str, tmp_path: Path) -> None:
    stored = moments(5)
    for k in range(5):
        write_latent(tmp_path / "a" / f"n{k % 2}" / f"{k}.latent.npz", stored[k], -stored[k], key=key)
    source = bound(LatentImages(root=tmp_path, image_size=4, **ALL), "a")
    data = source.dataset("a", "train", None)
    order = [0, 2, 4, 1, 3]

    assert source.class_names == ["n0", "n1"]
    assert data.label.tolist() == [0, 0, 0, 1, 1]
    data.train = False
    assert torch.equal(data.fetch(torch.arange(5)), stored[order, :4] * 0.18215)
    flipped = data.stored(torch.arange(5), torch.ones(5, dtype=torch.bool))
    assert torch.equal(flipped, -stored[order])


def test_training_draws_from_the_posterior_and_evaluation_does_not(tmp_path: Path) -> None:
    stored = torch.zeros(1, 8, 4, 4)
    stored[:, 4:] = 2 * np.log(3.0)  # standard deviation 3
    data = LatentArrays(stored.expand(500, -1, -1, -1), torch.zeros(500).long(), 4, 1.0, train=True)

    drawn = data.fetch(torch.arange(500))
    assert drawn.std() == pytest.approx(3, rel=0.03)
    assert not torch.equal(drawn, data.fetch(torch.arange(500)))
    data.train = False
    assert (data.fetch(torch.arange(500)) == 0).all()


def write_shards(root: Path, stored: torch.Tensor, *, statistics: bool = True) -> None:
    labels = torch.arange(len(stored)) % 3
    for k, rows in enumerate(torch.arange(len(stored)).split(4)):
        write_shard(root / "a" / f"{k}.safetensors", stored[rows], labels[rows], -stored[rows])
    if statistics:
        torch.save({"mean": torch.arange(4.0), "std": torch.full((4,), 2.0)}, root / "a" / "latents_stats.pt")


def test_latents_in_shards_are_read_row_by_row_and_normalised(tmp_path: Path) -> None:
    stored = moments(10)[:, :4]
    write_shards(tmp_path, stored)
    data = bound(LatentImages(root=tmp_path, image_size=4, **ALL), "a").dataset("a", "train", None)
    data.train = False
    rows = torch.tensor([9, 0, 4, 3])

    expected = (stored - torch.arange(4.0)[:, None, None]) / 2
    torch.testing.assert_close(data.fetch(rows), expected[rows])
    assert data.label.tolist() == [k % 3 for k in range(10)]
    plain = bound(LatentImages(root=tmp_path, image_size=4, statistics=False, **ALL), "a").dataset("a", "train", None)
    plain.train = False
    assert torch.equal(plain.fetch(rows), stored[rows] * 0.18215)
    assert torch.equal(plain.stored(rows, torch.ones(4, dtype=torch.bool)), -stored[rows])


def test_latents_in_one_npz_are_read(tmp_path: Path) -> None:
    stored = moments(6)
    write_arrays(tmp_path / "a.npz", x=stored.numpy(), y=np.array([0, 1, 0, 1, 2, 2]), names=np.array(["p", "q", "r"]))
    data = bound(LatentImages(root=tmp_path, image_size=4, **ALL), "a").dataset("a", "train", None)
    data.train = False

    assert torch.equal(data.fetch(torch.arange(6)), stored[:, :4] * 0.18215)
    assert data.label.tolist() == [0, 1, 0, 1, 2, 2]


def test_splits_of_latents_share_no_file_and_lose_none(tmp_path: Path) -> None:
    for k in range(20):
        write_latent(tmp_path / "a" / "n" / f"{k}.npz", torch.full((4, 4, 4), float(k)))
    source = bound(LatentImages(root=tmp_path, image_size=4, scale=1.0, val_share=0.1, test_share=0.2), "a")
    found = [source.dataset("a", split, None) for split in ("train", "val", "test")]

    assert [len(data) for data in found] == [14, 2, 4]
    values = torch.cat([data.fetch(torch.arange(len(data)))[:, 0, 0, 0] for data in found])
    assert values.sort().values.tolist() == [float(k) for k in range(20)]
    data = ImageData(source=source, seen=["a"], validation=[], unseen=[], batch_size=4)
    assert data.facts["latent"]
    assert next(iter(data.train_dataloader())).image.shape == (4, 4, 4, 4)


def latent_cut(root: Path) -> None:
    path = write_latent(root / "a" / "n" / "0.npz", moments(1)[0])
    path.write_bytes(path.read_bytes()[:100])


def latent_key(root: Path) -> None:
    write_arrays(root / "a" / "n" / "0.npz", z=np.zeros((8, 4, 4), np.float32))


def latent_nan(root: Path) -> None:
    write_latent(root / "a" / "n" / "0.npz", torch.full((8, 4, 4), torch.nan))


def latent_channels(root: Path) -> None:
    write_latent(root / "a" / "n" / "0.npz", torch.zeros(6, 4, 4))


def latent_size(root: Path) -> None:
    write_latent(root / "a" / "n" / "0.npz", torch.zeros(8, 5, 5))


def shard_cut(root: Path) -> None:
    write_shards(root, moments(4)[:, :4])
    path = root / "a" / "0.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def shard_labels(root: Path) -> None:
    from safetensors.torch import save_file

    (root / "a").mkdir()
    save_file({"latents": torch.zeros(2, 4, 4, 4)}, root / "a" / "0.safetensors")


def no_statistics(root: Path) -> None:
    write_shards(root, moments(4)[:, :4], statistics=False)


def flat_statistics(root: Path) -> None:
    write_shards(root, moments(4)[:, :4])
    torch.save({"mean": torch.zeros(4), "std": torch.zeros(4)}, root / "a" / "latents_stats.pt")


def garbled_statistics(root: Path) -> None:
    write_shards(root, moments(4)[:, :4])
    (root / "a" / "latents_stats.pt").write_bytes(b"garbled")


def nothing_there(root: Path) -> None:
    (root / "a").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (latent_cut, "0.npz cannot be read"),
        (latent_key, "neither latent or moments but"),
        (latent_nan, "not finite"),
        (latent_channels, r"shape \(6, 4, 4\).*4 \(latent\) or 8"),
        (latent_size, r"shape \(8, 5, 5\)"),
        (shard_cut, "0.safetensors cannot be read"),
        (shard_labels, "has no 'labels' but latents"),
        (no_statistics, "statistics: false"),
        (flat_statistics, "std must be positive"),
        (garbled_statistics, "holds no mean and std"),
        (nothing_there, "no latents of domain 'a'"),
    ],
)
def test_damaged_latents_are_told_at_construction(damage: Any, message: str, tmp_path: Path) -> None:
    damage(tmp_path)

    with pytest.raises(ImageFileError, match=message):
        ImageData(source=LatentImages(root=tmp_path, image_size=4), seen=["a"], validation=[], unseen=[])


@pytest.mark.parametrize("kind", ["shards", "arrays"])
def test_latents_that_are_not_finite_are_told_before_they_are_trained_on(kind: str, tmp_path: Path) -> None:
    x = moments(3)[:, :4].clone()
    x[1, 0, 2, 3] = float("inf")
    if kind == "shards":
        write_shards(tmp_path, x, statistics=False)
    else:
        write_arrays(tmp_path / "a.npz", x=x.numpy(), y=np.zeros(3, int))
    source = bound(LatentImages(root=tmp_path, image_size=4, statistics=False, **ALL), "a")

    with pytest.raises(ImageFileError, match="finite"):
        source.dataset("a", "train", None).fetch(torch.arange(3))


def test_latents_of_other_shapes_are_named(tmp_path: Path) -> None:
    write_latent(tmp_path / "a" / "n" / "0.npz", torch.zeros(4, 4, 4))
    write_latent(tmp_path / "a" / "n" / "1.npz", torch.zeros(4, 5, 4))
    data = bound(LatentImages(root=tmp_path, image_size=4, **ALL), "a").dataset("a", "train", None)

    with pytest.raises(ImageFileError, match=r"different shapes: .*0.npz \(4, 4, 4\), .*1.npz \(4, 5, 4\)"):
        data.fetch(torch.arange(2))


def test_missing_latent_is_told_when_it_is_asked_for(tmp_path: Path) -> None:
    path = write_latent(tmp_path / "a" / "n" / "0.npz", torch.zeros(8, 4, 4))
    data = bound(LatentImages(root=tmp_path, image_size=4, **ALL), "a").dataset("a", "train", None)
    path.unlink()

    with pytest.raises(ImageFileError, match=r"no file .*0\.npz"):
        data.fetch(torch.tensor([0]))
    with pytest.raises(ImageFileError, match="no array 'q' but p"):
        read_arrays(write_arrays(tmp_path / "x.npz", p=np.zeros(1)), "q")
    with pytest.raises(ImageFileError, match="floats"):
        read_latent(write_arrays(tmp_path / "y.npz", latent=np.zeros(3)))


# --- autoencoder ------------------------------------------------------------------------------------------------------


def test_autoencoder_is_told_missing_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        LatentDecoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'moeapps\[vae\]'"):
        LatentDecoder(tmp_path)


def test_latents_are_divided_by_their_scale_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class AutoencoderKL(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, folder: str, **options: Any) -> AutoencoderKL:
            asked.update(options, folder=folder)
            return cls()

        def decode(self, z: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=z[:, :3])

    fake = ModuleType("diffusers")
    fake.AutoencoderKL = AutoencoderKL  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusers", fake)
    (tmp_path / "config.json").write_text("{}")
    decoder = LatentDecoder(tmp_path)

    torch.testing.assert_close(decoder(torch.full((1, 4, 2, 2), 0.5 * SCALE)), torch.full((1, 3, 2, 2), 0.5))
    assert decoder(torch.full((1, 4, 2, 2), 9.0)).max() == 1
    assert asked == {"folder": str(tmp_path), "local_files_only": True}
