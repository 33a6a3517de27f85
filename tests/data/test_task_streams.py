# SPDX-License-Identifier: Apache-2.0
"""Latents, scans and logs as streams: every item is the one that the files give, and the overlay reads it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from moeapps.cli import main
from moeapps.commands.trained import build
from moeapps.data.domain import DomainDataModule
from moeapps.data.mixed_windows import MixedWindows
from moeapps.files import write_arrays
from tasks.point_cloud.data.readers import OwnLabels, RawScan, write_own_labels, write_own_scan


def latents(root: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for domain, count in (("near", 40), ("far", 30), ("other", 20)):
        for number in range(count):
            folder = root / domain / f"class_{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pair = {key: rng.normal(size=(8, 4, 4)).astype(np.float32) for key in ("moments", "moments_flip")}
            write_arrays(folder / f"{number}.npz", **pair)
    source = {"root": str(root), "image_size": 4, "val_share": 0.2, "test_share": 0.2}
    return {
        "class_path": "tasks.image_diffusion.datamodule.ImageData",
        "init_args": {
            "source": {"class_path": "tasks.image_diffusion.data.latents.LatentImages", "init_args": source},
            **{"seen": ["near"], "validation": ["far"], "unseen": ["other"], "batch_size": 4},
        },
    }


def scans(root: Path) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    own = {}
    for domain in ("yard", "hall", "road"):
        write_own_labels(root / domain / "labels.yaml", OwnLabels(names=("ground", "wall")))
        for split in ("train", "val", "test"):
            for number in range(2):
                xyz = rng.uniform(0, 4, (300, 3)).astype(np.float32)
                color = rng.integers(0, 256, (300, 3)).astype(np.uint8)
                label = rng.integers(-1, 2, 300)
                (root / domain / split).mkdir(parents=True, exist_ok=True)
                raw = RawScan(xyz, label, ("ground", "wall"), color=color)
                write_own_scan(root / domain / split / f"{split}{number}.ply", raw)
        reader = {
            "class_path": "tasks.point_cloud.data.readers.OwnScans",
            "init_args": {"root": str(root), "domain": domain},
        }
        own[domain] = {
            "class_path": "tasks.point_cloud.data.public.PublicScans",
            "init_args": {"reader": reader, "voxel": 0.25},
        }
    return {
        "class_path": "tasks.point_cloud.datamodule.PointCloudData",
        "init_args": {
            **{"own": own, "seen": ["yard"], "validation": ["hall"], "unseen": ["road"], "batch_size": 2},
            **{"max_voxels": 200},
        },
    }


def impressions(root: Path) -> dict[str, Any]:
    return _log("MultitaskLog", "RecommendationData", train_rows=5000, val_rows=500, test_rows=500)


def lists(root: Path) -> dict[str, Any]:
    return _log("TasteTypes", "ListData", train_lists=800, val_lists=200, test_lists=200)


def _log(source: str, data: str, **options: Any) -> dict[str, Any]:
    module = {"MultitaskLog": "multitask_log", "TasteTypes": "taste_types"}[source]
    path = f"tasks.recommendation.data.{module}.{source}"
    return {
        "class_path": f"tasks.recommendation.datamodule.{data}",
        "init_args": {"source": {"class_path": path, "init_args": options}, "batch_size": 64},
    }


CASES = {
    "latents": ("configs/promoe.yaml", latents),
    "scans": ("configs/point_moe.yaml", scans),
    "impressions": ("configs/home.yaml", impressions),
    "lists": ("configs/aw_moe.yaml", lists),
}


def tensors(value: Any) -> dict[str, Tensor]:
    """All tensors of an item, by name."""
    if isinstance(value, Tensor):
        return {"": value}
    if isinstance(value, dict):
        named = value
    elif isinstance(value, list | tuple):
        named = dict(enumerate(value))
    elif hasattr(value, "to_dict"):
        named = value.to_dict()
    elif hasattr(value, "__dataclass_fields__"):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
    else:
        return {}
    return {f"{name}.{inner}": part for name, held in named.items() for inner, part in tensors(held).items()}


def item(data: DomainDataModule, domain: str, split: Any, row: int) -> dict[str, Tensor]:
    torch.manual_seed(row)  # latents of training are drawn
    return tensors(data.collate([data.get_dataset(domain, split)[row]]))  # type: ignore[index]


@pytest.mark.medium
@pytest.mark.parametrize("kind", CASES)
def test_items_of_a_stream_are_those_of_the_files(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, write = CASES[kind]
    overlay, dest = tmp_path / "files.yaml", tmp_path / "stream"
    overlay.write_text(yaml.safe_dump({"data": write(tmp_path / "files")}))

    assert main(["data", "optimize", base, str(overlay), str(dest), "--chunk_mb", "1"]) == 0
    told = capsys.readouterr().out
    assert f"{dest}: {kind}, " in told
    assert f"--config {base} --config {overlay} --config {dest / 'data.yaml'}" in told

    files = [Path(base), overlay, dest / "data.yaml"]
    whole, streamed = (build(None, files[:count]).datamodule for count in (2, 3))
    assert streamed.roles == whole.roles
    assert streamed.facts == whole.facts
    for domain, split in ((name, split) for name in whole.roles["seen"][:1] for split in ("train", "val", "test")):
        count = len(whole.get_dataset(domain, split))
        assert len(streamed.get_dataset(domain, split)) == count
        for row in range(0, count, max(1, count // 7)):
            expected, found = (item(data, domain, split, row) for data in (whole, streamed))
            assert expected
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                assert torch.equal(value, found[name]), (domain, split, row, name)
    loader = streamed.train_dataloader()
    assert isinstance(loader.batch_sampler, MixedWindows) == (kind != "scans")
    assert tensors(next(iter(loader)))


@pytest.mark.medium
def test_data_that_is_not_streamed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "optimize", "configs/mixer.yaml", str(tmp_path / "s")]) == 2
    assert "does not say how its data is streamed; latents (ImageData)" in capsys.readouterr().err
    assert main(["data", "optimize", "configs/promoe.yaml", str(tmp_path / "s")]) == 2
    assert "GlyphShapes gives pixels; streams hold latents" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
