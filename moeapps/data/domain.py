# SPDX-License-Identifier: Apache-2.0
"""The data side of every task: named domains in three disjoint roles.

A domain is a named source of data: a sensor, a language, a population, an ODE family, an image style. ``seen`` domains
are trained on; ``validation`` domains are never trained on and every choice is made there; ``unseen`` domains are
touched by ``test`` only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset, IterableDataset

from moeapps.data.gather import GatherConcat
from moeapps.data.mixed_windows import sampler_of
from moeapps.data.mixing import DomainMixing, MixingSampler, ShardedBatches
from moeapps.data.workers import Collate

Role = Literal["seen", "validation", "unseen"]
Split = Literal["train", "val", "test"]
ROLES: tuple[Role, ...] = ("seen", "validation", "unseen")
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLITS_OF: dict[Role, tuple[Split, ...]] = {"seen": SPLITS, "validation": SPLITS[1:], "unseen": SPLITS[2:]}
"""What a run may read of a domain of each role, where nothing is ever trained on the others."""
STAGE_ROLES: dict[str, tuple[Role, ...]] = {"val": ("seen", "validation"), "test": ROLES}
# These words name means over domains in the metric keys, so no domain may carry them.
RESERVED = frozenset({*ROLES, "gap", "aux"})

log = logging.getLogger("moeapps")


class ResumableLoader(DataLoader[Any]):
    """A loader that tells Lightning that it can resume in the middle of an epoch.

    Lightning asks the loader; the state itself is kept by the data module, which also knows how many of the
    batches given out were trained on.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: see ``DomainDataModule.state_dict``."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing: the sampler was set by the data module."""


