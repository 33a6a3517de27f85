# SPDX-License-Identifier: Apache-2.0
"""Rows that choose experts, by top-k or top-p, null and gated shared ones included: who, and with which weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moeapps.moe import Chooser, GatedShared, GroupLimitedTopK, Record, TopK, TopP
from moeapps.moe.objectives import column_counts
from moeapps.moe.routers.chooser import top_indices
from tests.moe.chooser_common import CHOOSERS, E, bound, ids, logits, weights

# --- top-k ------------------------------------------------------------------------------------------------------------


def test_softmax_then_top_k_renormalised_is_top_k_then_softmax() -> None:
    s = logits()
    a, b = bound(TopK(3))(s), bound(TopK(3, weighing="topk_softmax"))(s)
    assert torch.equal(a.expert_M, b.expert_M)
    torch.testing.assert_close(a.weight_M, b.weight_M)
    probe = torch.randn_like(a.weight_M)
    (grad_a,) = torch.autograd.grad((a.weight_M * probe).sum(), s)
    (grad_b,) = torch.autograd.grad((b.weight_M * probe).sum(), s)
    torch.testing.assert_close(grad_a, grad_b)


@pytest.mark.parametrize("k", [1, 2, 5, 9, 12])
def test_top_k_agrees_with_torch_and_ties_go_to_the_lowest_index(k: int) -> None:
    s = torch.randn(50, 12)
    assert torch.equal(top_indices(s, k), s.topk(k, dim=-1).indices)
    assert torch.equal(top_indices(torch.zeros(3, 12), k), torch.arange(k).expand(3, -1))


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("k", [2, 3])
def test_no_expert_is_taken_twice_where_scores_forbid_all_others(rows: int, k: int) -> None:
    s = torch.full((rows, 4), float("-inf"), dtype=torch.float64)
    s[:, 2] = 1.0

    expected = torch.tensor([2, 0, 1][:k]).expand(rows, -1)  # the allowed one, then the lowest indices
    assert torch.equal(top_indices(s, k), expected)
    routing = bound(TopK(k), 4)(s)
    assert torch.equal(weights(routing), torch.tensor([1.0, 0.0, 0.0][:k], dtype=s.dtype).expand(rows, -1))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_row_gets_the_same_experts_alone_and_among_many(k: int) -> None:
    s = torch.randn(50, 12).round(decimals=1)  # with ties

    assert torch.equal(torch.cat([top_indices(row, k) for row in s.split(1)]), top_indices(s, k))


@pytest.mark.parametrize(("weighing", "activation"), [("softmax", lambda s: s.softmax(-1)), ("sigmoid", torch.sigmoid)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_weights_are_what_the_formula_says(
    weighing: str, activation: Callable[[Tensor], Tensor], renormalise: bool
) -> None:
    s = logits()
    routing = bound(TopK(2, weighing=weighing, renormalise=renormalise, scale=1.7))(s)
    chosen = activation(s).gather(-1, ids(routing))
    expected = 1.7 * (chosen / chosen.sum(-1, keepdim=True) if renormalise else chosen)
    torch.testing.assert_close(weights(routing), expected)
    torch.testing.assert_close(routing.probs_NE, activation(s))


def test_renormalisation_is_on_by_default_where_it_means_something() -> None:
    assert TopK(2).renormalise
    assert TopK(2, weighing="sigmoid").renormalise
    assert not TopK(1).renormalise
    assert not TopK(2, weighing="ones").renormalise
    assert not TopK(2, weighing="identity").renormalise


def test_gradient_reaches_chosen_logits_only_when_renormalised_and_all_otherwise() -> None:
    s = logits(20)
    routing = bound(TopK(2))(s)
    chosen = torch.zeros_like(s, dtype=torch.bool).scatter(-1, ids(routing), True)
    (grad,) = torch.autograd.grad((routing.weight_M * torch.randn_like(routing.weight_M)).sum(), s)
    torch.testing.assert_close(grad[~chosen], torch.zeros_like(grad[~chosen]))
    (grad,) = torch.autograd.grad(bound(TopK(2, renormalise=False))(s).weight_M.sum(), s)
    assert grad.abs().min() > 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"k": 1, "renormalise": True}, "no gradient"),
        ({"k": 1, "renormalise": True, "weighing": "sigmoid"}, "no gradient"),
        ({"k": 1, "weighing": "topk_softmax"}, "weighing='ones' if that is what you want"),
        ({"k": 2, "renormalise": True, "weighing": "identity"}, "not for weighing='identity'"),
        ({"k": 0}, "top_k=0"),
        ({"k": 2, "weighing": "soft"}, "use softmax, topk_softmax"),
        ({"k": 2, "num_null": -1}, "num_null >= 0"),
        ({"k": 2, "null_mass": "gone"}, "'lost' or 'redistributed'"),
    ],
)
def test_illegal_weighings_are_refused(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TopK(**arguments)


def test_more_choices_than_experts_says_what_is_given_allowed_and_to_do() -> None:
    with pytest.raises(ValueError, match=r"top_k=5, but there are only 4 experts.*use 1 <= top_k <= 4, or add experts"):
        TopK(5).bind(4)
    assert TopK(5, num_null=1).bind(5) == 4
    with pytest.raises(ValueError, match="no routed expert"):
        TopK(1, num_null=3).bind(3)


def test_bias_selects_and_never_weighs() -> None:
    s = logits()
    plain, biased = bound(TopK(2, weighing="sigmoid")), bound(TopK(2, weighing="sigmoid", balance_bias=True))
    assert biased.bias.dtype == torch.float32
    assert torch.equal(plain(s).weight_M, biased(s).weight_M)
    biased.bias += 0.3  # a common offset changes nothing
    assert torch.equal(plain(s).expert_M, biased(s).expert_M)
    biased.bias[4] = 5.0
    routing = biased(s)
    assert (ids(routing)[:, 0] == 4).all()
    chosen = s.sigmoid().gather(-1, ids(routing))
    torch.testing.assert_close(weights(routing), chosen / chosen.sum(-1, keepdim=True))


def test_bias_stays_in_full_precision_when_the_model_is_cast() -> None:
    choose = bound(TopK(2, balance_bias=True))
    choose.bias += 1e-4
    exact = choose.bias.double()
    assert choose.to(torch.bfloat16).bias.dtype == torch.float32
    assert torch.equal(choose.to(torch.float64).bias, exact)  # not a digit went lost on the way
    choose.to(torch.float32)
    assert "bias" in choose.state_dict()
    assert "bias" not in bound(TopK(2)).state_dict()


def test_no_null_experts_is_the_plain_chooser() -> None:
    s = logits()
    for a, b in ((TopK(2), TopK(2, num_null=0)), (TopP(0.5), TopP(0.5, num_null=0))):
        assert torch.equal(bound(a)(s).assignment(), bound(b)(s).assignment())


@pytest.mark.parametrize(
    "make", [lambda m: TopK(3, num_null=2, null_mass=m), lambda m: TopP(0.8, num_null=2, renormalise=True, null_mass=m)]
)
def test_null_experts_take_their_share_or_give_it_back(make: Callable[[str], Chooser]) -> None:
    s = logits(200)
    lost, given = bound(make("lost"))(s), bound(make("redistributed"))(s)
    assert torch.equal(lost.expert_M, given.expert_M)
    some = lost.assignment().sum(-1) > 0
    assert some.any()
    torch.testing.assert_close(given.assignment().sum(-1)[some], torch.ones(int(some.sum()), dtype=torch.float64))
    assert (lost.assignment().sum(-1) < 1 + 1e-12).all()
    assert (lost.assignment().sum(-1)[some] < 0.99).any()


@pytest.mark.parametrize("name", ["null", "null_redistributed", "null_topk_softmax", "top_p_null"])
def test_a_row_of_nulls_alone_is_exactly_nothing(name: str) -> None:
    s = torch.zeros(3, E, dtype=torch.float64)
    s[:, -2:] = 60.0
    choose = TopK(2, num_null=2, null_mass="redistributed") if name == "null_redistributed" else CHOOSERS[name]()
    if name == "null":
        choose = TopK(2, num_null=2)
    if name == "null_topk_softmax":
        choose = TopK(2, weighing="topk_softmax", num_null=2, null_mass="redistributed")
    s.requires_grad_()
    routing = bound(choose)(s)
    assert not routing.counts().any()
    assert not routing.weight_M.any()
    assert torch.autograd.grad(routing.weight_M.sum(), s)[0].isfinite().all()


@pytest.mark.parametrize(
    "choose",
    [TopK(3, num_null=2), TopP(0.7, num_null=2), GatedShared(TopP(0.7, num_null=2), 1)],
    ids=["top_k", "top_p", "gated"],
)
def test_null_choices_are_told_apart_from_padding_and_masked_rows(choose: Chooser) -> None:
    columns = 6 + 2 + choose.num_shared
    s, mask = logits(columns=columns), torch.arange(40) % 4 > 0
    routing = bound(choose, columns)(s, token_mask=mask)
    probs = s[:, :8].detach().softmax(-1)
    expected = 0
    for row, counts in zip(probs, mask, strict=True):
        order = row.sort(descending=True).indices
        size = 3 if isinstance(choose, TopK) else int((row[order].cumsum(0) < 0.7).sum()) + 1
        expected += int((order[:size] >= 6).sum()) if counts else 0
    assert routing.null_M.sum() == expected > 0
    assert (routing.expert_M[routing.null_M] == 6).all()
    assert bound(TopK(2))(s[:, :6]).null_M is None
    share = column_counts(Record("moe", routing, nn.Identity(), token_mask=mask))
    assert share.tolist() == [*routing.counts().tolist(), expected / 2, expected / 2]


def scores_by_hand(row: Tensor, weighing: str) -> list[float]:
    if weighing in ("identity", "ones"):
        return row.tolist()
    if weighing == "sigmoid":
        return [1 / (1 + math.exp(-v)) for v in row.tolist()]
    return [math.exp(v) / sum(math.exp(u) for u in row.tolist()) for v in row.tolist()]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighing", ["softmax", "topk_softmax", "sigmoid", "identity", "ones"])
def test_group_limited_choice_equals_a_loop(weighing: str, bias: bool) -> None:
    s = logits(60)
    choose = bound(GroupLimitedTopK(2, num_groups=3, keep_groups=2, weighing=weighing, balance_bias=bias))
    other = 0
    for row, chosen in zip(s.detach(), ids(choose(s)).tolist(), strict=True):
        # with a bias of 0 the scores are the same, but topk_softmax then adds the bias to its logits
        score = scores_by_hand(row, "identity" if bias and weighing == "topk_softmax" else weighing)
        best = sorted(range(3), key=lambda g: -sum(score[2 * g : 2 * g + 2]))[:2]
        open_ = [e for g in best for e in (2 * g, 2 * g + 1)]
        assert chosen == sorted(open_, key=lambda e: -float(row[e]))[:2]
        other += set(best) != set(sorted(range(3), key=lambda g: -float(row[2 * g : 2 * g + 2].sum()))[:2])
    assert (other > 0) == (weighing in ("softmax", "sigmoid") or (weighing == "topk_softmax" and not bias))


def test_groups_are_ranked_by_scores_and_not_by_logits() -> None:
    def kept(weighing: str, *row: float) -> list[int]:
        choose = GroupLimitedTopK(2, num_groups=2, keep_groups=1, weighing=weighing)
        return ids(bound(choose, 4)(torch.tensor([row])))[0].tolist()

    assert kept("softmax", 6.0, -6.0, 1.0, 1.0) == [0, 1]  # sums of logits 0 < 2, of exponentials 403 > 5.4
    assert kept("sigmoid", 5.0, 0.5, 2.5, 2.5) == [2, 3]  # sums of logits 5.5 > 5, of sigmoids 1.62 < 1.85


def test_every_group_kept_is_no_limit() -> None:
    s = logits(60)
    every = bound(GroupLimitedTopK(2, num_groups=3, keep_groups=3))(s)
    assert torch.equal(every.assignment(), bound(TopK(2))(s).assignment())


def test_groups_must_fit() -> None:
    with pytest.raises(ValueError, match="must divide"):
        GroupLimitedTopK(2, num_groups=4, keep_groups=2).bind(6)
    with pytest.raises(ValueError, match="hold at least top_k=3"):
        GroupLimitedTopK(3, num_groups=3, keep_groups=1).bind(6)
    with pytest.raises(ValueError, match="keep_groups=4"):
        GroupLimitedTopK(3, num_groups=3, keep_groups=4)


# --- top-p ------------------------------------------------------------------------------------------------------------


@given(p=st.floats(0.01, 1.0), seed=st.integers(0, 10_000), scale=st.floats(0.0, 8.0))
@settings(max_examples=25, deadline=None)
def test_top_p_takes_the_smallest_set_that_reaches_p(p: float, seed: int, scale: float) -> None:
    s = torch.randn(8, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    routing = bound(TopP(p))(s)
    probs, dense = s.softmax(-1), routing.assignment()
    taken = dense > 0
    assert (taken.sum(-1) >= 1).all()
    total = (probs * taken).sum(-1)
    assert (total >= min(p, 1.0) - 1e-9).all()
    smallest = probs.where(taken, 2.0).min(-1).values
    if p < 1:
        assert (total - smallest < p).all()
    torch.testing.assert_close(dense, probs.where(taken, 0))
    assert routing.top_k <= math.floor(p * E) + 1


def test_top_p_grows_with_p_from_one_expert_to_all() -> None:
    s = logits(100)
    sizes = [bound(TopP(p))(s).assignment().gt(0).sum(-1) for p in (1e-6, 0.2, 0.5, 0.7, 0.9, 1.0)]
    assert (sizes[0] == 1).all()
    assert (sizes[-1] == E).all()
    assert all((a <= b).all() for a, b in pairwise(sizes))
    full = bound(TopP(1.0, renormalise=True))(s)
    torch.testing.assert_close(full.assignment(), s.softmax(-1))


def test_top_p_of_uniform_and_certain_rows() -> None:
    assert bound(TopP(0.7), 9)(torch.zeros(1, 9)).counts().sum() == math.ceil(0.7 * 9)
    certain = torch.zeros(1, 9)
    certain[0, 3] = 50.0
    assert ids(bound(TopP(0.7), 9)(certain)).tolist()[0][:2] == [3, 9]


def test_top_p_of_one_takes_all_in_single_precision() -> None:
    s = torch.randn(2000, 9) * 3  # cumulative sums in float32 may end below or at 1 early
    assert (bound(TopP(1.0), 9)(s).counts() == 2000).all()


def test_top_p_can_be_limited_and_is_checked() -> None:
    routing = bound(TopP(0.9, max_k=2))(logits())
    assert routing.top_k == 2
    for p in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match="0 < p <= 1"):
            TopP(p)


# --- shared experts weighed by the router -----------------------------------------------------------------------------


def test_gated_weights_sum_to_one() -> None:
    s = logits(columns=8)
    routing = bound(GatedShared(TopK(3), 2), 8)(s)
    assert routing.num_experts == 6
    assert routing.shared_weight_NS.shape == (40, 2)
    total = routing.assignment().sum(-1) + routing.shared_weight_NS.sum(-1)
    torch.testing.assert_close(total, torch.ones(40, dtype=torch.float64))
    assert routing.logits_NE.shape == (40, 6)
    with pytest.raises(ValueError, match="num_shared=0"):
        GatedShared(TopK(3), 0)
