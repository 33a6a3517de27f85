# SPDX-License-Identifier: Apache-2.0
"""Experts that choose rows or take them all: expert choice, thresholds, dense weights and slots."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moeapps.moe import Dense, DenseRouting, DenseToSparse, ExpertChoice, SlotRouting, Slots, Threshold
from tests.moe.chooser_common import E, bound, logits

# --- experts choose rows ----------------------------------------------------------------------------------------------


def test_expert_choice_is_perfectly_balanced_and_takes_the_best_rows() -> None:
    s = logits(33)
    routing = bound(ExpertChoice(2.0))(s)
    assert routing.counts().tolist() == [11] * E
    probs = s.softmax(-1)
    dense = routing.assignment()
    for e in range(E):
        assert torch.equal(dense[:, e].gt(0).nonzero()[:, 0], probs[:, e].topk(11).indices.sort().values)
    torch.testing.assert_close(dense, probs.where(dense > 0, 0))


def test_expert_choice_by_group_equals_one_call_per_group_and_sees_no_others() -> None:
    s = logits(50)
    group = torch.randint(0, 4, (50,)) * 7 - 3  # any ids, in any order
    by_group = bound(ExpertChoice(2.0, per="group"))(s, group=group).assignment()
    for g in group.unique():
        alone = bound(ExpertChoice(2.0))(s[group == g]).assignment()
        torch.testing.assert_close(by_group[group == g], alone)


def test_expert_choice_takes_at_least_one_row_and_no_more_than_there_are() -> None:
    assert bound(ExpertChoice(0.01))(logits(5)).counts().tolist() == [1] * E
    assert bound(ExpertChoice(100.0))(logits(5)).counts().tolist() == [5] * E
    with pytest.raises(ValueError, match="needs group=ids"):
        bound(ExpertChoice(1.0, per="group"))(logits(5))
    with pytest.raises(ValueError, match="factor above 0"):
        ExpertChoice(0.0)


@pytest.mark.parametrize("masked", [False, True])
def test_row_softmax_is_taken_over_the_rows_of_a_group_that_count(masked: bool) -> None:
    s, group = logits(40), torch.randint(0, 4, (40,)) * 7 - 3
    s = s.requires_grad_()
    mask = torch.rand(40) > 0.3 if masked else None
    if mask is not None:
        mask[group == group[0]] = False  # a group that does not count at all
    routing = bound(ExpertChoice(2.0, per="group", weighing="row_softmax"))(s, group=group, token_mask=mask)
    dense = routing.assignment()
    wanted = torch.zeros_like(s)
    for g in group.unique():
        rows = ((group == g) & (True if mask is None else mask)).nonzero()[:, 0]
        for e in range(E):
            total = sum(s[n, e].exp() for n in rows)
            for n in rows:
                wanted[n, e] = s[n, e].exp() / total
    taken = dense != 0

    assert bool(taken.any())
    torch.testing.assert_close(dense, wanted.where(taken, 0))
    probe = torch.randn_like(s)
    found, expected = (torch.autograd.grad((y.where(taken, 0) * probe).sum(), s)[0] for y in (dense, wanted))
    torch.testing.assert_close(found, expected)


def test_row_softmax_over_the_batch_stays_finite_for_huge_logits_and_is_for_expert_choice_alone() -> None:
    s = 1e4 * logits(12)
    dense = bound(ExpertChoice(2.0, weighing="row_softmax"))(s).assignment()

    torch.testing.assert_close(dense, s.softmax(0).where(dense != 0, 0))
    with pytest.raises(ValueError, match=r"'row_softmax': use a factor .* and one of softmax, sigmoid, identity"):
        Threshold(1.0, weighing="row_softmax")  # type: ignore[arg-type]


def test_threshold_trains_like_expert_choice_and_race_takes_the_best_pairs() -> None:
    s = logits(33)
    torch.testing.assert_close(bound(Threshold(2.0))(s).assignment(), bound(ExpertChoice(2.0))(s).assignment())
    race = bound(Threshold(2.0, scope="pairs", weighing="identity"))(s)
    assert race.counts().sum() == 66
    taken = race.expert_M.view(33, E) < E
    assert s[taken].min() > s[~taken].max()


def test_threshold_follows_the_last_taken_score_and_evaluation_ignores_batch_mates() -> None:
    choose, s = bound(Threshold(2.0, decay=0.9)).double(), logits(30)
    for _ in range(7):
        choose(s)
    last = s.softmax(-1).sort(dim=0, descending=True).values[9]
    torch.testing.assert_close(choose.threshold, (1 - 0.9**7) * last)
    choose.eval()
    before = choose.threshold.clone()
    whole = choose(s).assignment()
    alone = torch.cat([choose(row.unsqueeze(0)).assignment() for row in s])
    torch.testing.assert_close(whole, alone)
    assert torch.equal(choose.threshold, before)


def test_threshold_moves_once_under_checkpointing() -> None:
    s = logits(30)
    plain, recomputed = bound(Threshold(2.0)), bound(Threshold(2.0))
    plain(s).assignment().sum().backward()
    checkpoint(lambda x: recomputed(x).assignment(), s, use_reentrant=False).sum().backward()
    assert torch.equal(plain.threshold, recomputed.threshold)


@pytest.mark.parametrize("scope", ["expert", "pairs"])
def test_a_threshold_moves_on_in_a_model_of_half_precision(scope: str) -> None:
    """After n steps towards the same score s it is s (1 - d^n); bfloat16 would stop early."""
    choose, s = bound(Threshold(2.0, scope=scope, decay=0.99)).bfloat16(), logits(30).float()
    for _ in range(400):
        choose(s)
    flat = s.softmax(-1) if scope == "expert" else s.softmax(-1).reshape(-1, 1)
    last = flat.sort(dim=0, descending=True).values[9 if scope == "expert" else 59]

    assert choose.threshold.dtype == torch.float32
    torch.testing.assert_close(choose.threshold, (1 - 0.99**400) * last, rtol=1e-4, atol=1e-5)


# --- dense and slots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighing", ["softmax", "sigmoid", "identity", "ones"])
def test_dense_weights_are_the_formula_and_exactly_zero_where_not_allowed(weighing: str) -> None:
    s, allowed = logits(), torch.tensor([True, True, False, True, False, True])
    routing = bound(Dense(weighing, allowed))(s)
    assert isinstance(routing, DenseRouting)
    kept = s[:, allowed]
    expected = {
        "softmax": kept.softmax(-1),
        "sigmoid": kept.sigmoid(),
        "identity": kept,
        "ones": torch.ones_like(kept),
    }[weighing]
    torch.testing.assert_close(routing.weight[:, allowed], expected)
    assert not routing.weight[:, ~allowed].any()


def test_dense_can_leave_experts_out_by_group() -> None:
    choose = bound(Dense("ones", ~torch.eye(3, dtype=torch.bool)), 3)
    assert choose(torch.zeros(2, 3), group=torch.tensor([2, 0])).weight.tolist() == [[1, 1, 0], [0, 1, 1]]
    with pytest.raises(ValueError, match="needs group=ids"):
        choose(torch.zeros(2, 3))


@pytest.mark.parametrize(("allowed", "text"), [([[True, False], [False, False]], "every row"), ([True], "columns")])
def test_dense_checks_what_is_allowed(allowed: list[object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bound(Dense(allowed=allowed), 2)


def test_dense_to_sparse_is_dense_when_warm_and_top_1_when_cold() -> None:
    s = logits()
    warm, cold = bound(DenseToSparse())(s / 100), bound(DenseToSparse())(s * 1e5)
    torch.testing.assert_close(warm.assignment(), (s / 100).softmax(-1))
    assert torch.equal(cold.assignment().gt(0).sum(-1), torch.ones(40, dtype=torch.int64))
    assert torch.equal(cold.assignment().argmax(-1), s.argmax(-1))
    with pytest.raises(ValueError, match="threshold=1"):
        DenseToSparse(1.0)


def test_slots_mix_rows_and_rows_mix_slots() -> None:
    routing = bound(Slots(2))(logits(20))
    assert isinstance(routing, SlotRouting)
    assert routing.num_experts == 3
    torch.testing.assert_close(routing.dispatch.sum(0), torch.ones(3, 2, dtype=torch.float64))
    torch.testing.assert_close(routing.combine.sum((1, 2)), torch.ones(20, dtype=torch.float64))
    with pytest.raises(ValueError, match="multiple of num_slots"):
        bound(Slots(4))


def test_slots_of_groups_do_not_mix_and_an_empty_group_is_zero() -> None:
    s, group = logits(12), torch.tensor([0, 2] * 6)
    routing = bound(Slots(2, num_groups=3))(s, group=group)
    for g in (0, 2):
        alone = bound(Slots(2))(s[group == g])
        here = slice(2 * g, 2 * g + 2)
        torch.testing.assert_close(routing.dispatch[group == g][..., here], alone.dispatch)
        torch.testing.assert_close(routing.combine[group == g][..., here], alone.combine)
        assert not routing.dispatch[group != g][..., here].any()
    assert not routing.dispatch[..., 2:4].any()
    with pytest.raises(ValueError, match="needs group=ids"):
        bound(Slots(2, num_groups=3))(s)
