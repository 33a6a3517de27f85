# SPDX-License-Identifier: Apache-2.0
"""Which rows make a batch: seedable, stateful batch samplers over several domains.

The order of an epoch is a function of (seed, epoch) alone. Under ``world_size`` processes every step draws ONE global
batch of ``batch_size * world_size`` rows and process ``rank`` takes its own slice, so that W processes with batch B see
exactly the rows that one process with batch W * B sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Sampler

DomainMixing = Literal["concat", "balanced", "one_domain"]


class MixingSampler(Sampler[list[int]]):
    """Batch sampler over the concatenation of several domains.

    Row indices count through the domains in order: domain ``d`` owns ``offset_d .. offset_d + sizes[d] - 1``.

    Modes:
        ``concat``: one permutation of all rows; a domain appears in proportion to its size.
        ``balanced``: every run of S consecutive rows holds each of the S domains once; small domains repeat, large ones
        are cut. An epoch still has ``sum(sizes)`` rows.
        ``one_domain``: each global batch holds rows of one domain; the order of the batches is shuffled.

    The last incomplete global batch of an epoch (of a domain, for ``one_domain``) is dropped unless it is the only one.

    Args:
        sizes: rows per domain, each >= 1.
        batch_size: rows per process and step, >= 1.
        mode: how rows of different domains share batches.
        seed: seed of all orders.
        rank: index of this process, in [0, world_size).
        world_size: number of processes.
        repeat: give the order of epoch 0 in every epoch (for overfitting a few batches on purpose).

    Raises:
        ValueError: unknown mode, no domain, an empty domain, batch_size < 1, rank outside [0, world_size), or fewer
            rows than processes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        *,
        mode: DomainMixing = "concat",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = False,
    ) -> None:
        if mode not in get_args(DomainMixing):
            raise ValueError(f"mixing={mode!r} is unknown; use one of {', '.join(get_args(DomainMixing))}")
        if not sizes or min(sizes) < 1:
            raise ValueError(f"domain sizes {list(sizes)} hold an empty domain; every domain needs at least one row")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not allowed; use 1 or more rows per step")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} lies outside [0, {world_size}); give the index of this process")
        smallest = min(sizes) if mode == "one_domain" else sum(sizes)
        if smallest < world_size:
            raise ValueError(f"{smallest} rows cannot be shared by {world_size} processes; use fewer devices")
        self.sizes = list(sizes)
        self.batch_size = batch_size
        self.mode = mode
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeat = repeat
        self.epoch = 0
        self.start = 0

    @property
    def sampler(self) -> MixingSampler:
        """This object: Lightning looks here for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of epoch ``epoch``; a start position left by a resumed run holds for its epoch only."""
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the first step to give out."""
        return {"epoch": self.epoch, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with epoch ``state["epoch"]`` at step ``state["start"]``."""
        self.epoch = int(state["epoch"])
        self.start = int(state.get("start", 0))

    @property
    def num_batches(self) -> int:
        """Steps of one whole epoch, the same on every process."""
        step = self.batch_size * self.world_size
        if self.mode == "one_domain":
            return sum(max(1, size // step) for size in self.sizes)
        return max(1, sum(self.sizes) // step)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = self.epoch, self.start
        generator = torch.Generator().manual_seed(fold(self.seed, 0 if self.repeat else epoch))
        batches = self._one_domain(generator) if self.mode == "one_domain" else self._mixed(generator)
        for step, batch in enumerate(batches):
            if step >= start:
                yield batch[self.rank :: self.world_size]

    def _offsets(self) -> list[int]:
        return [sum(self.sizes[:i]) for i in range(len(self.sizes))]

    def _cut(self, order: Tensor) -> list[list[int]]:
        """Cut an order of rows into whole global batches; a lone short one is cut to equal shares per process."""
        step = self.batch_size * self.world_size
        if len(order) < step:
            return [order[: len(order) // self.world_size * self.world_size].tolist()]
        return order[: len(order) // step * step].reshape(-1, step).tolist()

    def _mixed(self, generator: torch.Generator) -> list[list[int]]:
        if self.mode == "concat":
            return self._cut(torch.randperm(sum(self.sizes), generator=generator))
        num_domains, total = len(self.sizes), sum(self.sizes)
        rounds = math.ceil(total / num_domains)
        rows = torch.stack(
            [_stream(n, rounds, generator) + offset for n, offset in zip(self.sizes, self._offsets(), strict=True)],
            dim=1,
        )  # (rounds, S)
        turn = torch.rand(rounds, num_domains, generator=generator).argsort(dim=1)
        return self._cut(rows.gather(1, turn).flatten()[:total])

    def _one_domain(self, generator: torch.Generator) -> list[list[int]]:
        batches = []
        for size, offset in zip(self.sizes, self._offsets(), strict=True):
            batches += self._cut(torch.randperm(size, generator=generator) + offset)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class ShardedBatches(Sampler[list[int]]):
    """Evaluation order: rows 0..n-1 in order, whole batches dealt to the processes in turn.

    Every process gives out the same number of batches, because a collective inside a forward pass would otherwise wait
    for ever. A process that has run out repeats batch 0; such a batch is PADDING (``is_padding``) and not counted.

    Args:
        size: number of rows, >= 1.
        batch_size: rows per batch, >= 1.
        rank: index of this process, in [0, world_size).
        world_size: number of processes.
    """

    def __init__(self, size: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.size = size
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Return the number of batches of each process, padding included."""
        return math.ceil(math.ceil(self.size / self.batch_size) / self.world_size)

    def is_padding(self, batch_idx: int) -> bool:
        """Return whether batch ``batch_idx`` of this process only keeps step with the others."""
        return (batch_idx * self.world_size + self.rank) * self.batch_size >= self.size

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(len(self)):
            first = 0 if self.is_padding(i) else (i * self.world_size + self.rank) * self.batch_size
            yield list(range(first, min(first + self.batch_size, self.size)))


def _stream(size: int, length: int, generator: torch.Generator) -> Tensor:
    """``length`` row numbers out of permutation after permutation of ``size`` rows."""
    return torch.cat([torch.randperm(size, generator=generator) for _ in range(math.ceil(length / size))])[:length]


def fold(seed: int, epoch: int) -> int:
    """One 63-bit seed out of two numbers (an odd multiplier spreads neighbouring epochs)."""
    return (seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) % (1 << 63)
