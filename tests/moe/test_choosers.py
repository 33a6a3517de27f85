# SPDX-License-Identifier: Apache-2.0
"""Laws that every chooser obeys: masks, permutations, right and finite gradients, one size, a short source."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch

from moeapps.moe import Chooser, Dense, ExpertChoice, GroupLimitedTopK, SlotRouting, Slots, Threshold, TopK
from tests.moe.chooser_common import CHOOSERS, E, bound, logits


@pytest.fixture(params=CHOOSERS, ids=str)
def choose(request: pytest.FixtureRequest) -> Chooser:
    return bound(CHOOSERS[request.param]())


@pytest.mark.parametrize("num_rows", [0, 1, 2, 33])
def test_any_number_of_rows(choose: Chooser, num_rows: int) -> None:
    routing = choose(logits(num_rows), group=torch.zeros(num_rows, dtype=torch.int64))
    assert routing.num_rows == num_rows
    assert routing.counts().shape == (choose.num_experts,)
    assert routing.assignment().shape == (num_rows, choose.num_experts)
    assert routing.assignment().isfinite().all()


def test_a_mask_of_all_false_leaves_no_work_and_no_nan(choose: Chooser) -> None:
    s, none = logits(9), torch.zeros(9, dtype=torch.bool)
    routing = choose(s, token_mask=none, group=torch.zeros(9, dtype=torch.int64))
    assert not routing.assignment().any()
    if not isinstance(routing, SlotRouting):  # slots always run; here they are empty mixtures
        assert not routing.counts().any()
    if routing.assignment().requires_grad:
        assert not torch.autograd.grad(routing.assignment().sum(), s)[0].any()


def test_masked_rows_get_exactly_nothing_and_the_others_stay(choose: Chooser) -> None:
    s, mask = logits(12), torch.arange(12) % 3 > 0
    group = torch.zeros(12, dtype=torch.int64)
    dense = choose(s, token_mask=mask, group=group).assignment()
    assert not dense[~mask].any()
    if isinstance(choose, ExpertChoice | Threshold | Slots):  # those look at the batch
        return
    # Rows that do not compete stay as they are; those that do compete as if the others were not there.
    alone = choose(s, group=group).assignment()[mask] if choose.pool == "row" else choose(s[mask]).assignment()
    torch.testing.assert_close(dense[mask], alone)


def test_permuting_rows_permutes_the_assignment(choose: Chooser) -> None:
    s, order, group = logits(30), torch.randperm(30), torch.arange(30) % 3
    torch.testing.assert_close(
        choose(s[order], group=group[order]).assignment(), choose(s, group=group).assignment()[order]
    )


def test_permuting_experts_permutes_the_assignment(choose: Chooser) -> None:
    if choose.num_null or choose.num_shared or isinstance(choose, GroupLimitedTopK | Slots | Dense):
        order = torch.arange(E)  # columns have places of their own there
    else:
        order = torch.randperm(E)
    s, group = logits(30), torch.arange(30) % 3
    dense = choose(s, group=group).assignment()
    permuted = choose(s[:, order], group=group).assignment()
    torch.testing.assert_close(permuted, dense[:, order] if dense.shape[1] == E else dense)


def test_gradients_of_the_weights_are_right(choose: Chooser) -> None:
    choose.eval()
    group = torch.arange(5) % 2
    if isinstance(choose, Slots):
        assert torch.autograd.gradcheck(lambda s: choose(s).dispatch, logits(5))
    assert torch.autograd.gradcheck(lambda s: choose(s, group=group).assignment(), logits(5))


def test_extreme_and_equal_logits_stay_finite(choose: Chooser) -> None:
    for value in (0.0, 200.0, -200.0):
        s = torch.full((7, E), value, dtype=torch.float32).requires_grad_()
        routing = choose(s, group=torch.zeros(7, dtype=torch.int64))
        assert routing.assignment().isfinite().all()
        if routing.assignment().requires_grad:
            (grad,) = torch.autograd.grad(routing.assignment().sum(), s)
            assert grad.isfinite().all()


@pytest.mark.parametrize("kind", dict.fromkeys(type(make()) for make in CHOOSERS.values()), ids=lambda t: t.__name__)
def test_a_chooser_is_at_most_sixty_lines(kind: type[Chooser]) -> None:
    tree = ast.parse(inspect.getsource(kind))
    source = inspect.getsource(kind).splitlines()
    docs = [
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
    ]
    documented = {line for d in docs for line in range(d.lineno, (d.end_lineno or d.lineno) + 1)}
    code = [n for n, text in enumerate(source, 1) if text.strip() and n not in documented]
    assert len(code) <= 60


def test_one_chooser_serves_one_size() -> None:
    choose = bound(TopK(2))
    assert choose.bind(E) == E
    with pytest.raises(ValueError, match="one chooser per router"):
        choose.bind(E + 1)
