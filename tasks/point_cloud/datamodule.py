# SPDX-License-Identifier: Apache-2.0
"""Point clouds of several sensors as domains: six seen, one for choices, the others unseen."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch_geometric.data import Batch

from moeapps.data.cache import build_once, cache_dir, config_hash
from tasks.point_cloud.data.dataset import Features, Scan, ScanDataset, collate_scans
from tasks.point_cloud.data.domains import (
    DOMAINS,
    GENERATOR_VERSION,
    SEEN,
    SPLITS,
    UNSEEN,
    VALIDATION,
    Split,
    generate_split,
)
from tasks.point_cloud.data.features import IN_DIM
from tasks.point_cloud.data.scans import ScanArrays, load_scans, save_scans
from tasks.point_cloud.data.stand_in import DomainDataModule
from tasks.point_cloud.labels import label_set
from tasks.point_cloud.transforms import Augmentation

log = logging.getLogger("moeapps")


class PointCloudData(DomainDataModule):
    """Labelled scans of several sensors; simulated domains are generated on first use and kept.

    Args:
        seen: domains that are trained on.
        validation: domains never trained on where every choice is made.
        unseen: domains that only ``test`` touches.
        batch_size: crops per training step.
        num_workers: loader processes; 0 loads in the training process.
        seed: seed of crops, augmentation and order.
        cache_dir: folder for generated scans; None means $MOEAPPS_CACHE or ~/.cache/moeapps.
        mixing: how batches mix domains: concat, balanced or one_domain.
        eval_batch_size: tiles per evaluation batch; None means batch_size.
        data_seed: seed of the generated worlds; another one gives other scenes everywhere.
        train_scenes: generated training scenes per seen domain.
        val_scenes: generated validation scenes per domain.
        test_scenes: generated test scenes per domain.
        crops_per_scene: training crops of a scene per epoch.
        max_voxels: most voxels in a training crop or test tile.
        augment: random changes of training crops; None for none.
        features: ``common`` gives all domains one layout, ``paper`` the paper's two.

    Raises:
        ValueError: an unknown domain, or a count below 1.
    """

    def __init__(
        self,
        *,
        seen: list[str] | None = None,
        validation: list[str] | None = None,
        unseen: list[str] | None = None,
        batch_size: int = 6,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: Path | None = None,
        mixing: str = "concat",
        eval_batch_size: int | None = None,
        data_seed: int = 0,
        train_scenes: int = 48,
        val_scenes: int = 6,
        test_scenes: int = 10,
        crops_per_scene: int = 2,
        max_voxels: int = 3000,
        augment: Augmentation | None = Augmentation(),  # noqa: B008 - frozen
        features: Features = "common",
    ) -> None:
        super().__init__(
            seen=list(SEEN) if seen is None else seen,
            validation=list(VALIDATION) if validation is None else validation,
            unseen=list(UNSEEN) if unseen is None else unseen,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir,
            mixing=mixing,
            eval_batch_size=eval_batch_size,
        )
        self.counts: dict[Split, int] = {"train": train_scenes, "val": val_scenes, "test": test_scenes}
        for name, value in (*self.counts.items(), ("crops_per_scene", crops_per_scene), ("max_voxels", max_voxels)):
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed; use 1 or more")
        self.data_seed, self.crops_per_scene, self.max_voxels = data_seed, crops_per_scene, max_voxels
        self.augment, self.features = augment, features
        for domain in self.domain_names:
            if domain not in DOMAINS:
                raise ValueError(f"unknown domain {domain!r}; allowed: {', '.join(DOMAINS)}")
            self.sources[domain] = f"simulated (seed {data_seed})"

    @property
    def facts(self) -> dict[str, Any]:
        """Domain names per role and in order, label sets, and the number of input channels."""
        names = self.domain_names
        return {
            **super().facts,
            "domain_names": names,
            "label_sets": {name: list(label_set(name)) for name in names},
            "in_dim": IN_DIM,
        }

    def _splits(self, domain: str) -> tuple[Split, ...]:
        role = self.role_of(domain)
        return SPLITS if role == "seen" else SPLITS[1:] if role == "validation" else SPLITS[2:]

    def prepare_data(self) -> None:
        """Generate what is not in the cache yet."""
        for domain in self.eval_domains("test"):
            for split in self._splits(domain):
                self._file(domain, split)

    def _file(self, domain: str, split: Split) -> Path:
        spec, count = DOMAINS[domain], self.counts[split]
        key = config_hash([GENERATOR_VERSION, asdict(spec), type(spec.sensor).__name__, split, count, self.data_seed])
        path = cache_dir("point_cloud", root=self.cache_dir) / f"{domain}-{split}-{key}.npz"
        return build_once(
            path, lambda temporary: save_scans(temporary, generate_split(spec, split, count, self.data_seed))
        )

    def scans(self, domain: str, split: Split) -> list[ScanArrays]:
        """Return the raw scans of one domain and split."""
        return load_scans(self._file(domain, split))

    def dataset(self, domain: str, split: Split) -> ScanDataset:
        """Return the crops (train) or tiles (val, test) of one domain."""
        return ScanDataset(
            self.scans(domain, split),
            domain=domain,
            domain_index=self.domain_names.index(domain),
            voxel=DOMAINS[domain].voxel,
            max_voxels=self.max_voxels,
            train=split == "train",
            crops=self.crops_per_scene,
            augmentation=self.augment,
            features=self.features,
            indoor=DOMAINS[domain].indoor,
            seed=self.seed,
        )

    def train_dataloader(self) -> Any:
        """Return the mixed training loader; the sampler's epoch chooses the crops."""
        loader = super().train_dataloader()
        for name in self.present("seen"):
            self.get_dataset(name, "train").clock = self._sampler
        return loader

    def collate(self, items: list[Scan]) -> Batch:
        """Join scans into one batch."""
        return collate_scans(items)
