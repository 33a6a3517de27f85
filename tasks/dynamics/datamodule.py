# SPDX-License-Identifier: Apache-2.0
"""Environments of dynamical systems as domains: every training batch holds all environments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from typing_extensions import override

from moeapps.data.cache import config_hash
from moeapps.data.domain import DomainDataModule, Split
from moeapps.data.gather import BatchDataset
from moeapps.data.mixing import MixingSampler
from tasks.dynamics.data.batch import Trajectories, collate_environments, form_of, join_environments
from tasks.dynamics.data.families import OdeFamilies
from tasks.dynamics.data.inputs import environment_of
from tasks.dynamics.data.source import DynamicsSource


class DynamicsData(DomainDataModule):
    """Trajectories of environments; a batch holds all environments at once, or some of them.

    Domains that are seen give ``train``, ``val`` and ``test`` trajectories of the environments that are trained on; all
    other domains give new environments with support and query trajectories. Environments are numbered in an order
    drawn from ``seed``, so that neither number nor place reveals the family.

    Args:
        source: where the environments come from; None means the generated families of `OdeFamilies`.
        seen: domains that are trained on; None means the source's own.
        validation: domains never trained on where every choice is made; None means the source's own.
        unseen: domains that only ``test`` touches; None means the source's own.
        batch_size: environments per training step and process; None means all.
        steps_per_epoch: training batches of an epoch.
        num_workers: loader processes; 0 loads in the training process.
        seed: seed of the numbering and of the choice of environments in smaller batches.
        cache_dir: folder for generated and fetched data; None means $MOEAPPS_CACHE or ~/.cache/moeapps.

    Raises:
        ValueError: an unknown domain, a count below 1, or an environment trained on under two domains.
    """

    def __init__(
        self,
        *,
        source: DynamicsSource | None = None,
        seen: list[str] | None = None,
        validation: list[str] | None = None,
        unseen: list[str] | None = None,
        batch_size: int | None = None,
        steps_per_epoch: int = 10,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: Path | None = None,
    ) -> None:
        source = OdeFamilies() if source is None else source
        super().__init__(
            seen=list(source.default_seen) if seen is None else seen,
            validation=list(source.default_validation) if validation is None else validation,
            unseen=list(source.default_unseen) if unseen is None else unseen,
            batch_size=_EVERY if batch_size is None else batch_size,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir,
            eval_batch_size=_EVERY,
        )
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch={steps_per_epoch} is not allowed; use 1 or more")
        self.source = source
        source.cache = cache_dir
        self.steps_per_epoch = steps_per_epoch
        self._tensors: dict[tuple[str, Split], Trajectories] = {}
        for domain in self.domain_names:
            source.environments(domain, self.roles["seen"])  # says what is wrong with a name
            self.sources[domain] = source.describe(domain)

    @property
    def facts(self) -> dict[str, Any]:
        """Numbers and names of the environments, families, state size, samples, and the kind of model."""
        names = self.environment_names
        return {
            **super().facts,
            "num_environments": len(names),
            "environments": names,
            "state_dim": self.source.state_dim,
            "num_steps": self.source.num_steps,
            "families": self.source.families(self.roles["seen"]),
            "kind": self.source.kind,
        }

    @property
    def environment_names(self) -> list[str]:
        """Names of the trained environments in the order of their numbers."""
        return [name for _, name in sorted(self._numbers(), key=lambda pair: pair[0])]

    def names_of(self, env: Tensor, domain: str) -> list[str]:
        """Return the names of the environments of a batch of a domain; new ones are taken to be all of them."""
        if domain in self.roles["seen"]:
            names = self.environment_names
            return [names[number] for number in env.tolist()]
        return self.source.environments(domain, self.roles["seen"])

    def _numbers(self) -> list[tuple[int, str]]:
        """Number and name of every trained environment, domain by domain."""
        seen = self.roles["seen"]
        names = [name for domain in seen for name in self.source.environments(domain, seen)]
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return list(zip(order, names, strict=True))

    def _numbers_of(self, domain: str) -> list[int]:
        seen = self.roles["seen"]
        if domain not in seen:
            return [-1] * len(self.source.environments(domain, seen))
        start = sum(len(self.source.environments(earlier, seen)) for earlier in seen[: seen.index(domain)])
        count = len(self.source.environments(domain, seen))
        return [number for number, _ in self._numbers()[start : start + count]]

    @override
    def prepare_data(self) -> None:
        self.source.prepare(self.eval_domains("test"), self.roles["seen"])

    def trajectories(self, domain: str, split: Split) -> Trajectories:
        """Return all environments of one domain and split as one batch.

        Raises:
            ValueError: unknown domain, or a split its role does not have.
        """
        self.role_of(domain)
        if (domain, split) not in self._tensors:
            seen = self.roles["seen"]
            data = self.source.load(domain, split, seen)
            if self.source.kind == "field":
                data = data.require_initial_conditions()
            self._tensors[domain, split] = data.trajectories(self._numbers_of(domain), self.source.families(seen))
        return self._tensors[domain, split]

    def batches_of(
        self, inputs: Any, *, dt: float | None = None, start: Any = None, steps: int | None = None
    ) -> list[tuple[Trajectories, int]]:
        """Return a new environment to adapt to and to roll out, and the samples wanted; see `environment_of`."""
        return [environment_of(inputs, int(self.source.state_dim), dt=dt, start=start, steps=steps)]

    def dataset(self, domain: str, split: Split) -> Dataset[Trajectories]:
        """Return the environments of one domain and split, one per item."""
        return Environments(self.trajectories(domain, split))

    def collate(self, items: list[Trajectories] | Trajectories) -> Trajectories:
        """Join environments in the order of their numbers; what a data set made whole has that order."""
        return items if isinstance(items, Trajectories) else collate_environments(items)

    def _training_loader(self) -> DataLoader[Any]:
        """Return the loader of ``steps_per_epoch`` batches of all environments (or of ``batch_size`` drawn ones)."""
        parts = [self.get_dataset(name, "train") for name in self.present("seen")]
        rank, world_size = self._place()
        sizes = [len(cast(Environments, part)) for part in parts]
        self._sampler = EnvironmentSampler(
            sizes, self.batch_size, self.steps_per_epoch, seed=self.seed, rank=rank, world_size=world_size
        )
        if self._sampler_state is not None:
            self._sampler.load_state_dict(self._sampler_state)
        wholes = [part.whole for part in parts if isinstance(part, Environments)]
        one = len(wholes) == len(parts) and len({form_of(whole) for whole in wholes}) == 1
        return self._loader(Environments(*wholes) if one else ConcatDataset(parts), self._sampler)


_EVERY = 1 << 20
"""A batch size that no set of environments reaches."""


class Environments(BatchDataset):
    """Environments one per item; a batch of them is one index into each tensor, in the order of their numbers.

    Args:
        parts: batches of one form, laid end to end.
    """

    def __init__(self, *parts: Trajectories) -> None:
        self.whole = parts[0] if len(parts) == 1 else join_environments(parts)
        # Environments without a mask of their own make batches without one, whatever others have.
        counts = torch.tensor([len(part.x) for part in parts])
        self._masked_S = torch.tensor([part.mask is not None for part in parts]).repeat_interleave(counts)

    def __len__(self) -> int:
        return len(self.whole.x)

    @override
    def batch(self, rows: Tensor) -> Trajectories:
        rows = rows[self.whole.env[rows].argsort(stable=True)]
        found = self.whole.environments(rows)
        return found if bool(self._masked_S[rows].any()) else replace(found, mask=None)


class EnvironmentSampler(MixingSampler):
    """Batches that each hold every environment, or ``batch_size`` of them drawn anew for each step.

    The processes of a run share one global batch, as for `MixingSampler`.

    Args:
        sizes: environments per domain.
        batch_size: environments per process and step; more than there are means all.
        num_batches: steps of an epoch.
        options: see `MixingSampler`.
    """

    def __init__(self, sizes: list[int], batch_size: int, num_batches: int, **options: Any) -> None:
        super().__init__(sizes, batch_size, **options)
        self._num_batches = num_batches

    @property
    @override
    def num_batches(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self.epoch, self.start
        generator = torch.Generator().manual_seed(int(config_hash([self.seed, epoch]), 16))
        for step in range(self.num_batches):
            order: Tensor = torch.randperm(sum(self.sizes), generator=generator)
            share = min(self.batch_size * self.world_size, len(order)) // self.world_size * self.world_size
            if step >= start:
                yield order[:share][self.rank :: self.world_size].tolist()
