# SPDX-License-Identifier: Apache-2.0
"""HoME's network and its feature gates can be differentiated more than once, as the equations can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tasks.recommendation.nets.feature_gates import FeatureGates
from tests.moe.derivatives_common import apart, derivatives
from tests.tasks.recommendation.home_oracle import CATEGORY, feature_gate, inputs, naive_home, network


@pytest.mark.parametrize("low", [1, 2, 3])
def test_feature_gates_on_their_own_output_are_the_equations_to_second_order(low: int) -> None:
    gates = FeatureGates(4, (1, 0), num_gates=low, rank=2).double()
    nn.init.normal_(gates.up)
    states = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    inputs = [states, *gates.parameters()]

    def naive(x: Tensor) -> Tensor:
        return torch.stack([feature_gate(gates, v, x[s]) for v, s in enumerate(gates.views)])

    found, wanted = derivatives(gates(gates(states)), inputs), derivatives(naive(naive(states)), inputs)
    tangent = torch.func.jvp(gates, (states.detach(),), (torch.ones_like(states),))[1]

    assert apart(found[1], found[0]) < 1e-12
    for some, expected in zip(found, wanted, strict=True):
        assert apart(some, expected) < 1e-9
    assert apart([tangent], [torch.func.jvp(naive, (states.detach(),), (torch.ones_like(states),))[1]]) < 1e-12


def test_gradients_of_the_network_do_not_depend_on_whether_they_are_differentiated_again() -> None:
    net, x = network(), inputs()

    plain, graph, second = derivatives(net(x), [x, *net.parameters()])
    wanted = derivatives(naive_home(net, x[0], CATEGORY, 2), [x, *net.parameters()])

    assert apart(graph, plain) < 1e-12
    assert apart(second, wanted[2]) < 1e-6
