# SPDX-License-Identifier: Apache-2.0
"""Domains of images, given out as rows (to train experts) or as episodes (to train and test adaptation)."""

from __future__ import annotations

import logging
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from moeapps.data.domain import Split
from moeapps.data.mixing import DomainMixing
from moeapps.data.source import SourceDataModule
from tasks.adaptation.data.batch import Episode, EpisodeBatch, ImageBatch, ImageDataset
from tasks.adaptation.data.digits import DigitDomains
from tasks.adaptation.data.episodes import (
    EpisodeConcat,
    EpisodeSampler,
    EvaluationEpisodes,
    Protocol,
    episode_sizes,
    make_episode,
)
from tasks.adaptation.data.inputs import images_of, unlabelled
from tasks.adaptation.data.source import AdaptationSource

log = logging.getLogger("moeapps")

Mode = Literal["rows", "episodes"]


class AdaptationData(SourceDataModule):
    """Labelled images of many domains.

    A training step holds ``batch_size`` rows (`ImageBatch`), or ``episodes_per_step`` episodes (`EpisodeBatch`). An
    evaluation item is one episode of the loader's domain, or ``eval_batch_size`` rows of it.

    Args:
        source: the images; None means the generated ones of `DigitDomains`.
        mode: what training steps hold: rows or episodes.
        evaluation: what validation, tests and predictions go through: rows or episodes; None means as ``mode``.
        batch_size: rows per training step and process.
        mixing: how rows of different domains share batches: concat, balanced or one_domain.
        eval_batch_size: rows, or query images of an episode, per evaluation batch.
        support: images of a domain to adapt to.
        query: images per training episode that the adapted model answers.
        episodes_per_step: training episodes per step and process, each of another domain.
        steps_per_epoch: steps of an epoch of episodes; None means as many as use each seen image once on average.
        draws: how often an evaluation draws the support of a domain.
        protocol: disjoint, where the support is not answered; official: the first images are the support, once, and all
            images are answered.
        num_experts: groups of seen domains that get an expert each; None means one for each seen domain.
        options: further arguments of `SourceDataModule`.

    Raises:
        ValueError: a domain the source does not have, roles that overlap, fewer than two classes, more experts than
            seen domains, an unknown word, or a number below 1.
    """

    source: AdaptationSource

    def __init__(
        self,
        *,
        source: AdaptationSource | None = None,
        mode: Mode = "rows",
        evaluation: Mode | None = None,
        batch_size: int = 64,
        mixing: DomainMixing = "balanced",
        eval_batch_size: int = 512,
        support: int = 24,
        query: int = 32,
        episodes_per_step: int = 4,
        steps_per_epoch: int | None = None,
        draws: int = 5,
        protocol: Protocol = "disjoint",
        num_experts: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            source=source or DigitDomains(),
            batch_size=batch_size,
            mixing=mixing,
            eval_batch_size=eval_batch_size,
            **options,
        )
        _check_word("mode", mode, get_args(Mode))
        _check_word("evaluation", evaluation or mode, get_args(Mode))
        _check_word("protocol", protocol, get_args(Protocol))
        numbers = {"support": support, "query": query, "episodes_per_step": episodes_per_step, "draws": draws}
        for name, number in {**numbers, "steps_per_epoch": steps_per_epoch or 1}.items():
            if number < 1:
                raise ValueError(f"{name}={number} is not allowed; use 1 or more")
        self.mode, self.evaluation, self.protocol = mode, evaluation or mode, protocol
        self.support, self.query, self.draws = support, query, draws
        self.episodes_per_step, self.steps_per_epoch = episodes_per_step, steps_per_epoch
        self.groups = expert_groups(len(self.roles["seen"]), num_experts, self.seed)
        if self.source.target == "classification" and len(self.source.class_names) < 2:
            raise ValueError(
                f"the domains {self.domain_names} hold {len(self.source.class_names)} class "
                f"{self.source.class_names}; there is nothing to tell apart: give two classes or more"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """Domain names per role; target, num_classes (1 in regression), class_names, channels, image_size.

        ``augmented``: features of training images cannot be kept. ``num_experts`` and ``expert_of``: the number of the
        expert of each domain, -1 for those that are not seen.
        """
        others = len(self.domain_names) - len(self.groups)
        return {
            **super().facts,
            "target": self.source.target,
            "num_classes": len(self.source.class_names) if self.source.target == "classification" else 1,
            "class_names": self.source.class_names,
            "channels": self.source.channels,
            "image_size": self.source.image_size,
            "augmented": self.source.augmented,
            "num_experts": max(self.groups) + 1,
            "expert_of": [*self.groups, *[-1] * others],
        }

    @property
    def measured(self) -> bool:
        """Whether labels are measured values."""
        return self.source.target == "regression"

    @override
    def dataset(self, domain: str, split: Split) -> ImageDataset:
        dataset = self.source.dataset(domain, split, self.cache_dir)
        dataset.domain = self.domain_names.index(domain)
        return dataset

    def images(self, domain: str, split: Split, rows: Tensor | None = None) -> ImageBatch:
        """Return images of one domain and split as one batch; all of them where ``rows`` (int64) are not named."""
        dataset = cast(ImageDataset, self.get_dataset(domain, split))
        return dataset.batch(torch.arange(len(dataset)) if rows is None else rows)

    def batches_of(self, inputs: Any, *, support: Any = None) -> list[EpisodeBatch]:
        """Return an episode of a new domain: all images are answered; see `images_of`.

        Args:
            inputs: images of one domain, files or arrays.
            support: unlabelled images of it to adapt to; None means the first ones of ``inputs``, as many as in tests.

        Raises:
            ValueError: images that cannot be read.
        """
        size, channels, form = self.source.image_size, self.source.channels, getattr(self.source, "form", None)
        query = images_of(inputs, size, channels, form)
        seen = query[: self.support] if support is None else images_of(support, size, channels, form)
        seen_batch, query_batch = (unlabelled(part, -1, measured=self.measured) for part in (seen, query))
        return [EpisodeBatch((Episode(seen_batch, query_batch, domain=-1),))]

    def collate(self, items: Any) -> ImageBatch | EpisodeBatch:
        """Return the batch: rows and episodes come whole, except for single ones asked for one by one."""
        if isinstance(items, ImageBatch | EpisodeBatch):
            return items
        return EpisodeBatch.cat(items) if isinstance(items[0], EpisodeBatch) else ImageBatch.cat(items)

    @override
    def example_batch(self, num_items: int = 1) -> Any:
        if self.mode == "rows":
            return super().example_batch(num_items)
        parts, shares = self._trained()
        dataset, (support, query) = parts[0], shares[0]
        rows = torch.arange(support + query)
        return EpisodeBatch(
            (make_episode(dataset, rows[:support], rows[support:][:num_items], measured=self.measured),)
        )

    # Episodes -----------------------------------------------------------------------------------------------------

    def _trained(self) -> tuple[list[ImageDataset], list[tuple[int, int]]]:
        """Return the seen domains that episodes are made of, and the support and query size of each.

        Raises:
            ValueError: no domain has two training images.
        """
        parts = {name: cast(ImageDataset, self.get_dataset(name, "train")) for name in self.present("seen")}
        single = [name for name, part in parts.items() if len(part) == 1]
        if single and len(single) < len(parts):
            log.warning("domains of a single training image give no episode: %s", ", ".join(single))
            parts = {name: part for name, part in parts.items() if name not in single}
        shares = [
            episode_sizes(len(part), self.support, self.query, f"domain {name!r}") for name, part in parts.items()
        ]
        small = [name for name, own in zip(parts, shares, strict=True) if own != (self.support, self.query)]
        if small:
            log.info(
                "fewer than support=%d + query=%d training images, hence smaller episodes: %s",
                *(self.support, self.query, ", ".join(small)),
            )
        return list(parts.values()), shares

    @override
    def _training_loader(self) -> DataLoader[Any]:
        if self.mode == "rows":
            return super()._training_loader()
        parts, shares = self._trained()
        rank, world_size = self._place()
        per_step = self.episodes_per_step * world_size * (self.support + self.query)
        self._sampler = EpisodeSampler(
            [len(part) for part in parts],
            shares,
            self.episodes_per_step,
            self.steps_per_epoch or max(1, sum(len(part) for part in parts) // per_step),
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            repeat=self.trainer is not None and cast(Any, self.trainer).overfit_batches > 0,
        )
        if self._sampler_state is not None:
            self._sampler.load_state_dict(self._sampler_state)
        return self._loader(EpisodeConcat(parts, shares, measured=self.measured), self._sampler)

    def episodes(self, domain: str, split: Split) -> EvaluationEpisodes:
        """Return the episodes that a domain is evaluated by.

        Raises:
            ValueError: unknown domain.
        """
        return EvaluationEpisodes(
            cast(ImageDataset, self.get_dataset(domain, split)),
            support=self.support,
            draws=self.draws,
            most=self.eval_batch_size,
            domain=domain,
            seed=self.seed,
            protocol=self.protocol,
            measured=self.measured,
        )

    @override
    def evaluated(self, domain: str, split: Split) -> tuple[Dataset[Any], int]:
        return super().evaluated(domain, split) if self.evaluation == "rows" else (self.episodes(domain, split), 1)


def expert_groups(domains: int, experts: int | None, seed: int) -> list[int]:
    """Deal seen domains to experts at random; the groups differ in size by at most one.

    Args:
        domains: number of seen domains.
        experts: number of groups; None means one for each domain, in order.
        seed: seed of the choice.

    Returns:
        number of the expert of each domain.

    Raises:
        ValueError: less than one group, or more than domains.
    """
    if experts is None:
        return list(range(domains))
    if not 1 <= experts <= domains:
        raise ValueError(f"num_experts={experts} is not allowed; use 1 to {domains}, the number of seen domains")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(domains, generator=generator).tolist()
    group = [0] * domains
    for place, domain in enumerate(order):
        group[domain] = place * experts // domains
    return group


def _check_word(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name}={given!r} is not allowed; use one of {', '.join(allowed)}")
