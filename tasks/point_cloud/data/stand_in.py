# SPDX-License-Identifier: Apache-2.0
"""Minimal stand-in for the suite's data module base until it lands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import ConcatDataset, DataLoader


class MixingSampler(torch.utils.data.Sampler[list[int]]):
    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 0
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.size // self.batch_size)

    def __iter__(self) -> Any:
        order = torch.randperm(
            self.size, generator=torch.Generator().manual_seed(self.seed * 1000 + self.epoch)
        ).tolist()
        for i in range(len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size]


class DomainDataModule(L.LightningDataModule):
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
        mixing: str = "concat",
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.roles = {"seen": seen, "validation": validation, "unseen": unseen}
        self.batch_size, self.num_workers, self.seed, self.cache_dir = batch_size, num_workers, seed, cache_dir
        self.eval_batch_size = eval_batch_size or batch_size
        self.sources: dict[str, str] = {}
        self._datasets: dict[Any, Any] = {}
        self._sampler: MixingSampler | None = None

    @property
    def domain_names(self) -> list[str]:
        return [n for names in self.roles.values() for n in names]

    @property
    def facts(self) -> dict[str, Any]:
        return {"domains": {role: list(names) for role, names in self.roles.items()}}

    def available(self, domain: str) -> str | None:
        return None

    def dataset(self, domain: str, split: Any) -> Any:
        raise TypeError

    def collate(self, items: list[Any]) -> Any:
        raise TypeError

    def get_dataset(self, domain: str, split: Any) -> Any:
        if (domain, split) not in self._datasets:
            self._datasets[domain, split] = self.dataset(domain, split)
        return self._datasets[domain, split]

    def present(self, role: str) -> list[str]:
        return [n for n in self.roles[role] if self.available(n) is None]

    def role_of(self, domain: str) -> str:
        return next(r for r, names in self.roles.items() if domain in names)

    def eval_domains(self, stage: str) -> list[str]:
        roles = ("seen", "validation") if stage == "val" else ("seen", "validation", "unseen")
        return [n for r in roles for n in self.present(r)]

    def example_batch(self, num_items: int = 1) -> Any:
        dataset = self.get_dataset(self.present("seen")[0], "train")
        return self.collate([dataset[i] for i in range(num_items)])

    def train_dataloader(self) -> Any:
        parts = [self.get_dataset(n, "train") for n in self.present("seen")]
        data: Any = ConcatDataset(parts)
        self._sampler = MixingSampler(len(data), self.batch_size, self.seed)
        return DataLoader(data, batch_sampler=self._sampler, collate_fn=self.collate, num_workers=self.num_workers)

    def _eval(self, split: str) -> Any:
        return [
            DataLoader(self.get_dataset(n, split), batch_size=self.eval_batch_size, collate_fn=self.collate)
            for n in self.eval_domains(split)
        ]

    def val_dataloader(self) -> Any:
        return self._eval("val")

    def test_dataloader(self) -> Any:
        return self._eval("test")
