# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moeapps.data.archives import ArchiveError
from tasks.point_cloud import datamodule
from tasks.point_cloud.data import sources
from tasks.point_cloud.data.dataset import ScanDataset, collate_scans
from tasks.point_cloud.data.readers.las import write_las
from tasks.point_cloud.data.scans import ScanArrays
from tasks.point_cloud.data.sources import LasFiles
from tasks.point_cloud.data.transforms import Augmentation
from tasks.point_cloud.datamodule import PointCloudData


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scans")


def _data(cache: Path, **options: object) -> PointCloudData:
    base: dict[str, object] = {
        "seen": ["rgbd_room", "drive64"],
        "validation": ["drive16"],
        "unseen": ["als"],
        "batch_size": 4,
        "train_scenes": 2,
        "val_scenes": 1,
        "test_scenes": 1,
        "max_voxels": 800,
        "cache_dir": cache,
    }
    return PointCloudData(**{**base, **options})  # type: ignore[arg-type]


def test_training_batch_mixes_domains_and_is_well_formed(cache: Path) -> None:
    data = _data(cache, crops_per_scene=4)
    batches = list(data.train_dataloader())

    assert {int(d) for b in batches for d in b.domain} == {0, 1}
    for batch in batches:
        assert batch.num_nodes <= 4 * 800
        assert batch.x.shape == (batch.num_nodes, 6)
        assert torch.isfinite(batch.x).all()
        assert batch.pos.dtype == torch.float32
        assert batch.grid.dtype == batch.y.dtype == batch.raw_y.dtype == batch.inverse.dtype == torch.int64
        cells = torch.cat([batch.batch[:, None], batch.grid], 1)
        assert len(torch.unique(cells, dim=0)) == batch.num_nodes
        assert batch.inverse.shape == batch.raw_y.shape
        assert torch.equal(torch.unique(batch.inverse), torch.arange(batch.num_nodes))
        for scan in range(batch.num_graphs):
            assert int(batch.grid[batch.batch == scan].min()) == 0


def test_training_without_a_label_is_refused_before_the_first_step(cache: Path, caplog) -> None:
    data = _data(cache)
    parts = [data.get_dataset(name, "train") for name in ("rgbd_room", "drive64")]
    parts[0].targets = [np.full_like(target, -1) for target in parts[0].targets]
    with caplog.at_level("WARNING", logger="moeapps"):
        data.train_dataloader()
    assert "domain rgbd_room (seen) has no known label" in caplog.text

    parts[1].targets = [np.full_like(target, -1) for target in parts[1].targets]
    with pytest.raises(ValueError, match="no training scan of rgbd_room, drive64 has a point with a known label"):
        data.train_dataloader()


def test_training_items_depend_on_seed_epoch_and_row_alone(cache: Path) -> None:
    one, two = (_data(cache).get_dataset("rgbd_room", "train") for _ in range(2))
    other = _data(cache, seed=1).get_dataset("rgbd_room", "train")
    torch.rand(3)  # the global generator has no say

    assert torch.equal(one[1].x, two[1].x)
    assert not torch.equal(one[1].pos, one[0].pos)
    assert not torch.equal(one[1].pos[:50], other[1].pos[:50])
    two.clock = types.SimpleNamespace(epoch=1)
    assert not torch.equal(one[1].pos[:50], two[1].pos[:50])


def test_crops_follow_the_epoch_of_the_sampler(cache: Path) -> None:
    data = _data(cache)
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.batch_sampler.set_epoch(epoch)
        epochs.append(torch.cat([batch.pos for batch in loader]))

    assert torch.equal(epochs[0], epochs[2])
    assert epochs[0].shape != epochs[1].shape or not torch.equal(epochs[0], epochs[1])


def test_a_look_at_the_first_batch_leaves_the_crops_to_the_epoch_of_training(cache: Path) -> None:
    data = _data(cache)
    loader = data.train_dataloader()
    first = next(iter(loader))
    look = data.first_training_batch()
    loader.batch_sampler.set_epoch(1)
    after = torch.cat([batch.pos for batch in loader])

    fresh = _data(cache).train_dataloader()
    fresh.batch_sampler.set_epoch(1)
    assert torch.equal(look.pos, first.pos)
    assert torch.equal(after, torch.cat([batch.pos for batch in fresh]))


