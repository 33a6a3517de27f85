# SPDX-License-Identifier: Apache-2.0
"""Public data as domains: streamed items equal items in memory, roles and names hold, a missing root stops early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from layout_writers import write_pointcept_scan
from readers_common import random_scan

from tasks.point_cloud.data.dataset import Scan, ScanDataset
from tasks.point_cloud.data.labels import label_set
from tasks.point_cloud.data.public import PublicScans, StreamedScans, num_tiles, to_arrays
from tasks.point_cloud.data.readers import (
    Matterport3DFolders,
    OwnLabels,
    OwnScans,
    PointceptFolders,
    PointCloudFileError,
    RawScan,
    S3DISFolders,
    ScanNetFolders,
    write_own_labels,
    write_own_scan,
)
from tasks.point_cloud.data.transforms import Augmentation, tile_columns
from tasks.point_cloud.datamodule import PointCloudData
from tasks.point_cloud.nets.text import TaxonomyText

CONFIGS = Path(__file__).parents[3] / "configs" / "data"
NAMES = ("wall", "floor", "chair")


def _room(rows: int, seed: int, names: tuple[str, ...] = NAMES, labelled: bool = True) -> RawScan:
    rng = np.random.default_rng(seed)
    scan = random_scan(names, rows, seed=seed, labelled=labelled)
    return replace(scan, xyz=(rng.random((rows, 3)) * (6, 4, 2.5)).astype(np.float32))


def _folders(root: Path, sizes: tuple[int, ...] = (150, 40, 1, 90)) -> PublicScans:
    for number, rows in enumerate(sizes):
        write_pointcept_scan(root / "all" / f"room_{number}", _room(rows, number))
    return PublicScans(reader=PointceptFolders(root, list(NAMES), {"train": ["all"], "test": ["all"]}), voxel=0.3)


def _view(train: bool, **changes: Any) -> dict[str, Any]:
    view = {"domain": "rooms", "label_set": NAMES, "domain_index": 2, "voxel": 0.3, "max_voxels": 30, "train": train}
    return {**view, "crops": 3, "augmentation": Augmentation(), "seed": 5, **changes}


def _equal(one: Scan, other: Scan) -> None:
    assert one.keys() == other.keys()
    for key in one.keys():  # noqa: SIM118 - Data is no mapping
        if torch.is_tensor(one[key]):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
        else:
            assert one[key] == other[key]


@pytest.mark.parametrize("train", [True, False])
def test_streamed_items_equal_items_in_memory(train: bool, tmp_path: Path) -> None:
    source = _folders(tmp_path)
    split = "train" if train else "test"
    memory = ScanDataset(source.scans(split, None), **_view(train))
    streamed = source.dataset(split, tmp_path / "cache", **_view(train))
    memory.clock = streamed.clock = SimpleNamespace(epoch=4)

    assert len(streamed) == len(memory)
    for index in np.random.default_rng(0).permutation(len(memory)):
        _equal(streamed[int(index)], memory[int(index)])


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 30])
def test_the_number_of_tiles_is_known_without_cutting(limit: int) -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 29, 30, 31, 61, 200):
        assert num_tiles(count, limit) == len(tile_columns(rng.random((count, 3)).astype(np.float32), limit))
    assert num_tiles(0, limit) == 0


def test_every_raw_point_of_every_scan_is_in_one_tile(tmp_path: Path) -> None:
    source = _folders(tmp_path)
    dataset = source.dataset("test", tmp_path / "cache", **_view(False))
    rows: dict[str, list[int]] = {}
    for index in range(len(dataset)):
        item = dataset[index]
        rows.setdefault(item.name, []).extend(item.raw_row.tolist())

    assert {name: sorted(seen) for name, seen in rows.items()} == {
        f"all/room_{number}": list(range(size)) for number, size in enumerate((150, 40, 1, 90))
    }


def test_tiles_are_counted_once_and_anew_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _folders(tmp_path)
    before = len(source.dataset("test", tmp_path / "cache", **_view(False)))
    calls: list[object] = []
    read = source.reader.read
    monkeypatch.setattr(source.reader, "read", lambda ref: calls.append(ref) or read(ref))

    assert len(source.dataset("test", tmp_path / "cache", **_view(False))) == before
    assert not calls

    write_pointcept_scan(tmp_path / "all" / "room_1", _room(400, 9))
    assert len(source.dataset("test", tmp_path / "cache", **_view(False))) > before
    assert len(calls) == 4


def test_empty_scans_have_no_tile_and_no_crop(tmp_path: Path) -> None:
    source = _folders(tmp_path, (0, 50, 0))
    test = source.dataset("test", tmp_path / "cache", **_view(False))
    train = source.dataset("train", tmp_path / "cache", **_view(True))

    assert {test[index].name for index in range(len(test))} == {"all/room_1"}
    assert {train[index].name for index in range(len(train))} == {"all/room_1"}


def test_training_without_labels_is_refused_and_testing_is_not(tmp_path: Path) -> None:
    source = _folders(tmp_path, (20,))
    (tmp_path / "all" / "room_0" / "segment.npy").unlink()

    test = source.dataset("test", tmp_path / "cache", **_view(False))
    assert (test[0].raw_y == -1).all()
    with pytest.raises(PointCloudFileError, match="labels for every training scan"):
        source.dataset("train", tmp_path / "cache", **_view(True))[0]


def test_no_channel_tells_colour_from_intensity_or_brings_the_files_normals(tmp_path: Path) -> None:
    """Card 3: the paper's six channels mean different things indoors and outdoors; ours do not."""
    colour = replace(_room(60, 0), color=np.repeat(np.arange(60, dtype=np.uint8)[:, None] * 4, 3, axis=1))
    light = replace(colour, color=None, normal=None, intensity=np.arange(60, dtype=np.float32) * 4 / 255)

    first, second = to_arrays(colour, "a", 0.3), to_arrays(light, "a", 0.3)

    np.testing.assert_allclose(first.light, second.light, atol=1e-6)
    np.testing.assert_array_equal(first.up, second.up)
    np.testing.assert_array_equal(first.pos, second.pos)


