# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
