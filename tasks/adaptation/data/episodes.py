# SPDX-License-Identifier: Apache-2.0
"""Which images make an episode: of training, drawn anew for each step, and of evaluation, always the same.

A domain that is too small for what was asked for gives smaller episodes, never an image of another domain.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from moeapps.data.cache import config_hash
from moeapps.data.mixing import MixingSampler, fold
from tasks.adaptation.data.batch import Episode, EpisodeBatch, ImageDataset

log = logging.getLogger("moeapps")

Protocol = Literal["disjoint", "official"]


def episode_sizes(images: int, support: int, query: int, where: str) -> tuple[int, int]:
    """Return the support and query size of an episode of a domain.

    They are the ones asked for where the domain has that many images; else all its images, shared in that proportion,
    at least one each.

    Args:
        images: number of images of the domain.
        support: support images asked for.
        query: query images asked for.
        where: the domain, for messages.

    Raises:
        ValueError: the domain has less than two images.
    """
    if images < 2:
        raise ValueError(
            f"{where} has {images} image; an episode needs one to adapt to and another to answer. Give it more, "
            "or take it out of the roles"
        )
    if images >= support + query:
        return support, query
    few = min(max(1, round(images * support / (support + query))), images - 1)
    return few, images - few


class EpisodeSampler(MixingSampler):
    """Training episodes: each step takes domains at random and, of each, disjoint support and query images.

    A step yields row numbers, episode by episode, support first; `EpisodeConcat` knows where one ends. No label plays a
    part. The order of an epoch is a function of (seed, epoch) alone; a step's domains differ, unless there are more
    episodes than domains. The processes of a run share the episodes of one global step, as for `MixingSampler`.

    Args:
        sizes: images per domain.
        shares: support and query size per domain, see `episode_sizes`.
        episodes: B, episodes per process and step.
        num_batches: steps of an epoch.
        seed: seed of all orders.
        rank: index of this process.
        world_size: number of processes.
        repeat: give the order of epoch 0 in every epoch.

    Raises:
        ValueError: as `MixingSampler`, or less than one step.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[tuple[int, int]],
        episodes: int,
        num_batches: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = False,
    ) -> None:
        super().__init__(sizes, episodes, seed=seed, rank=rank, world_size=world_size, repeat=repeat)
        if num_batches < 1:
            raise ValueError(f"num_batches={num_batches} is not allowed; use 1 or more steps per epoch")
        self.shares, self._num_batches = list(shares), num_batches

    @property
    @override
    def num_batches(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self.epoch, self.start
        offsets = self._offsets()
        for step in range(start, self.num_batches):
            # Each step has its own generator: a resumed run need not draw the steps before it.
            generator = torch.Generator().manual_seed(fold(fold(self.seed, 0 if self.repeat else epoch), step))
            domains: list[int] = []
            while len(domains) < self.batch_size * self.world_size:
                domains += torch.randperm(len(self.sizes), generator=generator).tolist()
            drawn = [
                (torch.randperm(self.sizes[d], generator=generator)[: sum(self.shares[d])] + offsets[d]).tolist()
                for d in domains[: self.batch_size * self.world_size]
            ]
            yield [row for rows in drawn[self.rank :: self.world_size] for row in rows]


class EpisodeConcat(Dataset[EpisodeBatch]):
    """Domains laid end to end, read an episode at a time; the labels of support images are not read at all.

    Args:
        parts: images of each domain.
        shares: support and query size of each.
        measured: labels are measured values.
    """

    def __init__(
        self, parts: Sequence[ImageDataset], shares: Sequence[tuple[int, int]], *, measured: bool = False
    ) -> None:
        self.parts, self.shares, self.measured = list(parts), list(shares), measured
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        """Return the number of images of all domains."""
        return int(self.ends[-1])

    def __getitems__(self, rows: Sequence[int]) -> EpisodeBatch:
        """Return the episodes of the rows that `EpisodeSampler` gave out for a step."""
        left = torch.as_tensor(rows, dtype=torch.int64)
        episodes = []
        while len(left):
            part = int(torch.searchsorted(self.ends, left[0], right=True))
            support, query = self.shares[part]
            own = left[: support + query] - (self.ends[part] - len(self.parts[part]))
            episodes.append(make_episode(self.parts[part], own[:support], own[support:], measured=self.measured))
            left = left[support + query :]
        return EpisodeBatch(tuple(episodes))


class EvaluationEpisodes(Dataset[EpisodeBatch]):
    """The episodes one domain is scored by: the support is drawn several times, every other image is answered.

    Item k is one episode: a draw, and a part of its query images no larger than ``most``. The draws are a function of
    (seed, domain, number of images) alone, the same for every model. A single image is both support and query.

    Args:
        dataset: images of the domain.
        support: S.
        draws: how often the support is drawn.
        most: query images of an item.
        domain: name of the domain, which the draws depend on.
        seed: seed of the draws.
        protocol: ``disjoint``, as above; ``official``, as the published code has it: the first S images are the support
            and ALL images are answered, once.
        measured: labels are measured values.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        support: int,
        draws: int,
        most: int,
        domain: str,
        seed: int = 0,
        protocol: Protocol = "disjoint",
        measured: bool = False,
    ) -> None:
        self.dataset, self.measured, self.official = dataset, measured, protocol == "official"
        count = len(dataset)
        if count == 1 and not self.official:
            log.warning("domain %s has a single image: it is adapted to and answered, as official does", domain)
            self.official = True
        # Where the support would leave nothing to answer, half of the images are support.
        self.support = count // 2 if count <= support and not self.official else min(support, count)
        self.draws, self.most = 1 if self.official else draws, most
        self._seed = [seed, domain, count]

    @property
    def parts(self) -> int:
        """Items of one draw."""
        return math.ceil((len(self.dataset) - (0 if self.official else self.support)) / self.most)

    def __len__(self) -> int:
        return self.draws * self.parts

    def rows(self, draw: int) -> tuple[Tensor, Tensor]:
        """Return the support rows, int64 [S], and all query rows, int64 [Q], of a draw."""
        count = len(self.dataset)
        if self.official:
            return torch.arange(self.support), torch.arange(count)
        generator = torch.Generator().manual_seed(int(config_hash([*self._seed, draw]), 16))
        order = torch.randperm(count, generator=generator)
        return order[: self.support], order[self.support :].sort().values

    def __getitem__(self, index: int) -> EpisodeBatch:
        """Return one item as a batch of one episode.

        Raises:
            IndexError: no such item.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        draw, part = divmod(index, self.parts)
        support, query = self.rows(draw)
        some = query[part * self.most : (part + 1) * self.most]
        return EpisodeBatch((make_episode(self.dataset, support, some, measured=self.measured, draw=draw),))


def make_episode(
    dataset: ImageDataset, support: Tensor, query: Tensor, *, measured: bool = False, draw: int = 0
) -> Episode:
    """Return the episode of int64 rows [S] and [Q] of one domain; support labels are not read."""
    unseen = dataset.unlabelled(support, measured=measured)
    return Episode(unseen, dataset.batch(query), dataset.domain, draw)
