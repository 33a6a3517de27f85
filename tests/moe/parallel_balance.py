# SPDX-License-Identifier: Apache-2.0
"""What several processes with spread experts count together: balance, biases, thresholds and the routing's metrics."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from moeapps.moe import GlobalBatchBalance, MoERecorder, SwitchBalance, Threshold, TopK, TopP
from moeapps.moe.balance import BiasBalancer
from moeapps.moe.metrics import load_cv
from moeapps.moe.objectives import column_counts, switch_balance
from moeapps.moe.ranks import alone, sum_over_ranks
from tests.moe.parallel_common import ROWS, D, Place, average, equal, layer, spread


def equal_rows(place: Place, steps: int) -> Tensor:
    """As many rows on each process: only then is a mean over processes the mean over rows."""
    torch.manual_seed(4)
    return torch.randn(steps, place.world, 10, D, dtype=torch.float64)


def balance_is_of_the_global_batch(place: Place) -> None:
    torch.manual_seed(1)
    whole = layer(TopK(2), place.num_experts).double()
    mine, x = spread(whole, place.mesh), equal_rows(place, 1)[0]
    with MoERecorder() as all_rows:
        whole(x.flatten(0, 1))
    with MoERecorder() as own_rows:
        mine(x[place.rank])
    wanted, found = SwitchBalance(1.0)(all_rows.records), GlobalBatchBalance(1.0)(own_rows.records)
    wanted.backward()
    found.backward()
    average(mine)
    equal({"loss": sum_over_ranks(found.detach()) / place.world}, {"loss": wanted.detach()}, 1e-6)
    equal({"router": mine.router.score.weight.grad}, {"router": whole.router.score.weight.grad}, 1e-6)
    local = SwitchBalance(1.0)(own_rows.records)
    if place.world > 1:
        assert not torch.isclose(sum_over_ranks(local.detach()) / place.world, wanted, atol=1e-6)


def balance_over_accumulated_batches(place: Place) -> None:
    """With the counts of all micro-batches supplied, the mean over them is the loss of one process on all rows."""
    torch.manual_seed(1)
    whole = layer(TopK(2), place.num_experts).double()
    mine, x = spread(whole, place.mesh), equal_rows(place, 3)
    with MoERecorder() as all_rows:
        whole(x.flatten(0, 2))
    with MoERecorder() as own_rows:
        for part in x[:, place.rank]:
            mine(part)
    counts_E = sum_over_ranks(torch.stack([column_counts(record) for record in own_rows.records]).sum(0))
    values = torch.stack([switch_balance(record, counts_E=counts_E) for record in own_rows.records])
    wanted = switch_balance(all_rows.records[0])
    equal({"loss": sum_over_ranks(values.mean().detach()) / place.world}, {"loss": wanted.detach()}, 1e-6)


def bias_balancing_counts_all(place: Place) -> None:
    """Against the rule by hand, on the counts of one process with all rows."""
    torch.manual_seed(1)
    whole = layer(TopK(2, weighing="sigmoid", balance_bias=True), place.num_experts).double()
    mine = spread(whole, place.mesh)
    balancer, wanted = BiasBalancer(mine, rate=0.01), torch.zeros(place.num_experts, dtype=torch.float64)
    for x in equal_rows(place, 3):
        with MoERecorder(mine) as recorder:
            mine(x[place.rank])
        balancer.add(recorder.records)
        balancer.step()
        whole.router.choose.bias.copy_(wanted)
        counts_E = whole.route(x.flatten(0, 1)).counts().double()
        delta_E = 0.01 * torch.sign(counts_E.mean() - counts_E)
        wanted = wanted + delta_E - delta_E.mean()
    equal({"bias": mine.router.choose.bias}, {"bias": wanted}, 1e-12)
    assert wanted.abs().sum() > 0


def thresholds_follow_the_joint_batch(place: Place) -> None:
    for choose in (Threshold(1.5, decay=0.5), TopP(0.6, budget=1.5, decay=0.5)):
        torch.manual_seed(1)
        whole = layer(choose, place.num_experts).double()
        mine, before = spread(whole, place.mesh), copy.deepcopy(whole)
        for x in equal_rows(place, 3):
            mine(x[place.rank])
            with alone():
                whole(x.flatten(0, 1))
        equal(dict(mine.router.named_buffers()), dict(whole.router.named_buffers()), 1e-6)
        assert any(not torch.equal(a, b) for a, b in zip(before.buffers(), whole.buffers(), strict=True))


def routing_metrics_are_of_all_rows(place: Place) -> None:
    torch.manual_seed(1)
    whole = layer(TopK(2, num_null=1), place.num_experts, columns=place.num_experts + 1).double()
    mine, x = spread(whole, place.mesh), torch.randn(ROWS, D, dtype=torch.float64)
    with MoERecorder() as recorder:
        mine(place.own(x))
    counts_E = sum_over_ranks(recorder.records[0].routing.counts())
    wanted_E = whole.route(x).counts()
    assert counts_E.tolist() == wanted_E.tolist()
    equal({"cv": load_cv(counts_E)}, {"cv": load_cv(wanted_E)}, 1e-12)
