# SPDX-License-Identifier: Apache-2.0
"""Random states: what a checkpoint keeps and a resumed run puts back."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch

from moeapps.training.callbacks import RandomState


def drawn() -> dict[str, float]:
    return {"python": random.random(), "numpy": float(np.random.rand()), "torch": float(torch.rand(()))}  # noqa: NPY002


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
def test_every_generator_goes_on_where_the_checkpoint_was_written(name: str) -> None:
    state = RandomState().state_dict()
    expected = drawn()
    resumed = RandomState()
    resumed.load_state_dict(state)
    drawn()  # what setting up draws
    resumed.on_train_start(cast(Any, SimpleNamespace(global_rank=0)), L.LightningModule())
    assert drawn()[name] == expected[name]


def first_of(rank: int, states: list[dict[str, Any]] | None) -> dict[str, float]:
    """What a process draws first in a training with seed 3, from the start or resumed from states."""
    callback = RandomState()
    if states is not None:
        callback.load_state_dict({"states": states})
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    callback.on_train_start(cast(Any, SimpleNamespace(global_rank=rank)), L.LightningModule())
    return drawn()


def test_every_process_draws_numbers_of_its_own_the_first_one_those_of_the_seed() -> None:
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    alone = drawn()
    first = [first_of(rank, None) for rank in range(3)]
    assert first[0] == alone
    assert first == [first_of(rank, None) for rank in range(3)]
    for name in alone:
        assert len({numbers[name] for numbers in first}) == 3


def test_each_process_takes_its_own_state_and_one_that_had_none_draws_as_in_a_new_training() -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states += RandomState().state_dict()["states"]
    assert [first_of(rank, states) for rank in (2, 3)] == [first_of(rank, None) for rank in (2, 3)]
    for rank, seed in ((0, 1), (1, 2)):
        resumed = RandomState()
        resumed.load_state_dict({"states": states})
        torch.manual_seed(3)
        resumed.on_train_start(cast(Any, SimpleNamespace(global_rank=rank)), L.LightningModule())
        first = torch.rand(())
        torch.manual_seed(seed)
        assert torch.equal(first, torch.rand(()))
