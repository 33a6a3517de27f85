# SPDX-License-Identifier: Apache-2.0
"""Laws of the auxiliary losses under a conditional split: what was given and not chosen is not there for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeapps.moe import losses, objectives
from moeapps.moe.experts import MLPExperts
from moeapps.moe.layer import MoELayer
from moeapps.moe.objectives import routed
from moeapps.moe.record import MoERecorder, Record
from moeapps.moe.routers import ConditionalSplit, LinearScore, Router, TopK, TopP
from moeapps.moe.routers.chooser import Chooser

D, E, N = 5, 4, 40
CHOOSERS = {
    "top-1": lambda: TopK(1),
    "top-2 of sigmoids": lambda: TopK(2, weighing="sigmoid"),
    "top-2 with nulls": lambda: TopK(2, num_null=3),
    "top-p": lambda: TopP(0.6),
}
LOSSES = [
    losses.SwitchBalance(),
    losses.SwitchBalance(per_group=True),
    losses.GlobalBatchBalance().eval(),
    losses.ChosenBalance(),
    losses.ImportanceLoss(),
    losses.LoadLoss(),
    losses.ZLoss(),
    losses.EntropyLoss(),
    losses.BatchEntropyLoss(),
    losses.MutualInformationLoss(),
]


def inner_router(choose: Chooser) -> Router:
    columns = E + getattr(choose, "num_null", 0)
    return Router(LinearScore(D, columns, init_std=1.0), choose).double()


def recorded(router: torch.nn.Module, x_ND: Tensor, group_N: Tensor, mask_N: Tensor | None = None) -> Record:
    layer = MoELayer(router, MLPExperts(router.num_experts, D, 3).double())
    with MoERecorder() as recorder:
        layer(x_ND, token_mask=mask_N, group=group_N)
    return recorder.records[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fixed", [None, (-1, -2)], ids=["negative", "two"])
@pytest.mark.parametrize("chooser", CHOOSERS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.name}{'_per_group' * getattr(loss, 'per_group', 0)}")
def test_a_loss_is_that_of_the_inner_router_on_the_conditional_rows_alone(
    loss: losses.AuxLoss, chooser: str, fixed: tuple[int, ...] | None, masked: bool
) -> None:
    if loss.name == "load" and chooser == "top-p":
        record = recorded(ConditionalSplit(inner_router(TopP(0.6)), fixed), torch.randn(3, D).double(), torch.arange(3))
        with pytest.raises(ValueError, match="no fixed k"):
            loss.value([record])
        return
    router = inner_router(CHOOSERS[chooser]())
    x, group = torch.randn(N, D, dtype=torch.float64), torch.arange(N) % 5 - 2
    mask = torch.arange(N) % 7 != 0 if masked else None
    seen = group >= 0 if mask is None else (group >= 0) & mask

    results = []
    for split in (True, False):
        leaf = x.clone().requires_grad_()
        if split:
            record = recorded(ConditionalSplit(router, fixed), leaf, group, mask)
        else:
            record = recorded(router, leaf[seen], group[seen])
        value = loss.value([record])
        results.append((value.detach(), *torch.autograd.grad(value, (leaf, router.score.weight))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("unconditional", [0, 1, 7, 100])
def test_balance_of_even_conditional_rows_is_one_however_many_rows_are_given(unconditional: int) -> None:
    router = Router(LinearScore(E, E), TopK(1))
    with torch.no_grad():
        router.score.weight.copy_(torch.eye(E))
    x = torch.cat([torch.eye(E).repeat(3, 1), torch.randn(unconditional, E)])
    group = torch.cat([torch.arange(3 * E), torch.full((unconditional,), -1)])
    with MoERecorder() as recorder:
        MoELayer(ConditionalSplit(router), MLPExperts(E + 1, E, 3))(x, group=group)
    assert losses.SwitchBalance().value(recorder.records).item() == pytest.approx(1.0)
    assert objectives.column_counts(recorder.records[0]).tolist() == [3.0] * E
    assert losses.ImportanceLoss().value(recorder.records).item() == pytest.approx(0.0, abs=1e-6)


def test_a_batch_without_conditional_rows_loses_nothing_and_keeps_its_graph() -> None:
    router = inner_router(TopK(1))
    record = recorded(ConditionalSplit(router), torch.randn(6, D).double(), torch.full((6,), -1))
    for loss in LOSSES:
        value = loss.value([record])
        assert value.item() == 0.0, loss.name
        assert value.requires_grad, loss.name


def test_a_split_within_a_split_gives_the_experts_of_both() -> None:
    router = inner_router(TopK(1))
    nested = ConditionalSplit(ConditionalSplit(router, (-1,)), (-2,))
    x, group = torch.randn(N, D).double(), torch.arange(N) % 5 - 2
    record = routed(recorded(nested, x, group))
    alone = router(x[group >= 0])
    assert record.routing.num_experts == E
    torch.testing.assert_close(objectives.column_counts(record), alone.counts().double())
    torch.testing.assert_close(objectives.probabilities(record), alone.probs_NE)


def test_rows_repeated_after_routing_keep_what_they_were_given() -> None:
    record = recorded(ConditionalSplit(inner_router(TopK(1))), torch.randn(N, D).double(), torch.arange(N) % 5 - 2)
    more = replace(record, routing=record.routing.repeat_rows(3), group=record.group.repeat_interleave(3))
    for loss in LOSSES:
        assert loss.value([more]).item() == pytest.approx(loss.value([record]).item()), loss.name
