# SPDX-License-Identifier: Apache-2.0
"""A ceiling on the rows of a column: who stays, and how what stays shares the weight of what was lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moeapps.moe import Capped, RowChooser, SparseMixer, TopK, TopP
from tests.moe.chooser_common import E, bound, logits, weights

INNER: dict[str, Callable[[], RowChooser]] = {
    "softmax": lambda: TopK(3),
    "scaled": lambda: TopK(3, weighing="sigmoid", scale=2.5),
    "switch": lambda: TopK(1),
    "plain": lambda: TopK(3, renormalise=False, scale=0.5),
    "topk_softmax": lambda: TopK(3, weighing="topk_softmax", scale=2.0),
    "identity": lambda: TopK(3, weighing="identity"),
    "ones": lambda: TopK(3, weighing="ones"),
    "nulls": lambda: TopK(3, num_null=2),
    "nulls_redistributed": lambda: TopK(3, num_null=2, null_mass="redistributed", scale=2.0),
    "nulls_topk_softmax": lambda: TopK(3, weighing="topk_softmax", num_null=2, null_mass="redistributed"),
    "top_p": lambda: TopP(0.6),
    "top_p_renormalised": lambda: TopP(0.6, num_null=1, renormalise=True, null_mass="redistributed"),
    "sparse_mixer": lambda: SparseMixer(3, draws=False),
}


@pytest.mark.parametrize("name", INNER)
def test_weights_stay_where_no_ceiling_binds(name: str) -> None:
    s = logits()
    plain, capped = bound(INNER[name]())(s), bound(Capped(INNER[name](), float(E)))(s)

    assert torch.equal(capped.expert_M, plain.expert_M)
    torch.testing.assert_close(capped.weight_M, plain.weight_M, rtol=3e-6, atol=0)


@pytest.mark.parametrize("name", INNER)
def test_what_a_row_keeps_takes_over_what_it_lost_in_proportion(name: str) -> None:
    s = logits(60)
    plain, capped = bound(INNER[name]())(s), bound(Capped(INNER[name](), 0.6, minimum=1))(s)
    before, after = plain.assignment().detach(), capped.assignment().detach()
    kept, nulls = after != 0, INNER[name]().num_null
    lost = (before != 0) & ~kept
    assert lost.any()
    assert name == "switch" or (kept & lost.any(1, keepdim=True)).any()
    ratio = (after / before).nan_to_num()
    assert (ratio.amax(1) - ratio.where(kept, ratio.amax(1, keepdim=True)).amin(1)).abs().max() < 1e-9  # of a row alike
    if nulls == 0 or INNER[name]().null_mass == "redistributed":  # otherwise nulls share in what was lost
        some = kept.any(1)  # to 1e-6 of the weight that is left, which may be small
        torch.testing.assert_close(after.abs().sum(1)[some], before.abs().sum(1)[some], rtol=0, atol=2e-2)


def test_real_weights_sum_to_1_where_the_mass_of_nulls_is_redistributed() -> None:
    s = logits(80)
    routing = bound(Capped(TopK(3, num_null=2, null_mass="redistributed"), 0.5, minimum=1))(s)
    real = routing.expert_M.view(80, -1) < routing.num_experts
    sums = weights(routing).sum(1)

    assert (real.sum(1) == 1).any()
    assert routing.null_M.any()
    # To 1e-6 of the weight that is left, which may be small.
    torch.testing.assert_close(sums, real.any(1).to(s.dtype), atol=1e-2, rtol=0)


def test_by_hand() -> None:
    """A column of three takes one of two rows; row 0 loses its best and gives p_0 + p_1 to its second."""
    s = torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 1.0]])
    routing = bound(Capped(TopK(2, renormalise=False), 1.0, minimum=1), 3)(s)
    p = s.exp() / s.exp().sum(1, keepdim=True)

    assert routing.expert_M.tolist() == [3, 1, 0, 2]
    expected = torch.stack([torch.zeros(()), p[0, 0] + p[0, 1], p[1, 0], p[1, 2]])
    torch.testing.assert_close(routing.weight_M, expected, rtol=1e-5, atol=0)
