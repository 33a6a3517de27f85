# SPDX-License-Identifier: Apache-2.0
"""SparseMixer: who is kept and drawn, what a draw weighs, what it teaches; and the balance loss of chosen columns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeapps.moe import (
    Capacity,
    ChosenBalance,
    ConditionalSplit,
    GatedShared,
    LinearScore,
    MLPExperts,
    MoELayer,
    MoERecorder,
    Record,
    Router,
    RowChooser,
    SparseMixer,
    TopK,
    TopP,
)
from moeapps.moe.objectives import chosen_balance
from tests.moe.chooser_common import E, bound, logits

TIE = torch.tensor([[1.99, 2.0, 0.5, -3.0]], dtype=torch.float64)
"""Columns 1 and 0 lie 0.005 of the larger apart, the others far."""
SHARES = torch.tensor([math.exp(1.99), math.exp(2.0)], dtype=torch.float64)
SHARES = SHARES / SHARES.sum()


def test_evaluation_takes_the_best_and_shares_a_draw_among_near_ties_only() -> None:
    choose = bound(SparseMixer(2, renormalise=False), 4).eval()
    routing = choose(TIE)

    assert routing.expert_M.tolist() == [1, 0]
    # The second draw is of column 0 alone: the next is three quarters below it.
    torch.testing.assert_close(routing.weight_M, torch.stack([SHARES[1], torch.ones(()).double()]))
    total = SHARES[1] + 1
    again = bound(SparseMixer(2), 4).eval()(TIE).weight_M
    torch.testing.assert_close(again, torch.stack([SHARES[1], torch.ones(()).double()]) / (total + 1e-6))


@pytest.mark.parametrize(("gap", "kept"), [(0.0199, True), (0.0201, False)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_gap_is_relative_to_the_larger_of_the_two(gap: float, kept: bool, sign: float) -> None:
    large = 50.0
    s = torch.tensor([[large, large * (1 - gap)]] if sign > 0 else [[-large, -large * (1 - gap)]], dtype=torch.float64)
    weight = bound(SparseMixer(1, renormalise=False), 2).eval()(s).weight_M

    assert (float(weight) < 1) == kept


def draws(choose: RowChooser, s: Tensor, times: int = 40_000) -> tuple[Tensor, Tensor]:
    routing = choose.train()(s.expand(times, -1))
    k = routing.top_k
    assert k is not None
    return routing.expert_M.view(times, k), routing.weight_M.view(times, k)


def test_training_draws_by_the_shares_and_counts_a_second_best_fully_a_quarter_of_the_time() -> None:
    expert, weight = draws(bound(SparseMixer(1, renormalise=False), 4), TIE)
    first, other = (expert[:, 0] == e for e in (1, 0))

    assert bool((first | other).all())
    assert float(first.double().mean()) == pytest.approx(float(SHARES[1]), abs=0.01)
    torch.testing.assert_close(weight[first], SHARES[1].expand(int(first.sum()), 1))
    values = weight[other][:, 0] / SHARES[0]
    assert sorted(set(values.round(decimals=6).tolist())) == [0.3333, 1.0]
    assert float((values > 0.9).double().mean()) == pytest.approx(0.25, abs=0.015)


def test_each_draw_has_noise_of_its_own() -> None:
    """Two pairs of equal logits: were the noise shared, the second draw would follow the first."""
    s = torch.tensor([[4.0, 4.0, 1.0, 1.0]], dtype=torch.float64)
    expert, _ = draws(bound(SparseMixer(3, renormalise=False), 4), s)
    one, three = expert[:, 0] == 0, expert[:, 2] == 2

    assert set(expert[:, :2].flatten().tolist()) == {0, 1}
    assert float((one & three).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert all(len(set(row.tolist())) == 3 for row in expert[:50])


def test_the_gradient_is_that_of_the_whole_share_whatever_the_draw_counted() -> None:
    """By the formula q_c (1_c - q), draw by draw, with q from the columns that were left and near."""
    s = (2 + 0.02 * logits(200)).requires_grad_()
    choose = bound(SparseMixer(3, renormalise=False, eps=0.05), E).train()
    routing = choose(s)
    probe = torch.randn(200, 3).double()
    (found,) = torch.autograd.grad((routing.weight_M.view(200, 3) * probe).sum(), s)
    wanted = torch.zeros(200, E).double()
    for n, row in enumerate(routing.expert_M.view(200, 3).tolist()):
        left = list(range(E))
        for i, c in enumerate(row):
            best = max(left, key=lambda e: float(s[n, e].detach()))
            top = s[n, best].detach()
            near = [e for e in left if (top - s[n, e].detach()) / max(abs(top), abs(s[n, e].detach())) <= 0.1]
            q = s[n, near].detach().softmax(0)
            assert c in near
            q_c = q[near.index(c)]
            for e, share in zip(near, q, strict=True):
                wanted[n, e] += probe[n, i] * q_c * ((1.0 if e == c else 0.0) - share)
            left.remove(c)

    torch.testing.assert_close(found, wanted)
    scaled = routing.weight_M < 0.3334
    assert bool(scaled.any())


def test_as_many_are_taken_as_reach_p_and_nulls_share_the_weight() -> None:
    s = logits(60)
    mixed, plain = (bound(c, E).eval()(s) for c in (SparseMixer(p=0.6, num_null=2), TopP(0.6, num_null=2)))

    assert mixed.top_k == plain.top_k
    assert torch.equal(mixed.expert_M, plain.expert_M)  # evaluation chooses as top-p does
    assert mixed.null_M is not None
    assert plain.null_M is not None
    assert torch.equal(mixed.null_M, plain.null_M)
    assert 0 < int(mixed.null_M.sum()) < 60
    sums = mixed.weight_M.view(60, -1).sum(1)
    takes_null = mixed.null_M.view(60, -1).any(1)
    torch.testing.assert_close(sums[~takes_null], torch.ones_like(sums[~takes_null]), atol=2e-6, rtol=0)
    assert bool((sums[takes_null] < 0.95).all())


def test_p_of_1_takes_every_column_once() -> None:
    for training in (True, False):
        routing = bound(SparseMixer(p=1.0), E).train(training)(10 * logits(500).float())
        assert routing.counts().tolist() == [500] * E


def test_without_draws_training_is_evaluation() -> None:
    choose, s = bound(SparseMixer(2, draws=False), E), logits(30)
    trained, evaluated = choose.train()(s), choose.eval()(s)

    assert torch.equal(trained.expert_M, evaluated.expert_M)
    assert torch.equal(trained.weight_M, evaluated.weight_M)


def test_a_layer_with_a_mask_and_no_rows_at_all_runs_in_training() -> None:
    router = Router(LinearScore(4, E + 2), GatedShared(SparseMixer(p=0.7, num_null=1), 1))
    layer = MoELayer(router, MLPExperts(E + 1, 4, 8), num_shared=1)
    y = layer(torch.randn(6, 4), token_mask=torch.tensor([True, False] * 3))

    assert torch.equal(y[1::2], torch.zeros(3, 4))
    assert layer(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give either k >= 1 or 0 < p <= 1"),
        ({"k": 2, "p": 0.5}, "give either"),
        ({"k": 0}, "k=0"),
        ({"p": 1.5}, "p=1.5"),
        ({"k": 2, "eps": -1.0}, "eps=-1.0"),
        ({"k": 1}, "renormalise=False"),
        ({"k": 2, "num_null": -1}, "num_null=-1"),
    ],
)
def test_settings_that_make_no_chooser_are_refused(options: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SparseMixer(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k=4, but there are only 2 experts and 1 null experts"):
        bound(SparseMixer(4, num_null=1), 3)


# --- the balance loss -------------------------------------------------------------------------------------------------


def record(choose: RowChooser, x: Tensor, columns: int, **options: Tensor) -> Record:
    experts = columns - choose.num_null
    layer = MoELayer(Router(LinearScore(x.shape[1], columns), choose), MLPExperts(experts, x.shape[1], 4)).double()
    torch.nn.init.normal_(layer.router.score.weight)
    with MoERecorder() as recorder:
        layer(x, **options)
    return recorder.records[0]


@pytest.mark.parametrize("nulls", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_balance_is_the_sum_over_columns_of_raw_counts_times_chosen_shares(nulls: int, masked: bool) -> None:
    x = torch.randn(40, 5).double().requires_grad_()
    mask = torch.rand(40) > 0.4 if masked else torch.ones(40, dtype=torch.bool)
    made = record(TopP(0.7, num_null=nulls), x, 5, token_mask=mask)
    s = made.routing.logits_NE
    assert s is not None
    counts, shares = torch.zeros(5).double(), torch.zeros(5).double()
    rows = mask.nonzero()[:, 0].tolist()
    for n in rows:
        order = s[n].softmax(0).sort(descending=True)
        chosen, reached = [], 0.0
        for e, share in zip(order.indices.tolist(), order.values.tolist(), strict=True):
            if reached < 0.7:
                chosen.append(e)
            reached += share
        q = s[n, chosen].exp() / s[n, chosen].exp().sum()
        for e, share in zip(chosen, q, strict=True):
            counts[e] += 1 / len(rows)
            shares[e] = shares[e] + share / len(rows)
    wanted = 5 * (counts * shares).sum()

    found = chosen_balance(made)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, retain_graph=True)[0] for y in (found, wanted)))
    assert ChosenBalance(0.5).name == "chosen_balance"
    torch.testing.assert_close(ChosenBalance(1.0).compute(made), wanted)


def test_balance_of_evenly_chosen_columns_is_the_mean_number_chosen() -> None:
    x = torch.eye(E).double()
    layer = MoELayer(Router(LinearScore(E, E), TopK(2)), MLPExperts(E, E, 4)).double()
    with torch.no_grad():  # row n likes columns n and n + 1, equally
        layer.router.score.weight.copy_((x + x.roll(1, 0)) * 9)
    with MoERecorder() as recorder:
        layer(x)

    assert float(chosen_balance(recorder.records[0]).detach()) == pytest.approx(2.0)


def test_balance_needs_marked_nulls_and_bears_drops_and_no_rows() -> None:
    x = torch.randn(12, 5).double()
    made = record(TopP(0.7, num_null=2), x, 5)
    for missing in ({"null_M": None}, {"column_M": None}):
        with pytest.raises(ValueError, match="2 null experts, but its routing does not say"):
            chosen_balance(replace(made, routing=replace(made.routing, **missing)))
    layer = MoELayer(Router(LinearScore(5, 3), TopK(2), capacity=Capacity(0.5)), MLPExperts(3, 5, 4)).double()
    with MoERecorder() as recorder:
        layer(x)
    assert 0 < float(chosen_balance(recorder.records[0]).detach()) < 2
    empty = record(TopK(2), torch.zeros(0, 5).double(), 5)
    assert float(chosen_balance(empty).detach()) == 0


@pytest.mark.parametrize("nulls", [0, 1, 2])
def test_balance_under_a_split_is_that_of_the_rows_and_experts_that_were_routed(nulls: int) -> None:
    x, group = torch.randn(30, 5).double(), torch.arange(30) % 3 - 1
    score = LinearScore(5, 4 + nulls).double()
    torch.nn.init.normal_(score.weight)
    found = []
    for split in (True, False):
        inner = Router(score, TopP(0.7, num_null=nulls))
        router = ConditionalSplit(inner) if split else inner
        layer = MoELayer(router, MLPExperts(router.num_experts, 5, 4)).double()
        with MoERecorder() as recorder:
            layer(*([x] if split else [x[group >= 0]]), **({"group": group} if split else {}))
        found.append(ChosenBalance(1.0)(recorder.records))

    torch.testing.assert_close(*found)


def test_balance_is_averaged_over_layers_unless_told_otherwise() -> None:
    made = record(TopK(2), torch.randn(12, 5).double(), 5)

    assert ChosenBalance().reduction == "mean"
    torch.testing.assert_close(ChosenBalance(0.5)([made, made]), 0.5 * chosen_balance(made))
