# SPDX-License-Identifier: Apache-2.0
"""Laws of every layer: its output is that of the reference, and what it is built or loaded with must fit."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from moeapps.moe import (
    Capacity,
    ConstantScore,
    CosineScore,
    Dense,
    ExpertChoice,
    GatedShared,
    GLUExperts,
    LinearScore,
    MLPExperts,
    ModuleExperts,
    MoELayer,
    NormalisedExperts,
    Router,
    Slots,
    TopK,
    TopP,
)
from moeapps.moe.reference import reference_layer
from tests.moe.layer_common import LAYERS, D, E, expert, grads, layer_of, rows


def same_experts(layer: MoELayer) -> None:
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))


@pytest.fixture(params=LAYERS, ids=str)
def layer(request: pytest.FixtureRequest) -> MoELayer:
    return LAYERS[request.param]()


# --- laws of all layers -------------------------------------------------------------------------------------------


def test_output_and_gradients_equal_the_reference(layer: MoELayer) -> None:
    x = rows(11, D)
    y, expected, leaves = layer(x), reference_layer(layer, x), [x, *layer.parameters()]
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
        assert not torch.allclose(layer(x), sum(w[:, e, None] * expert(layer, e, x) for e in range(E)))


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


def test_state_dict_and_copies_give_the_same_output(layer: MoELayer) -> None:
    x = rows(7, D)
    clone = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.add_(1.0)
    clone.load_state_dict(layer.state_dict())
    assert torch.equal(clone(x), layer(x))
    assert "num_shared" in repr(layer)


def test_autocast_keeps_the_router_and_lowers_the_experts() -> None:
    layer, x = layer_of(TopK(2), num_shared=1).float(), torch.randn(9, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(x), layer.route(x)
    assert routing.weight_M.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.05)


# --- construction, loading, import ----------------------------------------------------------------------------------


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


def test_a_layer_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        layer = MoELayer(Router(LinearScore(D, E), TopK(2, balance_bias=True)), GLUExperts(E, D, 8))
    assert all(p.is_meta for p in layer.parameters())


def test_the_core_loads_torch_and_neither_lightning_nor_torchmetrics() -> None:
    code = (
        "import sys, moeapps.moe, moeapps.moe.presets\n"
        "heavy = {'lightning', 'pytorch_lightning', 'torchmetrics', 'torch_geometric', 'jsonargparse', 'matplotlib'}\n"
        "sys.exit(' '.join(sorted(heavy.intersection(m.split('.')[0] for m in sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
