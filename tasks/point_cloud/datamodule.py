# SPDX-License-Identifier: Apache-2.0
"""Point clouds of several sensors as domains: six seen, one for choices, the others unseen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from torch.utils.data import DataLoader
from torch_geometric.data import Batch

from moeapps.data.cache import build_once, cache_dir, config_hash
from moeapps.data.domain import DomainDataModule
from moeapps.data.mixing import MixingSampler
from moeapps.data.stream_writing import StreamPlan
from tasks.point_cloud.data import streams
from tasks.point_cloud.data.dataset import Scan, ScanDataset, collate_scans
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
from tasks.point_cloud.data.features import IN_DIM, Features
from tasks.point_cloud.data.inputs import scan_of
from tasks.point_cloud.data.labels import label_set
from tasks.point_cloud.data.scans import ScanArrays, load_scans, save_scans
from tasks.point_cloud.data.sources import PointSource
from tasks.point_cloud.data.transforms import Augmentation
from tasks.point_cloud.data.voting import Voting

log = logging.getLogger("moeapps")

_DEFAULT_AUGMENTATION = Augmentation()


class PointCloudData(DomainDataModule):
    """Labelled scans of several sensors; simulated domains are generated on first use and kept.

    Args:
        seen: domains that are trained on; None means the six simulated ones.
        validation: domains never trained on where every choice is made; None means drive16.
        unseen: domains that only ``test`` touches; None means rgbd_house and drive_front.
        own: domains that are read from files, by name; they also need a role.
        batch_size: crops per training step.
        data_seed: seed of the generated worlds; another one gives other scenes everywhere.
        train_scenes: generated training scenes per seen domain.
        val_scenes: generated validation scenes per domain.
        test_scenes: generated test scenes per domain.
        crops_per_scene: training crops of a scene per epoch.
        max_voxels: most voxels in a training crop or test tile.
        augment: random changes of training crops; None for none.
        features: ``common`` gives all domains one layout, ``paper`` the paper's two.
        voting: how often ``test`` and ``predict`` look at each tile; None for once (validation always looks once).
        options: further arguments of `DomainDataModule`; ``seed`` is that of crops, augmentation and order, and only
            the scans of the domains in ``predict`` are needed to predict.

    Raises:
        ValueError: an unknown domain, or a count below 1.
    """

    def __init__(
        self,
        *,
        seen: list[str] | None = None,
        validation: list[str] | None = None,
        unseen: list[str] | None = None,
        own: dict[str, PointSource] | None = None,
        batch_size: int = 6,
        data_seed: int = 0,
        train_scenes: int = 48,
        val_scenes: int = 6,
        test_scenes: int = 10,
        crops_per_scene: int = 2,
        max_voxels: int = 3000,
        augment: Augmentation | None = _DEFAULT_AUGMENTATION,
        features: Features = "common",
        voting: Voting | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            seen=list(SEEN) if seen is None else seen,
            validation=list(VALIDATION) if validation is None else validation,
            unseen=list(UNSEEN) if unseen is None else unseen,
            batch_size=batch_size,
            **options,
        )
        self.counts: dict[Split, int] = {"train": train_scenes, "val": val_scenes, "test": test_scenes}
        sizes = {f"{split}_scenes": count for split, count in self.counts.items()}
        for name, value in {**sizes, "crops_per_scene": crops_per_scene, "max_voxels": max_voxels}.items():
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed; use 1 or more")
        self.own = dict(own or {})
        self.data_seed, self.crops_per_scene, self.max_voxels = data_seed, crops_per_scene, max_voxels
        self.augment, self.features, self.voting = augment, features, voting
        for domain in self.domain_names:
            if domain not in DOMAINS and domain not in self.own:
                raise ValueError(
                    f"unknown domain {domain!r}; allowed: {', '.join([*DOMAINS, *self.own])}; or describe it in own"
                )
            source = self.own.get(domain)
            self.sources[domain] = source.describe() if source else f"simulated, data_seed {data_seed}"
            self.sources[domain] += f"; answered in {voting}" if voting else ""

    @property
    def facts(self) -> dict[str, Any]:
        """Domain names per role and in order, label sets, and the number of input channels."""
        names = self.domain_names
        sets = {name: self.own[name].label_set if name in self.own else label_set(name) for name in names}
        return {
            **super().facts,
            "domain_names": names,
            "label_sets": {name: list(words) for name, words in sets.items()},
            "in_dim": IN_DIM,
        }

    def available(self, domain: str) -> str | None:
        """Return why an optional domain is missing; a packaged one is fetched here.

        Raises:
            ValueError: a required domain is missing.
        """
        source = self.own.get(domain)
        reason = source.missing(self.cache_dir) if source else None
        if reason is not None and source is not None and not source.optional:
            raise ValueError(f"domain {domain!r} cannot be read: {reason}")
        return reason

    def prepare_data(self) -> None:
        """Generate the simulated scans that are not in the cache yet, with a progress bar.

        ``predict`` needs the test scans of its domains alone.
        """
        predicting = self.trainer is not None and self.trainer.state.fn == "predict"
        wanted: list[tuple[str, Split]] = [
            (domain, split)
            for domain in self.eval_domains("predict" if predicting else "test")
            if domain not in self.own
            for split in (SPLITS[2:] if predicting else self._splits(domain))
            if not self._path(domain, split).exists()
        ]
        if not wanted:
            return
        from rich.progress import Progress

        with Progress(transient=True) as progress:
            task = progress.add_task("generating scans", total=sum(self.counts[split] for _, split in wanted))
            for domain, split in wanted:
                progress.update(task, description=f"generating {domain} {split}")
                self._file(domain, split, lambda: progress.advance(task))

    def _splits(self, domain: str) -> tuple[Split, ...]:
        """The splits that a role can touch."""
        return {"seen": SPLITS, "validation": SPLITS[1:], "unseen": SPLITS[2:]}[self.role_of(domain)]

    def _path(self, domain: str, split: Split) -> Path:
        spec = DOMAINS[domain]
        key = config_hash([GENERATOR_VERSION, asdict(spec), split, self.counts[split], self.data_seed])
        return cache_dir("point_cloud", root=self.cache_dir) / f"{domain}-{split}-{key}.npz"

    def _file(self, domain: str, split: Split, advance: Callable[[], object] | None = None) -> Path:
        def write(path: Path) -> None:
            save_scans(path, generate_split(DOMAINS[domain], split, self.counts[split], self.data_seed, advance))

        return build_once(self._path(domain, split), write)

    def scans(self, domain: str, split: Split) -> list[ScanArrays]:
        """Return the raw scans of one domain and split.

        Raises:
            ValueError: unknown domain, or its files are missing or damaged.
        """
        self.role_of(domain)
        if domain in self.own:
            return self.own[domain].scans(split, self.cache_dir, domain)
        return load_scans(self._file(domain, split))

    def dataset(self, domain: str, split: Split) -> ScanDataset:
        """Return the crops (train) or tiles (val, test) of one domain."""
        view = self._view(domain, split)
        source = self.own.get(domain)
        if source is not None:
            return source.dataset(split, self.cache_dir, **view)
        return ScanDataset(self.scans(domain, split), **view)

    def batches_of(self, inputs: Any, *, like: str | None = None) -> list[Batch]:
        """Return the tiles of one scan, a batch each; see `scan_of`.

        Args:
            inputs: a file or arrays, in metres.
            like: the domain whose class names and voxels are used; None means the first seen one.

        Raises:
            ValueError: inputs that cannot be read, or an unknown domain.
        """
        domain = self.roles["seen"][0] if like is None else like
        self.role_of(domain)
        scan = scan_of(inputs, (self.own.get(domain) or DOMAINS[domain]).voxel)
        tiles = ScanDataset([scan], **self._view(domain, "test") | {"voting": None})
        return [self.collate([tiles[i]]) for i in range(len(tiles))]

    def _view(self, domain: str, split: Split) -> dict[str, Any]:
        """How scans of a domain become items."""
        about = self.own.get(domain) or DOMAINS[domain]
        return {
            "domain": domain,
            "label_set": self.facts["label_sets"][domain],
            "domain_index": self.domain_names.index(domain),
            "voxel": about.voxel,
            "max_voxels": self.max_voxels,
            "train": split == "train",
            "crops": self.crops_per_scene,
            "augmentation": self.augment,
            "features": self.features,
            "indoor": about.indoor,
            "seed": self.seed,
            "voting": self.voting if split == "test" else None,
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the mixed training loader, if there is anything to learn."""
        loader = super().train_dataloader()
        self._check_labels()
        return loader

    def follow(self, sampler: MixingSampler) -> None:
        """The epoch of the sampler decides which crops are cut."""
        for name in self.present("seen"):
            dataset = self.get_dataset(name, "train")
            assert isinstance(dataset, ScanDataset)
            dataset.clock = sampler

    def stream_plan(self) -> StreamPlan:
        """Say what ``moeapps data optimize`` writes: the scans of the domains that are read from files."""
        return streams.plan(self, self.own)

    def _check_labels(self) -> None:
        """Say which seen domains have no label in training; without any there is nothing to learn.

        Raises:
            ValueError: none of them has one.
        """
        names = self.present("seen")
        without = [name for name in names if cast(ScanDataset, self.get_dataset(name, "train")).num_labels() == 0]
        if without == names:
            raise ValueError(
                f"no training scan of {', '.join(names)} has a point with a known label, so nothing can be learned; "
                "look at the names of the classes, the ids to ignore and where the labels are read from"
            )
        for name in without:
            log.warning("domain %s (seen) has no known label in its training scans: it adds nothing to training", name)

    def collate(self, items: list[Scan]) -> Batch:
        """Join scans into one batch; it gains ``batch`` [N] and ``ptr`` [B + 1]."""
        return collate_scans(items)
