# SPDX-License-Identifier: Apache-2.0
"""Loader workers that begin from nothing (``spawn``) give the batches that the training process would make itself."""

from __future__ import annotations

import io
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from moeapps.commands.run import Cli, import_tasks
from moeapps.data.workers import Collate
from tests.systems import BASES, name, tiny
from tests.toy import ToyData


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors inside a batch, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    stored = vars(value) if hasattr(value, "__dict__") else {}
    stored = stored.get("_store", stored)  # a batch of torch-geometric
    return [tensor for item in dict(stored).values() for tensor in tensors(item)]


def first_batches(loader: DataLoader[Any]) -> tuple[Any, Any]:
    """The first batch as a spawned worker makes it, and as this process does."""
    alone = next(iter(loader))
    spawned = DataLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,
        collate_fn=loader.collate_fn,
        num_workers=1,
        multiprocessing_context="spawn",
        generator=torch.Generator().manual_seed(0),
    )
    return next(iter(spawned)), alone


def assert_same(loader: DataLoader[Any]) -> None:
    spawned, alone = (tensors(batch) for batch in first_batches(loader))
    assert len(spawned) == len(alone) > 0
    assert all(torch.equal(a, b) for a, b in zip(spawned, alone, strict=True))


def test_what_is_sent_is_the_settings_alone() -> None:
    """No trainer, no data set twice, and no tensor that is made while it is sent and gone when it arrives."""
    data = ToyData(batch_size=4)
    data.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data.trainer.unsendable = lambda: None  # type: ignore[attr-defined]
    loader = data.train_dataloader()
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(loader.collate_fn)

    received = pickle.loads(buffer.getvalue())
    assert received.data.trainer is None
    assert received.data._datasets == {}
    assert received.data._worker_seeds is None
    assert (received.data.batch_size, received.data.roles) == (4, data.roles)
    assert data.trainer is not None
    assert isinstance(data._worker_seeds, torch.Generator)


def test_a_batch_is_that_of_the_data_module() -> None:
    data = ToyData(batch_size=4)
    items = [data.get_dataset("a", "train")[row] for row in range(4)]

    assert all(torch.equal(a, b) for a, b in zip(Collate(data)(items), data.collate(items), strict=True))


@pytest.mark.medium
def test_a_spawned_worker_makes_the_batches_of_this_process() -> None:
    assert_same(ToyData(batch_size=4).train_dataloader())


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES, ids=name)
def test_a_spawned_worker_makes_the_batches_of_every_system(base: Path) -> None:
    import_tasks(tiny(base))
    data = Cli([*tiny(base), "--trainer.logger", "false"], run=False).datamodule
    data.prepare_data()
    data.setup("fit")
    assert_same(data.train_dataloader())
    assert_same(data.test_dataloader()[-1])
