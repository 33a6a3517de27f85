# SPDX-License-Identifier: Apache-2.0
"""Top-p within a budget: the mean number of experts is held, and only training moves what holds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moeapps.moe import GatedShared, TopP

E = 6


def bound(choose: TopP, columns: int = E) -> TopP:
    choose.bind(columns)
    return choose


def mean_real(choose: TopP, s: Tensor, **kwargs: Any) -> float:
    return float(choose(s, **kwargs).counts().sum()) / len(s)


@pytest.mark.parametrize("num_null", [0, 2])
@pytest.mark.parametrize("budget", [1.5, 2.0, 3.25])
def test_a_budget_is_held_however_sharp_the_logits_become(num_null: int, budget: float) -> None:
    choose = bound(TopP(0.5, num_null=num_null, budget=budget, decay=0.5), E + num_null)
    for scale in (0.5, 2.0, 6.0):  # a fixed p takes ever fewer
        for _ in range(12):
            choose(torch.randn(4000, E + num_null) * scale)
        assert mean_real(choose, torch.randn(4000, E + num_null) * scale) == pytest.approx(budget, rel=0.05)
    assert choose.mean_k() == budget


def test_the_threshold_moves_after_the_choice_to_the_one_that_meets_the_budget() -> None:
    s = torch.randn(400, E, dtype=torch.float64)
    choose, fixed = bound(TopP(0.3, budget=2.0, decay=0.0)), bound(TopP(0.3))
    assert torch.equal(choose(s).counts(), fixed(s).counts())  # this batch did not decide about itself
    assert choose.eval()(s).counts().sum() == 800
    half = bound(TopP(0.3, budget=2.0, decay=0.5))
    half(s)
    assert float(half.threshold) == pytest.approx((0.3 + float(choose.threshold)) / 2)


def test_budgets_at_the_ends() -> None:
    s = torch.randn(50, E)
    everything = bound(TopP(0.3, budget=float(E), decay=0.0))
    everything(s)
    assert (everything(s).counts() == 50).all()
    one = bound(TopP(0.9, budget=1.0, decay=0.0))
    one(s)
    assert (one(s).assignment().gt(0).sum(-1) == 1).all()
    limited = bound(TopP(0.9, budget=2.0, max_k=3, decay=0.0))
    limited(s)
    assert limited(s).counts().sum() == 100


def test_evaluation_recomputation_masked_rows_and_empty_batches_do_not_move_the_threshold() -> None:
    s, mask = torch.randn(60, E), torch.arange(60) < 20
    choose = bound(TopP(0.6, budget=2.0))
    choose.eval()(s)
    assert float(choose.threshold) == pytest.approx(0.6)
    choose.train()(s[:0])
    choose(s, token_mask=torch.zeros_like(mask))
    assert float(choose.threshold) == pytest.approx(0.6)
    alone, masked = (bound(TopP(0.6, budget=2.0)) for _ in range(2))
    alone(s[:20])
    masked(s, token_mask=mask)
    assert torch.equal(alone.threshold, masked.threshold)


def test_recomputation_chooses_by_the_threshold_of_the_first_pass_and_does_not_move_it() -> None:
    x = torch.randn(60, E, requires_grad=True)
    results = []
    for again in (False, True):
        choose = bound(TopP(0.9, budget=1.5, decay=0.0))  # moves far, so that the second pass would choose otherwise

        def weights(y: Tensor, choose: TopP = choose) -> Tensor:
            return choose(y).weight_M

        y = checkpoint(weights, x, use_reentrant=False) if again else weights(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y, grad, choose.threshold))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_budget_is_in_the_checkpoint_survives_a_cast_and_reaches_gated_shared_experts() -> None:
    s = torch.randn(300, E + 1)
    inner = TopP(0.6, budget=2.0, decay=0.0)
    choose = GatedShared(inner, num_shared=1)
    choose.bind(E + 1)
    choose(s)
    assert choose.eval()(s).counts().sum() == 600
    again = GatedShared(TopP(0.6, budget=2.0), num_shared=1)
    again.bind(E + 1)
    again.load_state_dict(choose.state_dict())
    assert torch.equal(again.eval()(s).expert_M, choose(s).expert_M)
    assert choose.to(torch.bfloat16).choose.threshold.dtype == torch.float32
    assert not TopP(0.6).state_dict()


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="budget=0"):
        TopP(0.5, budget=0)
    with pytest.raises(ValueError, match="decay=1"):
        TopP(0.5, budget=2, decay=1)
    with pytest.raises(ValueError, match="a row takes at most 2 experts"):
        bound(TopP(0.5, budget=3, max_k=2))
