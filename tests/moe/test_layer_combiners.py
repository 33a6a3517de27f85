# SPDX-License-Identifier: Apache-2.0
"""Laws of what joins experts: stacks and sums of their outputs, joined banks, chains of steps with one bank."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moeapps.moe import (
    Chain,
    Dense,
    ExpertChoice,
    GatedShared,
    GLUExperts,
    JoinedExperts,
    LinearScore,
    MLPExperts,
    ModuleExperts,
    MoELayer,
    MoERecorder,
    NormalisedExperts,
    Router,
    Slots,
    Stack,
    Sum,
    TopK,
    TopP,
)
from tests.moe.layer_common import LAYERS, D, E, expert, grads, layer_of, rows

# --- stacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["top_k", "top_k_shared", "top_k_null", "top_p", "top_p_gated", "dense", "dense_shared"]
)
def test_a_stack_adds_up_to_the_sum(name: str) -> None:
    layer, x = LAYERS[name](), rows(2, 5, D)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    expected = layer(x, token_mask=mask)
    layer.combiner = Stack()
    y, present = layer(x, token_mask=mask)
    assert y.shape[:-1] == present.shape
    assert present.shape[:2] == (2, 5)
    torch.testing.assert_close(y.sum(-2), expected)
    assert not y[~present].any()
    assert not present[1, 1].any()
    leaves = [x, *layer.parameters()]
    probe = torch.randn_like(expected)
    layer.combiner = Sum()
    wanted = grads(layer(x, token_mask=mask), leaves, probe)
    for a, b in zip(grads(y.sum(-2), leaves, probe), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_an_unweighted_stack_is_the_experts_themselves() -> None:
    layer, x = layer_of(TopK(2), combiner=Stack(weighted=False)), rows(7, D)
    y, present = layer(x)
    assert present.all()
    chosen = layer.route(x).expert_M.view(7, 2)
    for n in range(7):
        for j in range(2):
            torch.testing.assert_close(y[n, j], expert(layer, int(chosen[n, j]), x[n]))
    dense = layer_of(Dense(allowed=[True, False, True, True]), combiner=Stack(weighted=False))
    y, present = dense(x)
    assert present.tolist() == [[True, False, True, True]] * 7
    torch.testing.assert_close(y[:, 2], expert(dense, 2, x))
    assert not y[:, 1].any()


def test_a_stack_needs_a_fixed_number_of_experts_per_row() -> None:
    for choose in (ExpertChoice(1.0), Slots(1)):
        with pytest.raises(ValueError, match="fixed number of experts"):
            layer_of(choose, combiner=Stack())(rows(8, D))


# --- joined banks -------------------------------------------------------------------------------------------------


def test_joined_banks_equal_their_parts() -> None:
    routed, shared = GLUExperts(E, D, 8), GLUExperts(2, D, 3)
    for choose, columns in ((TopK(2), E), (GatedShared(TopP(0.7), 2), E + 2), (Dense(), E), (ExpertChoice(1.0), E)):
        layer = MoELayer(
            Router(LinearScore(D, columns), choose), JoinedExperts([routed, shared]), num_shared=2
        ).double()
        x, y = rows(9, D), None
        routing = layer.route(x)
        w, all_experts = routing.assignment(), torch.cat([routed.every(x), shared.every(x)], 1)
        own = torch.ones(9, 2, dtype=torch.float64) if routing.shared_weight_NS is None else routing.shared_weight_NS
        expected = torch.einsum("ne,nei->ni", torch.cat([w, own], -1), all_experts)
        y = layer(x)
        torch.testing.assert_close(y, expected)
        leaves, probe = [x, *layer.parameters()], torch.randn_like(y)
        for a, b in zip(grads(y, leaves, probe), grads(expected, leaves, probe), strict=True):
            torch.testing.assert_close(a, b)


def test_joined_banks_group_select_and_count() -> None:
    bank = JoinedExperts([GLUExperts(2, D, 8), GLUExperts(1, D, 3)]).double()
    x = rows(6, D)
    every = bank.every(x)
    torch.testing.assert_close(bank.grouped(x, torch.tensor([1, 2, 3])), every[range(6), [0, 1, 1, 2, 2, 2]])
    torch.testing.assert_close(bank.every(x.expand(3, -1, -1)), every)
    torch.testing.assert_close(bank.select([1, 2]).every(x), every[:, 1:])
    assert bank.flops_per_row == (2 * 2 * 3 * D * 8 + 2 * 3 * D * 3) // 3
    before = bank.banks[0].w_in.clone()
    bank.reset_parameters()
    assert not torch.equal(bank.banks[0].w_in, before)
    with pytest.raises(ValueError, match="ascending"):
        bank.select([2, 0])
    with pytest.raises(ValueError, match="all of one width"):
        JoinedExperts([GLUExperts(2, D, 8), GLUExperts(1, D + 1, 3)])
    with pytest.raises(ValueError, match="batch statistics"):
        JoinedExperts([NormalisedExperts(2, D, 3)])


def test_a_chain_takes_steps_with_one_bank() -> None:
    routers = [Router(LinearScore(D, E), TopK(2)) for _ in range(3)]
    bank = MLPExperts(E, D, 8)
    chain, x = Chain(routers, bank).double(), rows(5, D)
    expected = x
    for router in routers:
        expected = expected + MoELayer(router, bank)(expected)
    torch.testing.assert_close(chain(x), expected)
    torch.testing.assert_close(Chain(routers, bank, add_input=False).double()(x), expected - x)
    assert sum(p.numel() for p in chain.parameters()) == sum(p.numel() for p in [*bank.parameters()]) + 3 * D * E
    with MoERecorder(chain) as recorder:
        chain(x)
    assert [r.name for r in recorder.records] == ["steps.0", "steps.1", "steps.2"]
    with pytest.raises(ValueError, match="at least one"):
        Chain([], bank)
    with pytest.raises(ValueError, match="keep the width"):
        Chain(routers, MLPExperts(E, D, 8, out_dim=3))


# --- shared experts apart -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("choose", "columns"),
    [(TopK(2), E), (TopP(0.7), E), (ExpertChoice(1.0), E), (GatedShared(TopK(2), 2), E + 2)],
    ids=["top_k", "top_p", "expert_choice", "gated_shared"],
)
@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_apart_are_the_joined_ones(choose: nn.Module, columns: int, gated: bool, masked: bool) -> None:
    joined = layer_of(copy.deepcopy(choose), columns=columns, num_shared=2)
    if gated:
        joined.experts = GLUExperts(E + 2, D, 8, bias=True).double()
    apart = copy.deepcopy(joined)
    apart.combiner = Sum(shared="apart")
    x, mask = rows(3, 5, D), torch.rand(3, 5) < 0.6 if masked else None
    found = [layer(x, token_mask=mask) for layer in (joined, apart)]
    torch.testing.assert_close(found[1], found[0])
    grads = [
        torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)
        for y, layer in zip(found, (joined, apart), strict=True)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_shared_experts_apart_need_a_stacked_bank_and_a_known_name() -> None:
    bank = ModuleExperts([nn.Linear(D, D) for _ in range(3)])
    layer = MoELayer(Router(LinearScore(D, 2), TopK(1)), bank, num_shared=1, combiner=Sum(shared="apart"))
    twin = MoELayer(layer.router, bank, num_shared=1)
    x = torch.randn(4, D)
    assert torch.equal(layer(x), twin(x))
    with pytest.raises(ValueError, match="'joined' or 'apart'"):
        Sum(shared="beside")