def _module(root: Path, **changes: Any) -> PointCloudData:
    for area in range(1, 7):
        write_pointcept_scan(root / "s3dis" / f"Area_{area}" / "office", _room(80, area, label_set("s3dis")))
    for split in ("train", "val"):
        scan = _room(80, 7, label_set("scannet20"))
        write_pointcept_scan(root / "scannet" / split / "scene0000_00", scan, segment="segment20")
    write_pointcept_scan(root / "matterport" / "test" / "house", _room(80, 8, label_set("matterport3d")))
    own: dict[str, Any] = {
        "scannet": PublicScans(reader=ScanNetFolders(root / "scannet"), voxel=0.3),
        "s3dis": PublicScans(reader=S3DISFolders(root / "s3dis"), voxel=0.3),
        "matterport3d": PublicScans(reader=Matterport3DFolders(root / "matterport"), voxel=0.3),
    }
    roles: dict[str, Any] = {"seen": ["scannet", "s3dis"], "validation": [], "unseen": ["matterport3d"]}
    return PointCloudData(own=own, **{**roles, "max_voxels": 50, "cache_dir": root / "cache", **changes})


def test_batches_mix_public_domains_and_name_their_classes(tmp_path: Path) -> None:
    data = _module(tmp_path, crops_per_scene=2, batch_size=12)
    data.prepare_data()

    batch = next(iter(data.train_dataloader()))

    assert data.facts["label_sets"]["s3dis"][:3] == ["ceiling", "floor", "wall"]
    assert data.facts["label_sets"]["matterport3d"][-2:] == ["other", "ceiling"]
    assert set(batch.domain.tolist()) == {0, 1}
    assert not any("Area_5" in name for name in batch.name)
    assert "S3DISFolders" in data.sources["s3dis"]


