# SPDX-License-Identifier: Apache-2.0
"""What a layer may be given beside its rows: a routing, side inputs, a view for every expert, several gates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from moeapps.moe import (
    Dense,
    DenseRouting,
    LinearScore,
    MLPExperts,
    ModuleExperts,
    MoELayer,
    MultiGate,
    Router,
    Routing,
    Slots,
    TopK,
)
from tests.moe.layer_common import D, E, expert, layer_of, rows

# --- routings made before or by hand ---------------------------------------------------------------------------------


def test_a_routing_can_be_used_again() -> None:
    layer, context = layer_of(TopK(2), num_shared=1), rows(8, D)
    routing = layer.route(context)
    x, z = rows(8, D), rows(8, D)
    torch.testing.assert_close(layer(x, context), layer(x, routing=routing))
    torch.testing.assert_close(layer(z, context), layer(z, routing=routing))
    with pytest.raises(ValueError, match="made for 8"):
        layer(rows(9, D), routing=routing)
    dense = layer_of(Dense())
    with pytest.raises(ValueError, match="made for 8"):
        dense(rows(9, D), routing=dense.route(context))
    soft = layer_of(Slots(1))
    with pytest.raises(ValueError, match="made for 8"):
        soft(rows(9, D), routing=soft.route(context))


def test_outputs_may_go_to_rows_of_their_own() -> None:
    layer, x = layer_of(TopK(1)), rows(6, D)
    ids = torch.arange(6)
    routing = Routing(ids, ids % E, torch.ones(6, dtype=torch.float64), 6, E, target_M=ids // 3, num_targets=2)
    expected = torch.stack(
        [sum(expert(layer, int(n % E), x[n]) for n in (3 * t, 3 * t + 1, 3 * t + 2)) for t in (0, 1)]
    )
    torch.testing.assert_close(layer(x, routing=routing), expected)
    shared = layer_of(TopK(1), num_shared=1)
    with pytest.raises(ValueError, match="whose output row"):
        shared(x, routing=routing)


def test_a_dense_routing_made_by_hand_leaves_experts_out() -> None:
    layer, x = layer_of(Dense()), rows(3, D)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [False, False, False, True]])
    routing = DenseRouting(mask.double(), E, allowed=mask)
    expected = torch.stack([sum(expert(layer, e, x[n]) for e in range(E) if mask[n, e]) for n in range(3)])
    torch.testing.assert_close(layer(x, routing=routing), expected)


# --- side inputs, own views, gates ----------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(D, D)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return self.net(x) * gain


@pytest.mark.parametrize("choose", [TopK(2), Dense()], ids=["sparse", "dense"])
def test_side_inputs_follow_their_rows(choose: nn.Module) -> None:
    bank = ModuleExperts([Scaled() for _ in range(E)])
    layer = MoELayer(Router(LinearScore(D, E), copy.deepcopy(choose)), bank).double()
    x, gain = rows(3, 5, D), rows(3, 5, 1)
    w = layer.route(x).assignment().view(3, 5, E)
    expected = sum(w[..., e, None] * bank.experts[e](x, gain) for e in range(E))
    torch.testing.assert_close(layer(x, side=(gain,)), expected)


def test_each_expert_may_have_its_own_view_of_the_rows() -> None:
    layer, views, read = layer_of(Dense(), num_shared=1), rows(E + 1, 2, 3, D), rows(2, 3, D)
    y = layer(views, read, per_expert=True)
    w = layer.route(read).assignment().view(2, 3, E)
    expected = sum(w[..., e, None] * expert(layer, e, views[e]) for e in range(E)) + expert(layer, E, views[E])
    torch.testing.assert_close(y, expected)
    with pytest.raises(ValueError, match="give what to route on"):
        layer(views, per_expert=True)
    with pytest.raises(ValueError, match="use Dense"):
        layer_of(TopK(2))(views[:E], read, per_expert=True)
    at_input = layer_of(Dense(), weight_at="input")
    expected = sum(
        expert(at_input, e, at_input.route(read).assignment().view(2, 3, E)[..., e, None] * views[e]) for e in range(E)
    )
    torch.testing.assert_close(at_input(views[:E], read, per_expert=True), expected)


def test_gates_come_first() -> None:
    gates = MultiGate([LinearScore(D, E) for _ in range(3)])
    layer, x = MoELayer(gates, MLPExperts(E + 1, D, 8, activation="tanh"), num_shared=1).double(), rows(2, 5, D)
    y = layer(x)
    assert y.shape == (3, 2, 5, D)
    for g in range(3):
        alone = MoELayer(Router(gates.scores[g], Dense()), layer.experts, num_shared=1)
        torch.testing.assert_close(y[g], alone(x))
    at_input = MoELayer(gates, layer.experts, num_shared=1, weight_at="input")
    with pytest.raises(ValueError, match="needs one gate"):
        at_input(x)


def test_slots_refuse_what_they_cannot_mean() -> None:
    layer = layer_of(Slots(1), weight_at="input")
    with pytest.raises(ValueError, match="it takes no side inputs"):
        layer(rows(5, D))
