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


def test_each_process_takes_its_own_state_and_one_that_had_none_keeps_what_it_has() -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states += RandomState().state_dict()["states"]
    for rank, seed in ((0, 1), (1, 2), (2, 3)):
        resumed = RandomState()
        resumed.load_state_dict({"states": states})
        torch.manual_seed(3)
        resumed.on_train_start(cast(Any, SimpleNamespace(global_rank=rank)), L.LightningModule())
        first = torch.rand(())
        torch.manual_seed(seed)
        assert torch.equal(first, torch.rand(()))