def test_tests_are_val_sets_area_5_and_the_unseen_set(tmp_path: Path) -> None:
    data = _module(tmp_path)
    data.prepare_data()

    names = [{name for batch in loader for name in batch.name} for loader in data.test_dataloader()]

    assert names == [{"val/scene0000_00"}, {"Area_5/office"}, {"test/house"}]


def test_training_is_the_same_when_run_again(tmp_path: Path) -> None:
    first, second = (next(iter(_module(tmp_path, seed=3).train_dataloader())) for _ in range(2))

    torch.testing.assert_close(first.x, second.x, rtol=0, atol=0)
    assert first.name == second.name


def test_a_missing_root_stops_before_training_or_drops_an_optional_domain(tmp_path: Path) -> None:
    own = {
        "scannet": PublicScans(reader=ScanNetFolders(tmp_path / "nowhere"), voxel=0.02),
        "rooms": _folders(tmp_path / "rooms"),
    }
    data = PointCloudData(seen=["rooms", "scannet"], validation=[], unseen=[], own=own, cache_dir=tmp_path / "cache")

    with pytest.raises(ValueError, match=r"scannet.*nowhere.*no such folder.*set `root`"):
        data.prepare_data()

    own["scannet"].optional = True
    data = PointCloudData(seen=["rooms", "scannet"], validation=[], unseen=[], own=own, cache_dir=tmp_path / "cache")
    data.prepare_data()
    assert data.present("seen") == ["rooms"]
    assert "no such folder" in data.missing["scannet"]


def test_voxels_and_numbers_of_classes_are_checked(tmp_path: Path) -> None:
    reader = PointceptFolders(tmp_path, list(NAMES), {})
    with pytest.raises(ValueError, match="voxel=0"):
        PublicScans(reader=reader, voxel=0)
    with pytest.raises(ValueError, match="256 class names"):
        PublicScans(reader=PointceptFolders(tmp_path, [str(i) for i in range(256)], {}), voxel=1).label_set  # noqa: B018


def test_own_scans_are_an_unseen_domain(tmp_path: Path) -> None:
    write_own_labels(tmp_path / "yard" / "labels.yaml", OwnLabels(("ground", "building")))
    write_own_scan(tmp_path / "yard" / "test" / "first.ply", _room(50, 0, ("ground", "building")))
    own = {"yard": PublicScans(reader=OwnScans(tmp_path, "yard"), voxel=0.3), "rooms": _folders(tmp_path / "rooms")}
    data = PointCloudData(seen=["rooms"], validation=[], unseen=["yard"], own=own, cache_dir=tmp_path / "cache")
    data.prepare_data()

    batch = next(iter(data.test_dataloader()[-1]))

    assert batch.name == ["first"]
    assert data.facts["label_sets"]["yard"] == ["ground", "building"]


@pytest.mark.parametrize("name", ["scannet_s3dis_structured3d", "indoor_outdoor", "own_scans"])
def test_overlays_name_readers_that_exist_and_words_the_taxonomy_knows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jsonargparse import ArgumentParser

    monkeypatch.chdir(tmp_path)
    write_own_labels(tmp_path / "data/my_scans/yard/labels.yaml", OwnLabels(("ground", "building")))
    parser = ArgumentParser()
    parser.add_subclass_arguments(PointCloudData, "data")
    text = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())

    data = parser.instantiate(parser.parse_object(text)).data

    facts = data.facts
    assert isinstance(data, PointCloudData)
    assert set(data.own) <= set(facts["domain_names"])
    for names in facts["label_sets"].values():
        assert TaxonomyText().encode(names).shape[0] == len(names)
    with pytest.raises(ValueError, match="no such folder"):  # before anything is trained, or simulated for it
        data.get_dataset("yard", "test") if name == "own_scans" else data.prepare_data()


def test_streamed_scans_are_scan_datasets(tmp_path: Path) -> None:
    dataset = _folders(tmp_path).dataset("test", tmp_path / "cache", **_view(False))

    assert isinstance(dataset, StreamedScans)
    assert isinstance(dataset, ScanDataset)
    with pytest.raises(IndexError):
        dataset[len(dataset)]
