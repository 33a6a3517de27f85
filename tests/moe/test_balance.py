# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from moeapps.moe import LinearScore, MLPExperts, MoELayer, MoERecorder, Router, SumRouters, TopK
from moeapps.moe.balance import BiasBalancer, CountAccumulator, sum_over_ranks, update_bias
from moeapps.moe.losses import GlobalBatchBalance, SwitchBalance
from moeapps.moe.record import Record
from moeapps.moe.routing import DenseRouting, Routing


def record(experts: list[int], name: str = "moe", num_experts: int = 3) -> Record:
    expert_M = torch.tensor(experts, dtype=torch.int64)
    routing = Routing(
        torch.arange(len(experts)), expert_M, torch.ones(len(experts)), len(experts), num_experts, top_k=1
    )
    return Record(name, routing, nn.Identity())


def test_bias_of_the_overloaded_expert_goes_down_by_the_rate() -> None:
    new = update_bias(torch.zeros(3, dtype=torch.float64), torch.tensor([6, 3, 0]), 0.01)
    torch.testing.assert_close(new, torch.tensor([-0.01, 0.0, 0.01], dtype=torch.float64))


def test_sum_of_bias_stays_where_it_was() -> None:
    bias = torch.zeros(5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        bias = update_bias(bias, torch.randint(0, 50, (5,), generator=generator), 0.1)
    assert bias.sum().item() == pytest.approx(0.0, abs=1e-12)
    assert bias.abs().max() > 0


def test_even_or_absent_counts_leave_the_bias_alone() -> None:
    bias = torch.tensor([0.3, -0.1, -0.2])
    for counts in ([4, 4, 4], [0, 0, 0]):
        assert torch.equal(update_bias(bias, torch.tensor(counts), 0.1), bias)


def test_the_given_bias_is_not_changed_and_keeps_its_type() -> None:
    bias = torch.zeros(2)
    new = update_bias(bias, torch.tensor([1, 3]), 0.5)
    assert torch.equal(bias, torch.zeros(2))
    assert new.dtype == torch.float32
    assert not new.requires_grad


def test_counts_beyond_float32_integers_are_compared_exactly() -> None:
    counts = torch.tensor([2**24 + 1, 2**24 - 1])
    assert update_bias(torch.zeros(2), counts, 1.0).tolist() == [-1.0, 1.0]


def test_bias_balances_a_router_that_prefers_one_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_NE = torch.rand(512, 4, generator=generator) + torch.tensor([0.6, 0.0, 0.0, -0.3])
    bias = torch.zeros(4)
    for _ in range(400):
        bias = update_bias(bias, (scores_NE + bias).argmax(1).bincount(minlength=4), 5e-3)
    counts = (scores_NE + bias).argmax(1).bincount(minlength=4)
    assert scores_NE.argmax(1).bincount(minlength=4).max() > 250
    assert counts.max() < 150


@pytest.mark.parametrize(
    ("bias", "counts", "rate", "message"),
    [(torch.zeros(2), torch.zeros(3), 0.1, "differ"), (torch.zeros(2), torch.zeros(2), 0.0, "must be above 0")],
)
def test_errors_say_what_to_do(bias, counts, rate, message) -> None:
    with pytest.raises(ValueError, match=message):
        update_bias(bias, counts, rate)


def test_accumulated_micro_batches_equal_the_whole_batch() -> None:
    whole, parts = CountAccumulator(), CountAccumulator()
    whole.add([record([0, 1, 1, 3, 2, 2, 2, 0])])
    parts.add([record([0, 1, 1, 3])])
    parts.add([record([2, 2, 2, 0])])
    assert torch.equal(whole.totals()["moe"], parts.totals()["moe"])
    assert parts.totals()["moe"].tolist() == [2, 2, 3]


def test_accumulator_keeps_layers_apart_adds_calls_and_skips_dense_gates() -> None:
    accumulator = CountAccumulator()
    dense = Record("gate", DenseRouting(torch.ones(2, 3), 3), nn.Identity())
    accumulator.add([record([0], "b"), record([1], "a"), record([2], "b"), dense])
    assert {name: counts.tolist() for name, counts in accumulator.totals().items()} == {"a": [0, 1, 0], "b": [1, 0, 1]}
    assert list(accumulator.totals()) == ["a", "b"]


def test_reset_forgets() -> None:
    accumulator = CountAccumulator()
    accumulator.add([record([0])])
    accumulator.reset()
    assert accumulator.totals() == {}


def test_a_layer_with_several_biases_is_refused_and_one_is_moved() -> None:
    def network(*biased: bool) -> nn.Sequential:
        router = SumRouters([Router(LinearScore(5, 4), TopK(1, balance_bias=b, renormalise=False)) for b in biased])
        return nn.Sequential(nn.Linear(5, 5), MoELayer(router, MLPExperts(4, 5, 6)))

    with pytest.raises(ValueError, match=r"layer '1' has 2 choosers with a bias, .* or leave the layer out"):
        BiasBalancer(network(True, True))
    with pytest.raises(ValueError, match="finds no layer"):
        BiasBalancer(network(False, False))
    net = network(False, True)
    balancer = BiasBalancer(net)
    with MoERecorder(net) as recorder:
        net(torch.randn(30, 5))
    balancer.add(recorder.records)
    balancer.step()
    assert net[1].router.routers[1].choose.bias.any()


def test_one_process_sums_to_itself() -> None:
    counts = torch.tensor([1, 2])
    assert sum_over_ranks(counts) is counts


def _half_batch(rank: int, path: str) -> None:
    """Route one half of a batch on each of two ranks and compare with the whole batch in one process."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    logits_NE = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = SwitchBalance().value([routed(logits_NE)])
    half = routed(logits_NE.chunk(2)[rank])
    loss = GlobalBatchBalance().value([half])
    torch.distributed.all_reduce(loss)
    torch.testing.assert_close(loss / 2, whole)

    accumulator = CountAccumulator()
    accumulator.add([half])
    assert torch.equal(accumulator.totals()["moe"], routed(logits_NE).routing.counts())
    assert torch.equal(accumulator.totals()["moe"], accumulator.totals()["moe"]), (
        "summing over ranks twice must not add up"
    )
    torch.distributed.destroy_process_group()


def routed(logits_NE: torch.Tensor) -> Record:
    probs_NE = logits_NE.softmax(-1)
    weight_N, expert_N = probs_NE.max(-1)
    rows = len(logits_NE)
    routing = Routing(torch.arange(rows), expert_N, weight_N, rows, logits_NE.shape[1], top_k=1, probs_NE=probs_NE)
    return Record("moe", routing, nn.Identity())


@pytest.mark.slow
def test_two_ranks_balance_as_one_process_with_the_whole_batch(tmp_path) -> None:
    torch.multiprocessing.spawn(_half_batch, args=(str(tmp_path / "store"),), nprocs=2)
