# SPDX-License-Identifier: Apache-2.0
"""The comparison with torch-rechub: our side of it, and the result that is kept."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import recommendation_peers as peers
from benchmarks.peers.environment import pinned
from tasks.recommendation.rivals.list_banks import averaged_experts


@pytest.mark.parametrize("kind", ["lists", "tasks"])
def test_a_step_trains_all_that_its_rows_reach(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ROWS", 40)
    torch.manual_seed(0)
    net, step = (
        peers.our_mmoe()
        if kind == "tasks"
        else peers.our_lists(peers.lists(5), averaged_experts(num_experts=1, hidden_dim=8))
    )
    before = [parameter.detach().clone() for parameter in net.parameters()]

    step()

    # Of the first step's gradients none is 0 everywhere, so Adam moves every parameter.
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("candidates", [1, 5])
def test_lists_hold_the_same_number_of_rows(candidates: int) -> None:
    batch = peers.lists(candidates)

    assert batch.label.shape == (peers.ROWS // candidates, candidates)
    assert bool(batch.history_mask.all())


def test_parameters_of_tables_are_not_counted() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(100, 3), torch.nn.Linear(3, 2))

    assert peers.beside_tables(module) == 8


def test_the_kept_result_is_of_this_code_and_holds_its_gates() -> None:
    found = json.loads(peers.RESULTS.read_text(encoding="utf-8"))

    assert found["peers"] == [f"{name}=={pinned()[name]}" for name in peers.PACKAGES]
    assert [row["gate"] for row in found["rows"]] == [peers.GATE, None, None, peers.GATE]
    for row in found["rows"]:
        assert row["pairs"] == peers.PAIRS
        assert row["ok"] == (row["gate"] is None or row["ratio"] >= row["gate"]) is True
