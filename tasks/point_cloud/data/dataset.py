# SPDX-License-Identifier: Apache-2.0
"""Items for the network: voxels of one scan, with features, labels and the map back to the raw points."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset
from torch_geometric.data import Batch, Data

from tasks.point_cloud.data.features import Features, count_cells, network_input, normalise_light, voxelise
from tasks.point_cloud.data.labels import IGNORE
from tasks.point_cloud.data.limits import check_density
from tasks.point_cloud.data.scans import ScanArrays
from tasks.point_cloud.data.scene import Floats, Ints
from tasks.point_cloud.data.transforms import Augmentation, crop_columns, tile_columns
from tasks.point_cloud.data.voting import TileVotes, Voting


class Scan(Data):  # type: ignore[misc]
    """One scan, or a part of one, as voxels. ``Batch.from_data_list`` makes a batch of several.

    Attributes:
        pos: [N, 3] float32 metres, one point per voxel.
        grid: [N, 3] int64 voxel coordinates, minimum 0.
        x: [N, 6] float32 features.
        y: [N] int64 index into the label set of its domain, -1 ignored.
        domain: [1] int64 index into ``facts["domain_names"]``.
        raw_y: [R] int64 labels of the raw points.
        inverse: [R] int64 voxel of every raw point; in a batch it counts through all voxels.
        raw_row: [R] int64 row of every raw point in its whole scan.
        name: name of the scan.

    A test tile also has what predictions are written with:

    Attributes:
        raw_pos: [R, 3] float32 metres.
        origin: where zero lies in the frame of the scan's file, metres.
        scan_points: [1] int64 raw points of the whole scan.
        votes: how the tile is seen when votes are cast; only with ``voting``.
    """

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Shift ``inverse`` by the voxels before it when scans are joined."""
        return self.num_nodes if key == "inverse" else super().__inc__(key, value, *args, **kwargs)


class _Epoch(Protocol):
    epoch: int


class _FirstEpoch:
    epoch = 0


