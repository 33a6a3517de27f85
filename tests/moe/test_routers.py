# SPDX-License-Identifier: Apache-2.0
"""Laws of routers: what a routing carries, precision, noise, capacity, and what is saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeapps.moe import (
    AttentionScore,
    Capacity,
    ConditionalSplit,
    CosineScore,
    Dense,
    ExpertChoice,
    GaussianNoise,
    GumbelNoise,
    Jitter,
    LinearScore,
    MLPExperts,
    MoELayer,
    MultiGate,
    PrototypeScore,
    Router,
    RouterBase,
    Routing,
    Slots,
    SumRouters,
    TableScore,
    Threshold,
    TopK,
    TopP,
)
from tests.moe.router_common import SCORES, D, E, features

# --- the router -------------------------------------------------------------------------------------------------------


def test_a_routing_carries_what_losses_need() -> None:
    x = features().requires_grad_()
    routing = Router(LinearScore(D, E), TopK(2)).double()(x)
    assert routing.features_ND is x
    assert routing.logits_NE.requires_grad
    torch.testing.assert_close(routing.probs_NE, routing.logits_NE.softmax(-1))
    assert (
        Router(AttentionScore(3, E), Dense())((torch.randn(2, 5, 3), torch.randn(2, 3), torch.ones(2, 5))).features_ND
        is None
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", sorted(set(SCORES) - {"table"}))
def test_routing_is_full_precision_under_autocast(name: str, dtype: torch.dtype) -> None:
    router, x = Router(SCORES[name](), TopK(2)).eval(), torch.randn(6, D)
    plain = router(x.to(dtype).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x.to(dtype))
    assert routing.logits_NE.dtype == routing.weight_M.dtype == routing.probs_NE.dtype == torch.float32
    assert torch.equal(routing.logits_NE, plain.logits_NE)


def test_double_precision_stays_and_a_cast_model_still_routes_in_single() -> None:
    assert Router(LinearScore(D, E), TopK(2)).double()(features()).weight_M.dtype == torch.float64
    low = Router(LinearScore(D, E), TopK(2)).bfloat16()
    assert low(torch.randn(3, D).bfloat16()).weight_M.dtype == torch.float32
    gates = MultiGate([LinearScore(D, E)] * 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gates(torch.randn(3, D)).weight.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"table", "random"}))
def test_a_model_in_bfloat16_routes_as_one_of_its_rounded_parameters(name: str) -> None:
    low = Router(SCORES[name](), TopK(2)).bfloat16().eval()
    rounded = copy.deepcopy(low).float()
    x = torch.randn(6, D).bfloat16()
    found, wanted = low(x), rounded(x.float())

    assert found.logits_NE.dtype == torch.float32
    assert torch.equal(found.logits_NE, wanted.logits_NE)
    assert torch.equal(found.expert_M, wanted.expert_M)


def test_adjusting_by_nothing_is_bit_identical_and_only_the_adjustment_learns() -> None:
    router, x = Router(LinearScore(D, E), TopK(2)).requires_grad_(False), torch.randn(9, D)
    plain = router(x)
    delta = torch.zeros(E, requires_grad=True)
    router.adjust = lambda logits, _: logits + delta
    adjusted = router(x)
    assert torch.equal(adjusted.weight_M, plain.weight_M)
    assert torch.equal(adjusted.expert_M, plain.expert_M)
    (adjusted.weight_M * torch.arange(18)).sum().backward()
    assert delta.grad.any()
    assert all(p.grad is None for p in router.parameters())


@pytest.mark.parametrize(
    "choose", [ExpertChoice(1.0), Threshold(1.0), Dense(), Slots(1)], ids=lambda c: type(c).__name__
)
def test_capacity_is_for_choosers_by_row(choose: nn.Module) -> None:
    with pytest.raises(ValueError, match="leave capacity out"):
        Router(LinearScore(D, E), choose, capacity=Capacity(1.0))


def test_mean_k_is_known_where_it_can_be() -> None:
    def mean_k(choose: nn.Module, columns: int = E) -> float | None:
        return Router(LinearScore(D, columns), choose).mean_k()

    assert mean_k(TopK(2)) == 2.0
    assert mean_k(TopK(2, num_null=1)) is None
    assert mean_k(TopP(0.5)) is None
    assert mean_k(ExpertChoice(1.5)) == 1.5
    assert mean_k(Dense()) == 4.0
    router = Router(LinearScore(D, E), TopK(2))
    assert SumRouters([router, copy.deepcopy(router)]).mean_k() == 4.0
    assert ConditionalSplit(router).mean_k() == 2.0
    assert RouterBase().mean_k() is None


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [Jitter(0.1), GaussianNoise(D, E)], ids=lambda n: type(n).__name__)
def test_noise_acts_in_training_only_and_follows_the_seed(noise: nn.Module) -> None:
    router = Router(LinearScore(D, E), TopK(2), noise=noise)
    x = torch.randn(50, D)
    clean = x @ router.score.weight.T
    torch.manual_seed(1)
    a = router(x).logits_NE
    torch.manual_seed(1)
    assert torch.equal(a, router(x).logits_NE)
    assert not torch.equal(a, router(x).logits_NE)
    assert not torch.equal(a, clean)
    torch.testing.assert_close(router.eval()(x).logits_NE, clean)


def test_jitter_stays_within_its_width_and_out_of_the_experts() -> None:
    jittered = Jitter(0.1).on_features(torch.ones(2000, 3))
    assert jittered.min() >= 0.9
    assert jittered.max() <= 1.1
    assert jittered.mean().item() == pytest.approx(1.0, abs=0.01)
    history, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(Jitter(0.1).on_features((history, mask))[1], mask)
    layer = MoELayer(Router(LinearScore(D, E), TopK(1, weighing="ones"), noise=Jitter(0.5)), MLPExperts(E, D, 6))
    x = torch.randn(8, D)
    before = x.clone()
    with torch.no_grad():
        layer.experts.w_in.copy_(layer.experts.w_in[:1].expand_as(layer.experts.w_in))
        layer.experts.b_in.zero_()
        layer.experts.w_out.copy_(layer.experts.w_out[:1].expand_as(layer.experts.w_out))
        layer.experts.b_out.zero_()
        assert torch.equal(layer(x), layer(x))
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="eps"):
        Jitter(1.0)


def test_gaussian_noise_starts_with_one_scale_for_all() -> None:
    noisy = GaussianNoise(D, E).on_logits(torch.zeros(4000, E), torch.randn(4000, D))
    assert noisy.std().item() == pytest.approx(math.log(2), rel=0.03)


def test_gumbel_noise_samples_from_the_softmax() -> None:
    s = torch.tensor([1.0, 0.0, -1.0])
    drawn = GumbelNoise(0.7).on_logits(s.expand(20_000, -1), torch.zeros(0)).argmax(-1)
    share = torch.bincount(drawn, minlength=3) / 20_000
    torch.testing.assert_close(share, s.softmax(-1), atol=0.015, rtol=0)
    with pytest.raises(ValueError, match="tau"):
        GumbelNoise(0.0)


# --- capacity ---------------------------------------------------------------------------------------------------------


def top(k: int, num_rows: int, weighing: str = "softmax", shift: float = 0.0) -> Routing:
    choose = TopK(k, weighing=weighing)
    choose.bind(E)
    s = torch.randn(num_rows, E, dtype=torch.float64) + shift
    return choose(s.requires_grad_())


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("weighing", ["softmax", "identity"])
def test_nothing_is_dropped_while_no_expert_overflows(policy: str, weighing: str) -> None:
    for shift in (0.0, -50.0):  # negative logits once made a released router drop nearly everything
        routing = top(2, 40, weighing, shift)
        room = int(routing.counts().max())
        kept = Capacity(room * E / 80 - 1e-9, policy=policy, minimum=1)(routing)
        assert torch.equal(kept.expert_M, routing.expert_M)
        assert torch.equal(kept.weight_M, routing.weight_M)


def test_room_for_every_row_is_dropless() -> None:
    routing = top(2, 10)
    assert Capacity(100.0)(routing) is routing
    assert Capacity(0.01, minimum=10)(routing) is routing


@pytest.mark.parametrize("policy", ["position", "probability"])
def test_capacity_equals_a_loop(policy: str) -> None:
    routing = top(2, 37)
    limit = math.ceil(0.6 * 2 * 37 / E)
    kept = Capacity(0.6, policy=policy)(routing)
    ids, w = routing.expert_M.view(37, 2), routing.weight_M.detach().view(37, 2)
    order = [(n, j) for j in range(2) for n in range(37)]
    if policy == "probability":
        order = sorted(((n, j) for n in range(37) for j in range(2)), key=lambda nj: -float(w[nj]))
    used, expected = [0] * E, torch.full((37, 2), E)
    for n, j in order:
        e = int(ids[n, j])
        if used[e] < limit:
            used[e], expected[n, j] = used[e] + 1, e
    assert torch.equal(kept.expert_M, expected.flatten())
    assert kept.counts().max() == limit
    assert torch.equal(kept.weight_M != 0, kept.expert_M < E)


def test_sentinels_take_no_room_and_evaluation_has_its_own_factor() -> None:
    row = torch.arange(12)
    expert = torch.tensor([E] * 6 + [0] * 6)
    routing = Routing(row, expert, torch.ones(12), 12, E, top_k=1)
    capacity = Capacity(1.0, minimum=1, eval_factor=2.0)  # of 6 assignments: 2 in training, 3 in evaluation
    assert capacity(routing).expert_M.tolist() == [E] * 6 + [0] * 2 + [E] * 4
    assert capacity.eval()(routing).counts().tolist() == [3, 0, 0, 0]


def test_capacity_of_top_p_takes_the_mean_of_what_rows_ask_for() -> None:
    # 6 rows of one expert and 2 of three: 12 assignments of 4 experts; the static K of p = 0.6 is 3
    one, three = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.28, 0.26, 0.24, 0.22])
    choose = TopP(0.6)
    choose.bind(E)
    routing = choose(torch.stack([one] * 6 + [three] * 2).log())
    assert routing.counts().tolist() == [8, 2, 2, 0]
    assert routing.top_k == 3
    assert Capacity(1.0, minimum=1)(routing).counts().tolist() == [3, 2, 2, 0]
    assert Capacity(1.0, minimum=1)(routing.repeat_rows(2)).counts().tolist() == [6, 4, 4, 0]


def test_capacity_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="'position' or 'probability'"):
        Capacity(1.0, policy="random")
    with pytest.raises(ValueError, match="factors above 0"):
        Capacity(0.0)
    with pytest.raises(ValueError, match="k assignments per row"):
        Capacity(1.0)(
            Routing(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.ones(1), 1, E)
        )


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Router(LinearScore(D, E), TopK(2, weighing="sigmoid", balance_bias=True)),
        lambda: Router(PrototypeScore(D, E), TopK(1, weighing="identity")),
        lambda: Router(LinearScore(D, E), Threshold(1.0)),
        lambda: Router(TableScore(3, E), TopK(1)),
        lambda: ConditionalSplit(Router(CosineScore(D, E, proj_dim=3), TopK(2))),
    ],
)
def test_state_dict_round_trip(make: Callable[[], RouterBase]) -> None:
    source, target, x = make(), make(), torch.randn(20, D)
    group = torch.arange(20) % 3 - 1
    with torch.no_grad():
        for values in (*source.parameters(), *source.buffers()):
            values.add_(torch.rand_like(values))
    target.load_state_dict(source.state_dict())
    a, b = source.eval()(x, group=group), target.eval()(x, group=group)
    assert torch.equal(a.expert_M, b.expert_M)
    assert torch.equal(a.weight_M, b.weight_M)
    clone = copy.deepcopy(source)
    assert torch.equal(clone(x, group=group).weight_M, a.weight_M)


def test_a_fitted_gate_is_saved() -> None:
    router = Router(LinearScore(D, E, bias=True), TopK(1, weighing="ones"))
    label = torch.arange(20) % E
    x = torch.eye(E, D)[label]
    router.score.fit(x, F.one_hot(label, E).float())
    other = Router(LinearScore(D, E, bias=True), TopK(1, weighing="ones"))
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(x).expert_M, label)
