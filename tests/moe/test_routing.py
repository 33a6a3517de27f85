# SPDX-License-Identifier: Apache-2.0
"""Laws of the three routing dataclasses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moeapps.moe import (
    Dense,
    DenseRouting,
    ExpertChoice,
    GatedShared,
    LinearScore,
    MLPExperts,
    MoELayer,
    MultiGate,
    Router,
    Routing,
    SlotRouting,
    TopK,
    TopP,
)


def some_routing(num_rows: int = 7, num_experts: int = 4, k: int = 3) -> Routing:
    expert = torch.randint(0, num_experts + 1, (num_rows * k,))
    row = torch.arange(num_rows).repeat_interleave(k)
    weight = torch.randn(num_rows * k, dtype=torch.float64, requires_grad=True)
    return Routing(row, expert, weight, num_rows, num_experts, top_k=k)


def test_counts_and_assignment_equal_a_loop_and_ignore_the_sentinel() -> None:
    routing = some_routing()
    counts, dense = torch.zeros(4, dtype=torch.int64), torch.zeros(7, 4, dtype=torch.float64)
    for row, expert, weight in zip(routing.row_M, routing.expert_M, routing.weight_M.detach(), strict=True):
        if expert < 4:
            counts[expert] += 1
            dense[row, expert] += weight
    assert torch.equal(routing.counts(), counts)
    assert torch.equal(routing.assignment(), dense)


def test_assignment_is_differentiable_and_a_sentinel_gets_no_gradient() -> None:
    routing = some_routing()
    (grad,) = torch.autograd.grad(routing.assignment().sum(), routing.weight_M)
    assert torch.equal(grad, (routing.expert_M < 4).double())


def test_outputs_go_to_their_own_rows_unless_told_otherwise() -> None:
    routing = some_routing()
    assert routing.output_M is routing.row_M
    assert routing.num_outputs == 7
    moved = dataclasses.replace(routing, target_M=routing.row_M * 0, num_targets=1)
    assert moved.output_M.max() == 0
    assert moved.num_outputs == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight_M": torch.ones(2, 2)}, "one-dimensional"),
        ({"row_M": torch.zeros(3, dtype=torch.int64)}, r"row_M is \(3,\)"),
        ({"expert_M": torch.zeros(4)}, "int64"),
        ({"target_M": torch.zeros(4, dtype=torch.int64)}, "num_targets"),
        ({"top_k": 3}, "leave top_k=None"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, object], text: str) -> None:
    ids = torch.zeros(4, dtype=torch.int64)
    arguments = {"row_M": ids, "expert_M": ids, "weight_M": torch.ones(4), "num_rows": 2, "num_experts": 2} | change
    with pytest.raises(ValueError, match=text):
        Routing(**arguments)


def test_dense_and_slot_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="gates first"):
        DenseRouting(torch.ones(3, 4), 5)
    with pytest.raises(ValueError, match=r"\[N, E, S\]"):
        SlotRouting(torch.ones(3, 4, 2), torch.ones(3, 4, 1))


def test_dense_counts_are_rows_that_some_gate_allows() -> None:
    weight = torch.rand(2, 5, 3)
    assert DenseRouting(weight, 3).counts().tolist() == [5, 5, 5]
    allowed = torch.tensor([[True, False, False], [True, True, False]]).unsqueeze(1)
    routing = DenseRouting(weight, 3, allowed=allowed)
    assert routing.counts().tolist() == [5, 5, 0]
    torch.testing.assert_close(routing.assignment(), weight.mean(0))
    by_row = torch.tensor([True, True, False, True, False]).unsqueeze(-1)
    assert DenseRouting(weight[0], 3, allowed=by_row).counts().tolist() == [3, 3, 3]


def test_slot_counts_and_assignment() -> None:
    combine = torch.rand(5, 3, 2)
    routing = SlotRouting(torch.rand(5, 3, 2), combine)
    assert routing.counts().tolist() == [2, 2, 2]
    torch.testing.assert_close(routing.assignment(), combine.sum(-1))


def test_a_routing_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        some_routing().top_k = 1


def test_no_rows_at_all() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    routing = Routing(none, none, torch.zeros(0), 0, 3, top_k=2)
    assert routing.counts().tolist() == [0, 0, 0]
    assert routing.assignment().shape == (0, 3)
    assert routing.repeat_rows(4).num_rows == 0


@pytest.mark.parametrize(
    ("columns", "choose"),
    [
        (4, TopK(2)),
        (4, TopP(0.6)),
        (5, GatedShared(TopK(2), 1)),
        (4, ExpertChoice(1.5)),
        (4, Dense(allowed=[True, True, False, True])),
    ],
    ids=lambda p: type(p).__name__,
)
def test_repeated_rows_are_routed_like_the_row_they_repeat(columns: int, choose: torch.nn.Module) -> None:
    router = Router(LinearScore(6, columns), choose)
    layer = MoELayer(router, MLPExperts(5, 6, 8), num_shared=1).double()
    context, x = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, 6, dtype=torch.float64)
    routing = layer.route(context)
    y = layer(x, routing=routing.repeat_rows(3))
    for j in range(3):
        torch.testing.assert_close(y[:, j], layer(x[:, j], routing=routing))
    assert torch.equal(routing.repeat_rows(3).counts(), routing.counts() * 3)
    assert routing.repeat_rows(3).logits_NE.shape == (15, 4)


def test_repeated_gates() -> None:
    gates = MultiGate([LinearScore(6, 3), LinearScore(6, 3)], allowed=[[True, False, True], [True, True, True]])
    routing = gates(torch.randn(4, 6)).repeat_rows(2)
    assert routing.weight.shape == (2, 8, 3)
    assert torch.equal(routing.weight[:, 0::2], routing.weight[:, 1::2])
    assert routing.counts().tolist() == [8, 8, 8]


def test_repeat_rows_refuses_what_it_cannot_mean() -> None:
    routing = some_routing()
    with pytest.raises(ValueError, match="at least once"):
        routing.repeat_rows(0)
    with pytest.raises(ValueError, match="target_M"):
        dataclasses.replace(routing, target_M=routing.row_M, num_targets=7).repeat_rows(2)