class ScanDataset(Dataset[Scan]):
    """Scans of one domain and split.

    Training items are random: item i in epoch e is a function of (seed, domain, e, i) and nothing else, so that a
    resumed run sees the crops an uninterrupted one would have seen. Test items are fixed tiles that cover every point.

    Args:
        scans: the scans.
        domain: name of the domain.
        label_set: its class names; labels are looked up here by name.
        domain_index: position of the domain in ``facts["domain_names"]``.
        voxel: voxel edge, metres.
        max_voxels: most voxels in a crop or tile.
        train: random crops (True) or fixed tiles.
        crops: training items per scan and epoch.
        augmentation: random changes in training; None for none.
        features: ``common`` or ``paper``.
        indoor: which of the paper's two layouts applies.
        seed: seed of all draws.
        voting: how often each test tile is answered; None for once.

    Raises:
        ValueError: a scan is empty, has coordinates that are not finite, or labels outside the domain's set.
    """

    def __init__(
        self,
        scans: list[ScanArrays],
        *,
        domain: str,
        label_set: Sequence[str],
        domain_index: int,
        voxel: float,
        max_voxels: int = 3000,
        train: bool = False,
        crops: int = 1,
        augmentation: Augmentation | None = None,
        features: Features = "common",
        indoor: bool = False,
        seed: int = 0,
        voting: Voting | None = None,
    ) -> None:
        self.domain, self.domain_index, self.voxel, self.max_voxels = domain, domain_index, voxel, max_voxels
        self.train, self.crops, self.augmentation = train, crops, augmentation
        self.features, self.indoor, self.seed = features, indoor, seed
        self.voting = None if train else voting
        self.clock: _Epoch = _FirstEpoch()
        self.scans = scans
        self.targets = [_check(scan, domain, label_set) for scan in scans]
        self.lights = [normalise_light(scan.light) for scan in scans]
        self.tiles: list[tuple[int, Ints]] = []
        if train:
            for scan in scans:
                check_density(len(scan), count_cells(scan.pos, voxel), voxel, scan.name, domain)
        else:
            for index, scan in enumerate(scans):
                voxels = voxelise(scan.pos, voxel, self._fixed(index))
                check_density(len(scan), len(voxels.pick), voxel, scan.name, domain)
                parts = tile_columns(scan.pos[voxels.pick], max_voxels)
                owner = np.empty(len(voxels.pick), np.min_scalar_type(len(parts)))
                for number, part in enumerate(parts):
                    owner[part] = number
                of_point = owner[voxels.inverse]
                points = np.argsort(of_point, kind="stable")  # tile after tile, each in the order of the file
                cuts = np.searchsorted(of_point[points], np.arange(1, len(parts), dtype=owner.dtype))
                self.tiles.extend((index, own) for own in np.split(points, cuts))

    def num_labels(self) -> int | None:
        """Return how many points have a known label; None where that is not known without reading every scan."""
        return int(sum((target != IGNORE).sum() for target in self.targets))

    def __len__(self) -> int:
        return len(self.scans) * self.crops if self.train else len(self.tiles)

    def __getitem__(self, index: int) -> Scan:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        if self.train:
            return self._crop(index)
        scan, points = self.tiles[index]
        arrays, pos, light = self.scans[scan], self.scans[scan].pos[points], self.lights[scan][points]
        voxels = voxelise(pos, self.voxel, self._fixed(scan))
        item = self._item(scan, points, pos, light, voxels.pick, voxels.inverse)
        item.raw_pos = torch.from_numpy(np.ascontiguousarray(pos))
        item.origin, item.scan_points = arrays.origin, torch.tensor([len(arrays)])
        if self.voting is not None:
            item.votes = TileVotes(
                *(pos, light, arrays.up[points], self.voxel, self.domain_index, zlib.crc32(arrays.name.encode())),
                voting=self.voting,
                features=self.features,
                indoor=self.indoor,
            )
        return item

    def _fixed(self, scan: int) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(self.scans[scan].name.encode()))

    def _crop(self, index: int) -> Scan:
        rng = np.random.default_rng((self.seed, zlib.crc32(self.domain.encode()), self.clock.epoch, index))
        scan = index % len(self.scans)
        points = np.arange(len(self.scans[scan]))
        pos, light = self.scans[scan].pos, self.lights[scan]
        if self.augmentation is not None:
            points = self.augmentation.keep(len(points), rng)
            pos = self.augmentation.move(pos[points], self.voxel, rng)
            light = self.augmentation.relight(light[points], rng)
        voxels = voxelise(pos, self.voxel, rng)
        chosen = crop_columns(pos[voxels.pick], self.max_voxels, rng)
        rank = np.full(len(voxels.pick), -1, np.int64)
        rank[chosen] = np.arange(len(chosen))
        inside = np.flatnonzero(rank[voxels.inverse] >= 0)
        place = np.full(len(points), -1, np.int64)
        place[inside] = np.arange(len(inside))
        pick, inverse = place[voxels.pick[chosen]], rank[voxels.inverse[inside]]
        return self._item(scan, points[inside], pos[inside], light[inside], pick, inverse)

    def _item(self, scan: int, points: Ints, pos: Floats, light: Floats, pick: Ints, inverse: Ints) -> Scan:
        """Make an item of raw ``points`` at ``pos``; ``pick`` and ``inverse`` index into them."""
        arrays, target = self.scans[scan], self.targets[scan][points]
        cell_pos = pos[pick]
        grid, x = network_input(
            *(cell_pos, self.voxel, light[pick], arrays.up[points[pick]]), features=self.features, indoor=self.indoor
        )
        return Scan(
            pos=torch.from_numpy(np.ascontiguousarray(cell_pos)),
            grid=torch.from_numpy(grid),
            x=torch.from_numpy(x),
            y=torch.from_numpy(target[pick]),
            domain=torch.tensor([self.domain_index]),
            raw_y=torch.from_numpy(target),
            inverse=torch.from_numpy(inverse),
            raw_row=torch.from_numpy(points),
            name=arrays.name,
        )


def _check(scan: ScanArrays, domain: str, label_set: Sequence[str]) -> Ints:
    if len(scan) == 0:
        raise ValueError(f"scan {scan.name} of domain {domain!r} is empty; leave it out")
    bad = int((~np.isfinite(scan.pos)).any(1).sum())
    if bad:
        raise ValueError(
            f"scan {scan.name} of domain {domain!r} has {bad} points with NaN or infinite coordinates; drop them"
        )
    return scan.target(label_set)


def collate_scans(items: list[Scan]) -> Batch:
    """Join scans into one batch; it gains ``batch`` [N] and ``ptr`` [B + 1]."""
    return Batch.from_data_list(items)
