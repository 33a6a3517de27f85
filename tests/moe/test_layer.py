# SPDX-License-Identifier: Apache-2.0
"""Laws of the layer and its combiners."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moeapps.moe import (
    Capacity,
    Chain,
    ConstantScore,
    CosineScore,
    Dense,
    DenseRouting,
    ExpertChoice,
    GatedShared,
    GLUExperts,
    JoinedExperts,
    LinearScore,
    MLPExperts,
    ModuleExperts,
    MoELayer,
    MoERecorder,
    MultiGate,
    NormalisedExperts,
    Router,
    Routing,
    Slots,
    Stack,
    Sum,
    TopK,
    TopP,
)

D, E = 6, 4


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def layer_of(choose: nn.Module, *, columns: int = E, num_shared: int = 0, **options: object) -> MoELayer:
    router = Router(LinearScore(D, columns), choose)
    bank = MLPExperts(router.num_experts + num_shared, D, 8, activation="tanh")
    return MoELayer(router, bank, num_shared=num_shared, **options).double()


def same_experts(layer: MoELayer) -> None:
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))


def expert(layer: MoELayer, e: int, x: Tensor) -> Tensor:
    bank = layer.experts
    return torch.tanh(x @ bank.w_in[e] + bank.b_in[e]) @ bank.w_out[e] + bank.b_out[e]


def grads(y: Tensor, leaves: list[Tensor], probe: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * probe).sum(), leaves)


LAYERS: dict[str, Callable[[], MoELayer]] = {
    "top_k": lambda: layer_of(TopK(2)),
    "top_k_shared": lambda: layer_of(TopK(2), num_shared=2),
    "top_k_null": lambda: layer_of(TopK(2, num_null=1), columns=E + 1),
    "top_p": lambda: layer_of(TopP(0.7)),
    "top_p_gated": lambda: layer_of(GatedShared(TopP(0.7, num_null=1), 2), columns=E + 3, num_shared=2),
    "weight_at_input": lambda: layer_of(TopK(2), weight_at="input"),
    "expert_choice": lambda: layer_of(ExpertChoice(1.5)),
    "expert_choice_shared": lambda: layer_of(ExpertChoice(1.5), num_shared=1),
    "dense": lambda: layer_of(Dense()),
    "dense_shared": lambda: layer_of(Dense("sigmoid"), num_shared=1),
    "slots": lambda: layer_of(Slots(2), columns=2 * E),
    "slots_shared": lambda: layer_of(Slots(2), columns=2 * E, num_shared=1),
}


@pytest.fixture(params=LAYERS, ids=str)
def layer(request: pytest.FixtureRequest) -> MoELayer:
    return LAYERS[request.param]()


# --- laws of all layers -------------------------------------------------------------------------------------------


def naive(layer: MoELayer, x: Tensor) -> Tensor:
    """From the dense assignment alone: valid wherever the weight multiplies the output of an expert on the row."""
    routing = layer.route(x)
    weight = routing.assignment()
    y = sum(weight[:, e, None] * expert(layer, e, x) for e in range(layer.num_experts))
    for s in range(layer.num_shared):
        w = 1.0 if routing.shared_weight_NS is None else routing.shared_weight_NS[:, s, None]
        y = y + w * expert(layer, layer.num_experts + s, x)
    return y


@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"weight_at_input", "slots", "slots_shared"}))
def test_output_and_gradients_equal_the_dense_assignment(name: str) -> None:
    layer, x = LAYERS[name](), rows(11, D)
    y, expected, leaves = layer(x), naive(layer, x), [x, *layer.parameters()]
    torch.testing.assert_close(y, expected)
    probe = torch.randn_like(y)
    for a, b in zip(grads(y, leaves, probe), grads(expected, leaves, probe), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_no_rows_and_one_row(layer: MoELayer, num_rows: int) -> None:
    x = rows(num_rows, D)
    y = layer(x)
    assert y.shape == (num_rows, D)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_masked_rows_are_exactly_zero_and_pass_no_gradient(layer: MoELayer) -> None:
    x, mask = rows(9, D), torch.arange(9) % 3 > 0
    y = layer(x, token_mask=mask)
    assert not y[~mask].any()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not grad[~mask].any()
    assert not layer(x, token_mask=torch.zeros(9, dtype=torch.bool)).any()
    if not isinstance(layer.router.choose, ExpertChoice | Slots):
        torch.testing.assert_close(y[mask], layer(x)[mask])


def test_leading_dimensions_are_rows(layer: MoELayer) -> None:
    x = rows(2, 3, 4, D)
    y = layer(x)
    assert y.shape == (2, 3, 4, D)
    torch.testing.assert_close(y.reshape(24, D), layer(x.reshape(24, D)))
    torch.testing.assert_close(y, layer(x, x))
    torch.testing.assert_close(layer(x, token_mask=torch.ones(2, 3, 4, dtype=torch.bool)), y)
    assert layer_of(TopK(2))(rows(D)).shape == (D,)


def test_permuting_rows_permutes_the_output(layer: MoELayer) -> None:
    x, order = rows(12, D), torch.randperm(12)
    torch.testing.assert_close(layer(x[order]), layer(x)[order])


def test_permuting_experts_with_their_router_rows_changes_nothing() -> None:
    for name in ("top_k", "top_p", "expert_choice", "dense"):
        layer, x, order = LAYERS[name](), rows(12, D), torch.randperm(E)
        y = layer(x)
        with torch.no_grad():
            for parameter in (*layer.experts.parameters(), layer.router.score.weight):
                parameter.copy_(parameter[order].clone())
        torch.testing.assert_close(layer(x), y)


def test_all_experts_with_renormalised_weights_are_the_softmax_mixture() -> None:
    layer, x = layer_of(TopK(E)), rows(10, D)
    p = (x @ layer.router.score.weight.T).softmax(-1)
    expected = sum(p[:, e, None] * expert(layer, e, x) for e in range(E))
    y, leaves = layer(x), [x, *layer.parameters()]
    torch.testing.assert_close(y, expected)
    probe = torch.randn_like(y)
    for a, b in zip(grads(y, leaves, probe), grads(expected, leaves, probe), strict=True):
        torch.testing.assert_close(a, b)


def test_one_expert_is_the_plain_network() -> None:
    router = Router(ConstantScore(1), Dense("ones"))
    layer, x = MoELayer(router, MLPExperts(1, D, 8, activation="tanh")).double(), rows(7, D)
    torch.testing.assert_close(layer(x), expert(layer, 0, x))
    sparse = MoELayer(Router(ConstantScore(1), TopK(1)), layer.experts).double()
    torch.testing.assert_close(sparse(x), expert(layer, 0, x))


@pytest.mark.parametrize("choose", [TopK(2), TopP(0.6, renormalise=True), TopK(3, weighing="sigmoid"), Dense()])
def test_identical_experts_with_weights_of_sum_one_are_that_expert(choose: nn.Module) -> None:
    layer, x = layer_of(copy.deepcopy(choose)), rows(10, D)
    same_experts(layer)
    torch.testing.assert_close(layer(x), expert(layer, 0, x))


def test_the_gradient_of_an_unchosen_expert_is_exactly_zero() -> None:
    layer, x = layer_of(TopK(1)), rows(10, D)
    with torch.no_grad():
        layer.router.score.weight[2] = 0.0
        layer.router.score.weight[2] -= 50 * x.sign().mean(0)
    chosen = layer.route(x).counts() > 0
    assert not chosen.all()
    for parameter in layer.experts.parameters():
        (grad,) = torch.autograd.grad(layer(x).sum(), parameter)
        assert not grad[~chosen].any()
        assert grad[chosen].any()


def test_a_null_row_is_zero_or_the_shared_experts_and_learns_through_probabilities_alone() -> None:
    for num_shared in (0, 1):
        layer, x = layer_of(TopK(1, num_null=1), columns=E + 1, num_shared=num_shared), rows(5, D)
        layer.router.adjust = lambda logits, _: logits + 90.0 * torch.eye(E + 1, dtype=torch.float64)[E]
        y = layer(x)
        shared = expert(layer, E, x) if num_shared else torch.zeros_like(y)
        torch.testing.assert_close(y, shared, rtol=0, atol=1e-15)
        assert num_shared or not y.any()
        w_in = torch.autograd.grad(y.sum(), layer.experts.w_in)[0]
        assert not w_in[:E].any()


def test_dropped_rows_give_nothing_and_get_no_gradient() -> None:
    router = Router(LinearScore(D, E), TopK(1), capacity=Capacity(0.5, minimum=1))
    layer, x = MoELayer(router, MLPExperts(E, D, 8)).double(), rows(16, D)
    dropped = layer.route(x).expert_M == E
    assert dropped.any()
    y = layer(x)
    assert not y[dropped].any()
    assert not torch.autograd.grad(y.sum(), x)[0][dropped].any()
    dropless = MoELayer(Router(router.score, TopK(1)), layer.experts)
    torch.testing.assert_close(y[~dropped], dropless(x)[~dropped])


def test_weighing_the_input_scales_what_the_expert_reads() -> None:
    for choose in (TopK(2), Dense()):
        layer, x = layer_of(choose, weight_at="input"), rows(9, D)
        w = layer.route(x).assignment()
        expected = sum((w[:, e] > 0)[:, None] * expert(layer, e, w[:, e, None] * x) for e in range(E))
        torch.testing.assert_close(layer(x), expected)
        assert not torch.allclose(layer(x), naive(layer, x))


@pytest.mark.parametrize("num_shared", [0, 1])
def test_soft_slots_equal_a_loop(num_shared: int) -> None:
    router = Router(CosineScore(D, E * 2, temperature=0.2), Slots(2))
    bank = MLPExperts(E + num_shared, D, 8, activation="tanh")
    layer, x = MoELayer(router, bank, num_shared=num_shared).double(), rows(9, D)
    logits = router.score(x).view(9, E, 2)
    dispatch, combine = logits.softmax(0), logits.flatten(1).softmax(-1).view(9, E, 2)
    expected = expert(layer, E, x) if num_shared else torch.zeros_like(x)
    for e in range(E):
        for s in range(2):
            slot = (dispatch[:, e, s, None] * x).sum(0)
            expected = expected + combine[:, e, s, None] * expert(layer, e, slot)
    torch.testing.assert_close(layer(x), expected)
    routing = layer.route(x)
    torch.testing.assert_close(routing.logits_NE, logits.exp().sum(-1).log())
    torch.testing.assert_close(routing.probs_NE, combine.sum(-1))


def test_one_expert_with_one_slot_is_the_expert_of_the_mean_for_equal_logits() -> None:
    layer, x = MoELayer(Router(ConstantScore(1), Slots(1)), MLPExperts(1, D, 8, activation="tanh")).double(), rows(5, D)
    torch.testing.assert_close(layer(x), expert(layer, 0, x.mean(0)).expand(5, -1))


@pytest.mark.parametrize("backend", ["loop", "onehot"])
def test_backends_agree(backend: str) -> None:
    layer, x = layer_of(TopP(0.7), num_shared=1), rows(13, D)
    reference, leaves, probe = layer(x), [x, *layer.parameters()], torch.randn(13, D, dtype=torch.float64)
    wanted = grads(reference, leaves, probe)
    layer.backend = backend
    torch.testing.assert_close(layer(x), reference)
    for a, b in zip(grads(layer(x), leaves, probe), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_exist() -> None:
    layer, x = layer_of(TopK(2), num_shared=1), rows(4, D)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


# --- routing once, applying often; side inputs; own views -----------------------------------------------------------


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
    with pytest.raises(ValueError, match="which output row"):
        shared(x, routing=routing)


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
    with pytest.raises(ValueError, match="say what to route on"):
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


# --- construction, saving, import -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: MoELayer(Router(LinearScore(D, E), TopK(2)), MLPExperts(3, D, 8)), "must hold 4"),
        (lambda: MoELayer(Router(LinearScore(D, E), TopK(2)), MLPExperts(E, D, 8), num_shared=1), "must hold 5"),
        (lambda: MoELayer(Router(LinearScore(D, E), TopK(2)), NormalisedExperts(E, D, 8)), "use a Dense chooser"),
        (lambda: layer_of(TopK(2), backend="fast"), "use auto, loop"),
        (lambda: layer_of(TopK(2), weight_at="middle"), "'output' or 'input'"),
        (lambda: layer_of(GatedShared(TopK(2), 2), columns=E + 2, num_shared=1), "weighs 2 shared"),
        (lambda: layer_of(TopK(5)), "top_k=5, but there are only 4 experts"),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(build: Callable[[], MoELayer], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build()


def test_loading_another_number_of_experts_explains_itself() -> None:
    for options in ({}, {"num_shared": 1}):
        small, large = layer_of(TopK(2), **options), layer_of(TopK(2), columns=6, **options)
        net = nn.Sequential(nn.Linear(D, D), small)
        total = 6 + small.num_shared
        text = rf"checkpoint of 1 holds {total} experts.*built with {E + small.num_shared}.*num_experts=6"
        with pytest.raises(RuntimeError, match=text):
            net.load_state_dict(nn.Sequential(nn.Linear(D, D), large).state_dict())
        small.load_state_dict(layer_of(TopK(2), **options).state_dict())
    modules = [
        MoELayer(Router(LinearScore(D, e), TopK(1)), ModuleExperts([nn.Linear(D, D) for _ in range(e)])) for e in (2, 3)
    ]
    with pytest.raises(RuntimeError, match="holds 3 experts"):
        modules[0].load_state_dict(modules[1].state_dict())


def test_state_dict_and_copies_give_the_same_output(layer: MoELayer) -> None:
    x = rows(7, D)
    clone = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.add_(1.0)
    clone.load_state_dict(layer.state_dict())
    assert torch.equal(clone(x), layer(x))
    assert "num_shared" in repr(layer)


def test_a_layer_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        layer = MoELayer(Router(LinearScore(D, E), TopK(2, balance_bias=True)), GLUExperts(E, D, 8))
    assert all(p.is_meta for p in layer.parameters())


def test_autocast_keeps_the_router_and_lowers_the_experts() -> None:
    layer, x = layer_of(TopK(2), num_shared=1).float(), torch.randn(9, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(x), layer.route(x)
    assert routing.weight_M.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.05)


def test_a_dense_routing_made_by_hand_leaves_experts_out() -> None:
    layer, x = layer_of(Dense()), rows(3, D)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [False, False, False, True]])
    routing = DenseRouting(mask.double(), E, allowed=mask)
    expected = torch.stack([sum(expert(layer, e, x[n]) for e in range(E) if mask[n, e]) for n in range(3)])
    torch.testing.assert_close(layer(x, routing=routing), expected)


def test_the_core_loads_torch_and_neither_lightning_nor_torchmetrics() -> None:
    code = (
        "import sys, moeapps.moe, moeapps.moe.presets\n"
        "heavy = {'lightning', 'pytorch_lightning', 'torchmetrics', 'torch_geometric', 'jsonargparse', 'matplotlib'}\n"
        "sys.exit(' '.join(sorted(heavy.intersection(m.split('.')[0] for m in sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