class DomainDataModule(L.LightningDataModule):
    """Base class of all data modules: three roles of domains, one loader per domain for evaluation.

    A subclass provides ``dataset`` and ``collate``, may extend ``facts`` and may name missing optional domains in
    ``available``. The base builds the loaders, shares rows between processes and remembers its place for a resumed run.

    Args:
        seen: names of the domains that are trained on; at least one.
        validation: names of the domains never trained on where every choice is made.
        unseen: names of the domains that only ``test`` touches.
        batch_size: items per step and process.
        num_workers: loader processes; 0 loads in the training process.
        seed: seed of the order of the training rows.
        cache_dir: folder for generated and downloaded data; None means $MOEAPPS_CACHE or ~/.cache/moeapps.
        mixing: how training batches mix domains: concat (in proportion to size), balanced (each domain equally often)
            or one_domain (each batch from one domain).
        eval_batch_size: items per evaluation batch and process; None means batch_size.
        predict: names of the domains that ``predict`` answers, of any role; None means all.

    Raises:
        ValueError: a domain in two roles or twice in one, a reserved or malformed name, no seen domain, a size below 1,
            a domain to predict that has no role or is given twice.
    """

    def __init__(
        self,
        *,
        seen: list[str],
        validation: list[str],
        unseen: list[str],
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: Path | None = None,
        mixing: DomainMixing = "concat",
        eval_batch_size: int | None = None,
        predict: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.roles: dict[Role, list[str]] = {"seen": list(seen), "validation": list(validation), "unseen": list(unseen)}
        _check_roles(self.roles)
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError(f"batch_size={batch_size}, eval_batch_size={eval_batch_size}; both must be 1 or more")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}; use 0 (this process loads) or a number of processes")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = cache_dir
        self.mixing: DomainMixing = mixing
        self.predicted = None if predict is None else list(predict)
        _check_predicted(self.predicted, self.domain_names)
        self.sources: dict[str, str] = {}
        self._missing: dict[str, str] | None = None
        self._datasets: dict[tuple[str, Split], Dataset[Any]] = {}
        self._sampler: MixingSampler | None = None
        self._sampler_state: dict[str, Any] | None = None
        self._worker_seeds = torch.Generator().manual_seed(seed)

    # What a subclass provides -------------------------------------------------------------------------------------

    def dataset(self, domain: str, split: Split) -> Dataset[Any]:
        """Return the map-style data set of one domain and split; called once per process, its result is kept."""
        raise ValueError(f"{type(self).__name__} must define dataset(domain, split)")

    def collate(self, items: list[Any]) -> Any:
        """Make a batch of items; the default is torch's."""
        return torch.utils.data.default_collate(items)

    def available(self, domain: str) -> str | None:
        """Return why an OPTIONAL domain is missing on this machine, or None where it is there or is required."""
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values that the model needs, known without ``setup``; a subclass adds to this dictionary."""
        return {"domains": {role: list(names) for role, names in self.roles.items()}}

    # Raw inputs ---------------------------------------------------------------------------------------------------

    def batches_of(self, inputs: Any) -> list[Any]:
        """Return batches of raw inputs, a file or arrays; a subclass says which and may take options.

        Raises:
            ValueError: inputs that cannot be read.
        """
        raise ValueError(
            f"{type(self).__name__} does not say how raw inputs become batches: define batches_of(inputs) there, or "
            "use `moeapps predict --run ...` with data in its roles"
        )

    def save_parts(self, folder: Path) -> list[str]:
        """Write what inputs need besides the network (a fitted tokenizer), and return the names of the files."""
        return []

    def load_parts(self, folder: Path) -> None:
        """Read what ``save_parts`` wrote, if it is there."""

    # Domains ------------------------------------------------------------------------------------------------------

    @property
    def domain_names(self) -> list[str]:
        """All configured domains: seen, then validation, then unseen."""
        return [name for role in ROLES for name in self.roles[role]]

    @property
    def missing(self) -> dict[str, str]:
        """Optional domains that are not on this machine, with the reason; each is announced by one line."""
        if self._missing is None:
            reasons = {name: self.available(name) for name in self.domain_names}
            self._missing = {name: reason for name, reason in reasons.items() if reason is not None}
            for name, reason in self._missing.items():
                log.info("domain %s (%s) is left out: %s", name, self.role_of(name), reason)
            if not self.present("seen"):
                raise ValueError(
                    f"no seen domain is left: {self._missing}; provide one of {self.roles['seen']} or name others"
                )
        return self._missing

    def present(self, role: Role) -> list[str]:
        """Return the domains of a role that are on this machine, in configured order."""
        missing = self.missing if self._missing is None else self._missing
        return [name for name in self.roles[role] if name not in missing]

    def eval_domains(self, stage: str) -> list[str]:
        """Return the domains of the loaders of a stage, in order.

        Args:
            stage: ``val`` (seen, validation) or ``test`` (seen, validation, unseen); ``predict``: those named for it,
                else as ``test``.

        Raises:
            ValueError: none of the domains to predict is on this machine.
        """
        if stage == "predict" and self.predicted is not None:
            missing = self.missing
            names = [name for name in self.predicted if name not in missing]
            if not names:
                raise ValueError(f"predict={self.predicted} leaves nothing to predict: {missing}; name others")
            return names
        return [name for role in STAGE_ROLES["val" if stage == "val" else "test"] for name in self.present(role)]

    def role_of(self, domain: str) -> Role:
        """Return the role of a domain.

        Raises:
            ValueError: the domain is not configured.
        """
        for role in ROLES:
            if domain in self.roles[role]:
                return role
        raise ValueError(f"unknown domain {domain!r}; the configured ones are {', '.join(self.domain_names)}")

    def get_dataset(self, domain: str, split: Split) -> Dataset[Any]:
        """Return the kept data set of one domain and split, built on first use.

        Raises:
            ValueError: unknown domain, or the data set is empty or has no length.
        """
        self.role_of(domain)
        if (domain, split) not in self._datasets:
            dataset = self.dataset(domain, split)
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
                raise ValueError(
                    f"{type(self).__name__}.dataset({domain!r}, {split!r}) gave {type(dataset).__name__}, which has no "
                    "length; give a data set with __len__ and __getitem__: batches are mixed and resumed by row number"
                )
            if len(cast(Sized, dataset)) == 0:
                raise ValueError(f"domain {domain!r} has no {split} item; give it data or take it out of the roles")
            self._datasets[domain, split] = dataset
        return self._datasets[domain, split]

    def example_batch(self, num_items: int = 1) -> Any:
        """Return a batch of the first training items of the first seen domain, the same at every call.

        The global random states are left as they were.
        """
        dataset = self.get_dataset(self.present("seen")[0], "train")
        with isolate_rng():
            torch.manual_seed(self.seed)
            return self.collate([dataset[i] for i in range(min(num_items, len(cast(Sized, dataset))))])

    def first_training_batch(self) -> Any:
        """Return this process's first batch of the first epoch, drawn apart from the order and states of training."""
        sampler, state = self._sampler, self._sampler_state
        self._sampler_state = None
        try:
            with isolate_rng():
                torch.manual_seed(self.seed)
                loader = self._training_loader()
                rows = next(iter(cast(Any, loader.batch_sampler)))
                alone: Any = DataLoader(
                    loader.dataset,
                    batch_sampler=[rows],
                    collate_fn=loader.collate_fn,
                    generator=torch.Generator().manual_seed(self.seed),
                )
                return next(iter(alone))
        finally:
            self._sampler, self._sampler_state = sampler, state
            if sampler is not None:
                self.follow(sampler)

    # Loaders ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader over all seen domains, mixed as ``mixing`` says."""
        return self._training_loader()

    def _training_loader(self) -> DataLoader[Any]:
        """Build it; a subclass with another order of training overrides this."""
        parts = [self.get_dataset(name, "train") for name in self.present("seen")]
        repeat = self.trainer is not None and cast(Any, self.trainer).overfit_batches > 0
        self._sampler = self.train_sampler(parts, *self._place(), repeat=repeat)
        if self._sampler_state is not None:
            self._sampler.load_state_dict(self._sampler_state)
        self.follow(self._sampler)
        return self._loader(GatherConcat(parts), self._sampler)

    def follow(self, sampler: MixingSampler) -> None:
        """Let training items that change with the epoch read it off the sampler of the run; by default none does."""

    def train_sampler(
        self, parts: list[Dataset[Any]], rank: int, world_size: int, *, repeat: bool = False
    ) -> MixingSampler:
        """Return what decides the rows of each training batch; a subclass may read files in another order.

        Args:
            parts: training data sets of the seen domains, laid end to end.
            rank: index of this process.
            world_size: number of processes.
            repeat: give the same order in every epoch.
        """
        options: dict[str, Any] = {"rank": rank, "world_size": world_size, "repeat": repeat}
        return sampler_of(parts, self.batch_size, mode=self.mixing, seed=self.seed, **options)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader per seen and validation domain."""
        return self._eval_loaders("val")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader per domain of all roles."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader per domain that is predicted, over its test split."""
        return self._eval_loaders("predict")

    def is_padding(self, stage: str, loader_idx: int, batch_idx: int) -> bool:
        """Return whether an evaluation batch is padding, which keeps processes in step."""
        if self._place()[1] == 1:
            return False
        name = self.eval_domains(stage)[loader_idx]
        return self._shard(*self.evaluated(name, "val" if stage == "val" else "test")).is_padding(batch_idx)

    def evaluated(self, domain: str, split: Split) -> tuple[Dataset[Any], int]:
        """Return what a domain is evaluated by, and how many of its items make a batch; some read episodes."""
        return self.get_dataset(domain, split), self.eval_batch_size

    def _eval_loaders(self, stage: str) -> list[DataLoader[Any]]:
        parts = [self.evaluated(name, "val" if stage == "val" else "test") for name in self.eval_domains(stage)]
        return [self._loader(dataset, self._shard(dataset, size)) for dataset, size in parts]

    def _shard(self, dataset: Dataset[Any], batch_size: int) -> ShardedBatches:
        rank, world_size = self._place()
        return ShardedBatches(len(cast(Sized, dataset)), batch_size, rank=rank, world_size=world_size)

    def _loader(self, dataset: Dataset[Any], batches: MixingSampler | ShardedBatches) -> DataLoader[Any]:
        train = isinstance(batches, MixingSampler)
        # An own generator: creating an iterator would otherwise draw from the global random state.
        return (ResumableLoader if train else DataLoader)(
            dataset,
            batch_sampler=batches,
            collate_fn=Collate(self),
            num_workers=self.num_workers,
            generator=self._worker_seeds if train else torch.Generator().manual_seed(self.seed),
        )

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    # Resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training order: the next epoch, or this one and its finished steps."""
        epoch, start = 0, 0
        if self._sampler is not None and self.trainer is not None:
            progress = cast(Any, self.trainer.fit_loop.epoch_loop.batch_progress)
            # "processed" counts the steps whose gradients are in the weights; "completed" lags while hooks run.
            done = progress.current.processed
            over = progress.is_last_batch or done >= self.trainer.num_training_batches
            epoch, start = (self._sampler.epoch + 1, 0) if over else (self._sampler.epoch, done)
        return {"sampler": {"epoch": epoch, "start": start}, "worker_seeds": self._worker_seeds.get_state()}

    def check_trained_on(self, state_dict: dict[str, Any]) -> None:
        """Refuse weights to which the numbers of this data would mean something else (other codes, another order).

        Args:
            state_dict: of the data module that they were trained with; empty where the checkpoint has none.

        Raises:
            ValueError: they would; by default nothing is refused.
        """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at the position that ``state_dict`` returned."""
        self.check_trained_on(state_dict)
        self._sampler_state = dict(state_dict["sampler"])
        self._worker_seeds.set_state(state_dict["worker_seeds"])


def _check_roles(roles: dict[Role, Sequence[str]] | dict[Role, list[str]]) -> None:
    """Raise ValueError unless the roles are disjoint lists of usable names with at least one seen domain."""
    where: dict[str, Role] = {}
    for role, names in roles.items():
        for name in names:
            if name in where:
                raise ValueError(
                    f"domain {name!r} is given as {where[name]} and as {role}; a domain has exactly one role"
                )
            if name in RESERVED or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(
                    f"domain name {name!r} is not allowed; use letters, digits, _ and -, and none of {sorted(RESERVED)}"
                )
            where[name] = role
    if not roles["seen"]:
        raise ValueError("seen=[] leaves nothing to train on; name at least one domain")


def _check_predicted(predicted: Sequence[str] | None, configured: Sequence[str]) -> None:
    """Raise ValueError unless the domains to predict are some of the configured ones, each once."""
    if predicted is None:
        return
    wrong = [name for name in predicted if name not in configured or list(predicted).count(name) > 1]
    if wrong or not predicted:
        allowed = ", ".join(configured)
        raise ValueError(f"predict={list(predicted)}; allowed is null or a list of different domains of: {allowed}")