def test_workers_give_the_same_batches(cache: Path) -> None:
    alone = [batch.pos for batch in _data(cache).train_dataloader()]
    helped = [batch.pos for batch in _data(cache, num_workers=1).train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_test_tiles_cover_every_point_once(cache: Path) -> None:
    data = _data(cache)
    for domain in data.eval_domains("test"):
        dataset = data.get_dataset(domain, "test")
        rows = torch.cat([item.raw_row for item in dataset])
        total = len(dataset.scans[0])
        assert torch.equal(rows.sort().values, torch.arange(total))
        item = dataset[0]
        assert item.num_nodes <= 800
        assert torch.equal(item.x, dataset[0].x)
        back = item.pos[item.inverse]
        raw = torch.from_numpy(dataset.scans[0].pos)[item.raw_row]
        assert (torch.floor(back / dataset.voxel) == torch.floor(raw / dataset.voxel)).float().mean() > 0.999


def test_facts_are_plain_and_known_before_any_data_is_made(tmp_path: Path) -> None:
    facts = _data(tmp_path).facts

    assert json.loads(json.dumps(facts)) == facts
    assert facts["domain_names"] == ["rgbd_room", "drive64", "drive16", "als"]
    assert facts["label_sets"]["als"] == ["ground", "building", "vegetation", "car", "power line"]
    assert not list(tmp_path.iterdir())


def test_all_domains_share_one_feature_layout(cache: Path) -> None:
    data = _data(cache)
    for domain in data.domain_names:
        x = data.get_dataset(domain, "test")[0].x
        low, high = torch.tensor([-0.5, -0.5, -0.5, -1, 0, 0]), torch.tensor([0.5, 0.5, 0.5, 6, 1, 1])
        assert (x >= low).all()
        assert (x <= high + 1e-6).all()
        assert float(x[:, 4].max()) == 1.0
        assert float(x[:, 4].min()) == 0.0


def test_second_preparation_makes_nothing(cache: Path) -> None:
    data = _data(cache)
    data.prepare_data()
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npz")}
    data.prepare_data()
    _data(cache, max_voxels=500, seed=9).prepare_data()  # neither belongs to what is generated

    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.npz")} == before
    assert {path.name.rsplit("-", 1)[0] for path in before} >= {"als-test", "drive16-val", "rgbd_room-train"}
    assert not any(path.name.startswith(("als-train", "als-val", "drive16-train")) for path in before)


def test_crash_while_generating_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(path: Path, scans: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(datamodule, "save_scans", crash)
    with pytest.raises(OSError, match="disk full"):
        _data(tmp_path).get_dataset("als", "test")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seen": ["mars"]}, "unknown domain 'mars'; allowed: rgbd_room"),
        ({"seen": ["drive16"]}, "given as seen and as validation"),
        ({"train_scenes": 0}, "train_scenes=0"),
        ({"max_voxels": 0}, "max_voxels=0"),
        ({"crops_per_scene": 0}, "crops_per_scene=0"),
    ],
)
def test_impossible_configuration_is_refused(tmp_path: Path, options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _data(tmp_path, **options)


# Odd scans ---------------------------------------------------------------------------------------------------------


def _dataset(scans: list[ScanArrays], **options: object) -> ScanDataset:
    base: dict[str, object] = {"domain": "d", "label_set": ("ground",), "domain_index": 0, "voxel": 0.5}
    return ScanDataset(scans, **{**base, **options})  # type: ignore[arg-type]


def _scan(pos: np.ndarray) -> ScanArrays:
    count = len(pos)
    blank = np.zeros(count, np.float32)
    return ScanArrays("odd", pos.astype(np.float32), blank, blank, np.zeros(count, np.uint8), ("ground",))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_tiny_scans_and_coincident_points_work(train: bool, count: int) -> None:
    item = _dataset([_scan(np.ones((count, 3)))], train=train, augmentation=Augmentation(dropout_prob=1.0))[0]
    assert item.num_nodes >= 1
    assert torch.isfinite(item.x).all()
    batch = collate_scans([item, item])
    assert batch.num_graphs == 2
    assert int(batch.inverse.max()) == batch.num_nodes - 1


@pytest.mark.parametrize(
    ("pos", "text"),
    [
        (np.zeros((0, 3)), "is empty"),
        (np.array([[0, 0, np.nan], [0, 0, 0]]), "1 points with NaN"),
        (np.array([[np.inf, 0, 0]]), "NaN or infinite"),
    ],
)
def test_unusable_scans_are_one_clear_error(pos: np.ndarray, text: str) -> None:
    with pytest.raises(ValueError, match=f"scan odd of domain 'd' .*{text}"):
        _dataset([_scan(pos)])


def test_item_beyond_the_end_is_an_index_error() -> None:
    dataset = _dataset([_scan(np.ones((3, 3)))])
    assert len(list(dataset)) == 1
    with pytest.raises(IndexError):
        dataset[1]


def test_scans_without_a_label_are_ignored_not_guessed() -> None:
    blank = replace(_scan(np.random.default_rng(0).random((30, 3)) * 9), label=np.full(30, 255, np.uint8))
    assert (_dataset([blank])[0].y == -1).all()


# Files of the user's own ---------------------------------------------------------------------------------------------


def _las(folder: Path, name: str = "a.las", count: int = 400) -> None:
    rng = np.random.default_rng(0)
    write_las(
        folder / name,
        rng.uniform(0, 60, (count, 3)) + np.array([7e5, 2e5, 100]),
        classification=rng.choice([2, 5, 6, 7], count),
        intensity=rng.integers(0, 60_000, count),
    )


def test_own_las_files_become_a_domain(cache: Path, tmp_path: Path) -> None:
    _las(tmp_path)
    source = LasFiles(root=tmp_path, test=["a.las"], classes={2: "ground", 5: "tree", 6: "roof"}, unit=0.5)
    data = _data(cache, unseen=["mine"], own={"mine": source})

    assert data.facts["label_sets"]["mine"] == ["ground", "tree", "roof"]
    item = data.get_dataset("mine", "test")[0]
    assert set(item.raw_y.tolist()) == {-1, 0, 1, 2}
    span = np.ptp(data.scans("mine", "test")[0].pos, axis=0)
    np.testing.assert_allclose(span, 30, atol=1)  # 60 units of half a metre
    assert "user's own" in data.sources["mine"]


def test_large_files_are_cut_into_columns(tmp_path: Path) -> None:
    _las(tmp_path, count=1000)
    source = LasFiles(root=tmp_path, test=["a.las"], classes={2: "ground"}, max_points=300)
    scans = source.scans("test", None)
    assert [len(scan) for scan in scans] == [250] * 4
    assert len({scan.name for scan in scans}) == 4


def test_missing_optional_source_drops_its_domain_and_says_why(cache: Path, tmp_path: Path) -> None:
    source = LasFiles(root=tmp_path, test=["none.las"], classes={2: "ground"})
    data = _data(cache, unseen=["als", "mine"], own={"mine": source})

    assert data.eval_domains("test") == ["rgbd_room", "drive64", "drive16", "als"]
    assert "no file" in data.missing["mine"]


def test_missing_required_source_is_an_error(cache: Path, tmp_path: Path) -> None:
    source = LasFiles(root=tmp_path, test=["none.las"], classes={2: "ground"}, optional=False)
    with pytest.raises(ValueError, match=r"domain 'mine' cannot be read: no file .*none\.las"):
        _data(cache, unseen=["mine"], own={"mine": source}).eval_domains("test")


def test_package_that_cannot_be_fetched_is_a_reason_not_a_crash(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> Path:
        raise ArchiveError("could not fetch laspy: no network")

    monkeypatch.setattr(sources, "fetch_package", offline)
    source = LasFiles(package="laspy", test=["a.las"], classes={2: "ground"})
    assert source.missing(tmp_path) == "could not fetch laspy: no network"
    assert source.describe().startswith("laspy 2.7.0 (sdist, sha256 f56feb5445e7")


@pytest.mark.parametrize("data", [b"", b"LASF" + bytes(300)])
def test_damaged_own_file_is_one_clear_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.las").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.las"):
        LasFiles(root=tmp_path, test=["a.las"], classes={2: "ground"}).scans("test", None)


def test_file_without_points_is_one_clear_error(tmp_path: Path) -> None:
    write_las(tmp_path / "a.las", np.zeros((0, 3)))
    with pytest.raises(ValueError, match="holds no point"):
        LasFiles(root=tmp_path, test=["a.las"], classes={2: "ground"}).scans("test", None)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": {}}, "classes is empty"),
        ({"test": []}, "no file is listed"),
        ({"unit": 0}, "must be positive"),
        ({"package": "nothing"}, "unknown package 'nothing'; listed: laspy"),
    ],
)
def test_impossible_source_is_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LasFiles(**{"classes": {2: "ground"}, "test": ["a.las"], **options})  # type: ignore[arg-type]
