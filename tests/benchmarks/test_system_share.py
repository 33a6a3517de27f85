# SPDX-License-Identifier: Apache-2.0
"""The share of MoE layers in a step counts what it says; no clock is trusted here."""

from __future__ import annotations

import pytest
import torch

from benchmarks import system_share
from benchmarks.limits import check_parts

pytestmark = pytest.mark.medium
CALLS = {"point_moe": 6, "home": 2, "mixer": 1, "promoe": 1, "unimoe_audio": 4, "meta_dmoe": 2}
"""Blocks; levels; a solve; a block of two; blocks; two domains of a step."""


@pytest.mark.parametrize("system", CALLS)
def test_every_call_of_a_layer_is_repeated_alone_and_changes_nothing(system: str) -> None:
    flags = ["--config", "configs/debug/tiny.yaml", "--config", f"configs/debug/{system}.yaml"]
    task, batch = system_share.build(system, flags)
    calls = system_share.moe_calls(task, batch)

    assert len(calls) == CALLS[system]
    before = [p.detach().clone() for p in task.parameters()]
    for work in calls:
        work()
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
    assert all(p.grad is None for p in task.parameters())
    check_parts(system_share.train_step(task, batch), {"layers": calls})
    assert not all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))


def test_all_systems_with_a_golden_loss_are_measured() -> None:
    assert set(CALLS) <= set(system_share.systems())
